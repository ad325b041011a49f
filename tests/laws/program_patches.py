# SPDX-License-Identifier: Apache-2.0
"""The mutants of programs: wrong traces, passes, backends and interpreters of them."""

import dataclasses
import importlib
import math
import operator
from types import SimpleNamespace

import torch

from zfunc.program import donated, inplace, ir, passes
from zfunc.program.backends import aten as backend
from zfunc.program.program import graph_pass
from zfunc.transforms import loop

# Modules whose package exports a function of the same name.
bucket, collective_form, leaf_calls, regather, scatter_early, simplify = (
    importlib.import_module(f"zfunc.program.passes.{name}")
    for name in (
        "bucket",
        "collective_form",
        "leaf_calls",
        "regather",
        "scatter_early",
        "simplify",
    )
)
jit = importlib.import_module("zfunc.program.jit")
aten = torch.ops.aten


def with_ir(patch, module, **functions):
    """A pass sees another ``ir``; nobody else does."""
    patch.setattr(module, "ir", SimpleNamespace(**{**vars(ir), **functions}))


def in_default(patch, name, wrong):
    """The default passes, with one replaced."""
    patch.setattr(
        passes,
        "DEFAULT",
        tuple(wrong(p) if p.__name__ == name else p for p in passes.DEFAULT),
    )


def afterwards(change):
    """A pass, and then a change to the graph."""
    return lambda right: lambda program: graph_pass(change)(right(program))


def loop_drops_the_last_microbatch(patch):
    def sum_calls(fn, over, xs):
        return loop.sum_calls(fn, _Fewer(over), xs)

    class _Fewer:
        def __init__(self, over):
            self.n, self.pieces = over.n - 1, over.pieces

    patch.setattr(backend, "sum_calls", sum_calls)


def loop_unrolled(patch):
    patch.setattr(loop, "is_tracing", lambda: False)


def released_before_the_last_use(patch):
    """A value with several uses is let go of after the first."""

    def first_uses(graph):
        seen, dying = set(), {}
        for node in graph.nodes:
            dying[node] = [n for n in node.all_input_nodes if n not in seen]
            seen.update(node.all_input_nodes)
        return dying

    patch.setattr(ir, "last_uses", first_uses)


def missing_wait(patch):
    """What the first message brings is read as it is."""

    def change(graph, program):
        for wait in [n for n in ir.calls_of(graph) if n.target is ir.WAIT][:1]:
            wait.replace_all_uses_with(wait.args[0])
            graph.erase_node(wait)

    patch.setattr(passes, "DEFAULT", (*passes.DEFAULT, graph_pass(change)))


def regathered_from_a_stale_shard(patch):
    def copy_node(graph, node, replaced):
        made = ir.copy_node(graph, node, replaced)
        if node.target is ir.ALL_GATHER:
            with graph.inserting_before(made):
                stale = ir.emit(graph, aten.mul.Tensor, made.args[0], 1 - 1e-3)
            made.args = (stale, *made.args[1:])
        return made

    with_ir(patch, regather, copy_node=copy_node)


def regather_merged_into_the_forward_gather(patch):
    with_ir(patch, bucket, phase=lambda node: "")


class OnRank0:
    """Tells programs of rank 0: passes go over those of one mesh in rank order."""

    def __init__(self):
        self.seen = []

    def __call__(self, program):
        if not any(program.out_spec is spec for spec in self.seen):
            self.seen.append(program.out_spec)
        place = next(i for i, s in enumerate(self.seen) if s is program.out_spec)
        return place % math.prod(n for _, _, n in program.groups) == 0


def bucket_order_swapped_on_one_rank(patch):
    merge, on_rank_0 = bucket._merge_gathers, OnRank0()

    def swapped(graph, group, program):
        first, *rest = group
        order = [first, *reversed(rest)] if on_rank_0(program) else group
        merge(graph, order, program)

    patch.setattr(bucket, "_merge_gathers", swapped)


def prefetch_on_one_rank_only(patch):
    on_rank_0 = OnRank0()

    def only(right):
        return lambda program: right(program) if on_rank_0(program) else program

    in_default(patch, "prefetched", only)


def scattered_before_the_last_summand(patch):
    """A gradient that is a sum over two uses is sent when the first is there."""

    def change(graph, program):
        for start in ir.calls_of(graph):
            if start.target is not ir.REDUCE_SCATTER:
                continue
            chain = {*scatter_early.made_by(start), start}
            for node in chain:
                for x in [x for x in node.all_input_nodes if x not in chain]:
                    if x.target is aten.add.Tensor and len(x.all_input_nodes) == 2:
                        node.replace_input_with(x, x.args[0])

    in_default(patch, "scatter_early", afterwards(change))


def reduced_at_the_end(patch):
    """Full gradients pile up."""
    in_default(patch, "scatter_early", lambda right: lambda program: program)


def ranks_added_up_in_reverse(patch):
    folded = collective_form._folded

    def backwards(graph, received, n, like):
        made = folded(graph, received, n, like)
        parts = sorted(
            x
            for split in received.users
            if split.target is aten.split_with_sizes.default
            for x in split.users
            if x.target is operator.getitem
        )
        for part in parts:
            part.args = (part.args[0], len(parts) - 1 - part.args[1])
        return made

    patch.setattr(collective_form, "_folded", backwards)


def casts_taken_for_layouts(patch):
    """A cast that changes no shape is removed as if it changed nothing."""

    def alike(node, other):
        a, b = node.meta.get("val"), other.meta.get("val")
        return (
            isinstance(a, torch.Tensor)
            and isinstance(b, torch.Tensor)
            and (a.shape, a.stride()) == (b.shape, b.stride())
        )

    patch.setattr(simplify, "_alike", alike)


def jit_leaves_the_old_state_alive(patch):
    patch.setattr(donated, "_mark", lambda nodes, buffers: None)


def written_over_while_in_use(patch):
    """A result goes into memory that something reads later on."""
    patch.setattr(inplace._Memory, "_end", lambda self, user: -1)


def written_over_while_others_look(patch):
    patch.setattr(donated, "held", lambda tensors, num_holders: [])


def written_over_undonated(patch):
    """Every input is taken for the program's own."""

    def all_of_it(program):
        mine = dataclasses.replace(program, donated=frozenset(program.inputs))
        return inplace.write_over(mine)

    patch.setattr(jit, "write_over", all_of_it)
