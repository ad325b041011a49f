# SPDX-License-Identifier: Apache-2.0
"""Any pure function as a program: traced for its shapes, then replayed.

``zf.jit`` is for training steps; this is what inference needs of it: a function from
arguments that stay and a state that is used up to the next state.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Final

import torch
from torch.fx import Graph, Node

from zfunc.core.sharding import is_sharded
from zfunc.core.tree import PyTree, tree_flatten, tree_leaves, tree_unflatten
from zfunc.program import ir
from zfunc.program.backends import aten
from zfunc.program.passes.simplify import simplify
from zfunc.program.program import Program, graph_pass
from zfunc.program.trace import trace, with_kind

Step = Callable[[PyTree, PyTree], PyTree]

_IN_PLACE: Final = (
    (torch.ops.aten.index_copy.default, torch.ops.aten.index_copy_.default),
)
_BMM: Final = torch.ops.aten.bmm.default
_MM: Final = torch.ops.aten.mm.default
_EXPAND: Final = torch.ops.aten.expand.default
_RESHAPE: Final = torch.ops.aten.reshape.default
_VIEW: Final = torch.ops.aten.view.default
# What repeating each head is traced to, last call first.
_REPEATS: Final = (
    (torch.ops.aten.view.default, torch.ops.aten._unsafe_view.default),
    (torch.ops.aten.clone.default,),
    (torch.ops.aten.expand.default,),
    (torch.ops.aten.unsqueeze.default,),
)
_ATTENTION: Final = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default


def replayed(fn: Step, kept: PyTree, state: PyTree) -> Step:
    """``fn(kept, state)`` traced for these shapes, as a function that replays it.

    The state that it is given is used up: what ``fn`` puts into a copy of one of its
    tensors with ``index_copy`` is written into that tensor itself.

    Args:
      fn: A pure function to a state of the same structure.
      kept: Arguments that stay as they are, such as parameters.
      state: A tree of tensors of which nothing else holds a view.

    Raises:
      TraceError: Python that depends on the values of tensors.

    Laws: the results of ``fn``, bitwise.

    Examples:
      >>> def put(row, table):
      ...     return table.index_copy(0, torch.tensor([1]), row[None])
      >>> table = torch.zeros(2, 3)
      >>> run = replayed(put, torch.ones(3), table)
      >>> run(torch.ones(3), table) is table, table[1]
      (True, tensor([1., 1., 1.]))
    """
    program = lowered(fn, kept, state)
    run = program.run_by(aten.compile_graph)
    spec = program.out_spec

    def replay(kept: PyTree, state: PyTree) -> PyTree:
        return tree_unflatten(spec, run([*tree_leaves(kept), *tree_leaves(state)]))

    return replay


def lowered(fn: Step, kept: PyTree, state: PyTree) -> Program:
    """The program of ``fn(kept, state)``, its state donated.

    Args:
      fn: See ``replayed``.
      kept: Likewise.
      state: Likewise.

    Examples:
      >>> program = lowered(lambda w, x: w * x, torch.ones(2), torch.ones(2))
      >>> program.inputs, sorted(program.donated)
      (('kept/0', 'state/0'), ['state/0'])
    """
    meshes = {
        leaf.sharding.mesh for leaf in tree_leaves(kept, is_sharded) if is_sharded(leaf)
    }
    kind = next((mesh.kind for mesh in meshes), "local")
    traced = trace(fn, (with_kind(kept, "traced"), state), kind)
    firsts, lasts = tree_leaves(kept), tree_leaves(state)
    names = [f"kept/{i}" for i in range(len(firsts))]
    states = [f"state/{i}" for i in range(len(lasts))]
    constants = [f"constant/{i}" for i in range(len(traced.constants))]
    groups = [
        (mesh.group(axis), axis, n) for mesh in meshes for axis, n in mesh.axes if n > 1
    ]
    program = Program(
        traced.graph,
        tuple(names + states + constants),
        tuple(traced.out_paths),
        tuple(traced.constants),
        tuple(groups),
        (lasts + firsts)[0].device.type,
        frozenset(states),
        traced.out_spec,
    )
    return write_into(group_heads(one_product(simplify(program))))


@graph_pass
def one_product(graph: Graph, program: Program) -> None:
    """A product of a batch with one matrix is one product of its rows, not one each.

    What torch does where it sees the rows dense. Of a single token the shapes that
    attention promises have other strides than what it returns (torch 2.13, on the CPU),
    so a trace does not see it, and would read the matrix once per row.
    """
    for node in ir.calls_of(graph):
        if node.target is not _BMM:
            continue
        rows: Any = node.args[0]
        wide: Any = node.args[1]
        if wide.target is not _EXPAND or wide.args[0].meta["val"].ndim != 2:
            continue
        shape = list(node.meta["val"].shape)
        with graph.inserting_before(node):
            flat = ir.emit(graph, _RESHAPE, rows, [-1, rows.meta["val"].shape[-1]])
            product = ir.emit(graph, _MM, flat, wide.args[0])
            node.replace_all_uses_with(ir.emit(graph, _VIEW, product, shape))
        graph.erase_node(node)


@graph_pass
def group_heads(graph: Graph, program: Program) -> None:
    """Attention on the CPU reads grouped keys and values as they are, without copies.

    Its kernel gives query head ``h`` the key head ``h // (H / G)``, which is what
    repeating each key head H / G times does: the same bits.
    """
    for node in ir.calls_of(graph):
        if node.target is not _ATTENTION:
            continue
        sources = [_unrepeated(node.args[i]) for i in (1, 2)]
        if None not in sources and _same_heads(sources):
            node.args = (node.args[0], *sources, *node.args[3:])


def _same_heads(nodes: list[Any]) -> bool:
    keys, values = (node.meta["val"].shape[1] for node in nodes)
    return bool(keys == values)


def _unrepeated(node: Any) -> Any:
    """The ``[B, G, S, K]`` of which a node is ``[B, H, S, K]``, each head repeated.

    None where it is not.
    """
    chain = []
    for allowed in _REPEATS:
        if not isinstance(node, Node) or node.target not in allowed:
            return None
        chain.append(node)
        node = node.args[0]
    shapes = [tuple(n.meta["val"].shape) for n in (node, chain[2], chain[0])]
    if list(map(len, shapes)) != [4, 5, 4]:
        return None
    (b, g, s, k), (b_, g_, times, s_, k_), out = shapes
    same = chain[3].args[1] == 2 and (b_, g_, s_, k_) == (b, g, s, k)
    return node if same and out == (b, g * times, s, k) else None


def write_into(program: Program) -> Program:
    """The program with ``index_copy`` into a donated input in place of a copy of it.

    Where nothing of the program reads that input later on; the last pass, since after
    it the order of the graph is not only that of its edges.
    """
    graph = ir.copied(program.graph)
    inputs = ir.inputs_of(graph)
    donated = {
        node
        for node, path in zip(inputs, program.inputs, strict=True)
        if path in program.donated
    }
    forms = dict(_IN_PLACE)
    seen: set[Node] = set()
    for node in ir.calls_of(graph):
        seen.add(node)
        first: Any = node.args[0] if node.args else None
        if node.target in forms and first in donated:
            others = [user for user in first.users if user is not node]
            if all(user in seen and not ir.is_view(user) for user in others):
                node.target = forms[node.target]
    return program.with_graph(graph)


def signature(tree: PyTree) -> tuple[Any, ...]:
    """What a program is traced for: structure, shapes, dtypes, strides, devices.

    Examples:
      >>> signature(torch.ones(2)) == signature(torch.zeros(2))
      True
    """
    leaves, spec = tree_flatten(tree)
    shown = tuple(
        (x.shape, x.dtype, x.stride(), x.device) if isinstance(x, torch.Tensor) else x
        for x in leaves
    )
    return spec, shown
