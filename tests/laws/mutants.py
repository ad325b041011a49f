# SPDX-License-Identifier: Apache-2.0
"""Wrong versions of the library, one patch each, and the law that sees through each.

``python -m tests.laws.mutants`` prints the table; ``test_mutants.py`` asserts it.
"""

import dataclasses
import functools
import importlib
import time
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any, NamedTuple

import pytest
import torch
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

import zfunc as zf
from tests.laws import test_keys as keys
from tests.laws import test_l1_commuting_square as l1
from tests.laws import test_l2_placement as l2
from tests.laws import test_l3_stages as l3
from tests.laws import test_l4_transforms_commute as l4
from tests.laws import test_l5_accumulate as l5
from tests.laws import test_l6_resume as l6
from tests.laws import test_l7_donate as l7
from tests.laws import test_l10_round_trip as l10
from tests.laws import test_l11_moments as l11
from tests.laws import test_low_precision as low
from tests.laws.cases import Case, cases, keyed_loss
from zfunc.core import collectives, sharding, step, update, wire
from zfunc.core.mesh import Mesh
from zfunc.core.tree import tree_flatten, tree_leaves, tree_map, tree_unflatten
from zfunc.testing import recipe as recipes

# Modules whose package exports a function of the same name.
accumulate, gathered, partition, precision, remat = (
    importlib.import_module(f"zfunc.transforms.{name}")
    for name in ("accumulate", "gathered", "partition", "precision", "remat")
)
adam, clip, sgd = (
    importlib.import_module(f"zfunc.optim.{name}") for name in ("adam", "clip", "sgd")
)


class Law(NamedTuple):
    """A law as its tests state it: what it is about, and what must hold of that."""

    title: str
    arguments: tuple[st.SearchStrategy, ...]
    check: Callable[..., None]


# The check of each law is that of its tests, and so are the examples; where a mutant
# lives in a corner of them, only that corner.
LAWS = {
    "L1": Law("commuting square", (cases(),), l1.check),
    "L1 weights": Law(
        "commuting square, weighted mean",
        (cases(weighted=True, num_microbatches=st.integers(2, 3)),),
        l1.check,
    ),
    "L1 remat": Law("commuting square, remat", (cases(remat=True),), l1.check),
    "L2": Law("placement kept", (cases(),), l2.check),
    "L3": Law(
        "stages 1, 2, 3 bitwise",
        (cases(zero=3, num_microbatches=1),),
        l3.check_one_microbatch,
    ),
    "L4": Law(
        "slots commute",
        (
            cases(zero=2, num_microbatches=3, num_steps=1, remat=False),
            st.sampled_from(l4.POLICIES),
        ),
        l4.check,
    ),
    "L5": Law("accumulate nests", (cases(num_steps=1), l5.COUNTS, l5.COUNTS), l5.check),
    "L6": Law(
        "resume", (cases(num_steps=3), st.integers(0, 3), st.just(keyed_loss)), l6.check
    ),
    "L7": Law("donate bitwise", (cases(),), l7.check_simulated),
    "L7 dead": Law("donated is dead", (cases(mesh_shapes=l7.ONE_RANK),), l7.check_dead),
    "L7 pure": Law("pure", (cases(num_steps=1),), l7.check_pure),
    "L10": Law("round trip", (cases().map(Case.shard),), l10.check_ranks),
    "L11": Law(
        "init commutes",
        (cases(num_steps=1),),
        lambda case: l11.check(case, case.recipe.tx()),
    ),
    "keys": Law("keys", (cases(weighted=False), st.integers(0, 9)), keys.check),
    "fresh keys": Law(
        "a key per step and sample", (st.integers(0, 9),), keys.check_fresh
    ),
    "bf16": Law("low precision bound", (low.problems(),), low.check_compute),
}


# --- the mutants: each takes a MonkeyPatch -------------------------------------


def with_collectives(patch, **functions):
    """``partition`` sees other collectives; nobody else does."""
    shim = SimpleNamespace(**{**vars(collectives), **functions})
    patch.setattr(partition, "collectives", shim)


def tally_not_summed(patch):
    with_collectives(patch, psum=lambda tree, axis, mesh: tree)


def metrics_not_reduced(patch):
    def psum(tree, axis, mesh):
        def one(mine, summed):
            return zf.Mean(mine.total, summed.weight)

        return tree_map(
            one,
            tree,
            collectives.psum(tree, axis, mesh),
            is_leaf=lambda x: isinstance(x, zf.Mean),
        )

    with_collectives(patch, psum=psum)


def weight_forgotten(patch):
    """A mean over ranks instead of a weighted one."""

    def psum(tree, axis, mesh):
        summed = collectives.psum(tree, axis, mesh)
        equal = summed.loss.weight * 0 + mesh.axis_size(axis)
        return dataclasses.replace(summed, loss=zf.Mean(summed.loss.total, equal))

    with_collectives(patch, psum=psum)


def local_norm_in_clip(patch):
    def local(tree):
        return sum(x.square().sum() for x in tree_leaves(tree)).sqrt()

    patch.setattr(clip, "global_norm", local)


def padded_at_the_head(patch):
    def pad(x, dim, n):
        missing = -x.shape[dim] % n
        sides = [0, 0] * (x.dim() - 1 - dim) + [missing, 0]
        return torch.nn.functional.pad(x, sides)

    patch.setattr(sharding, "_pad", pad)


def padded_with_ones(patch):
    def pad(x, dim, n):
        missing = -x.shape[dim] % n
        sides = [0, 0] * (x.dim() - 1 - dim) + [0, missing]
        return torch.nn.functional.pad(x, sides, value=1.0)

    patch.setattr(sharding, "_pad", pad)


def scaled_gradient(patch, factor=1 + 1e-6):
    scatter = partition._Stage._scatter

    def scaled(self, grads):
        return tree_map(lambda g: g * factor, scatter(self, grads))

    patch.setattr(partition._Stage, "_scatter", scaled)


def stage_2_averages_and_multiplies_back(patch):
    scatter = partition._Stage._scatter

    def there_and_back(self, grads):
        summed = scatter(self, grads)
        return tree_map(lambda g: g / 3 * 3, summed) if self.zero == 2 else summed

    patch.setattr(partition._Stage, "_scatter", there_and_back)


def stale_gather(patch):
    """Each step computes with the parameters that the step before gathered."""
    enter, kept = partition._Stage._enter, []

    def stale(self, params):
        now = enter(self, params)
        leaves, spec = tree_flatten(now)
        level = torch._C._functorch.maybe_current_level()
        before = kept.pop() if kept else None
        kept.append([torch._C._functorch.get_unwrapped(x) for x in leaves])
        shapes = [x.shape for x in kept[0]]
        if self.zero == 0 or not before or [x.shape for x in before] != shapes:
            return now
        wrapped = [torch._C._functorch._add_batch_dim(x, 0, level) for x in before]
        return tree_unflatten(spec, wrapped)

    patch.setattr(partition._Stage, "_enter", stale)


def replicated_leaves_not_summed(patch):
    def forgotten(self, grads):
        def one(leaf):
            whole = isinstance(leaf, partition.Whole)
            rest = (leaf.buffer, leaf.sharding, leaf.global_shape)
            return sharding.Sharded(*rest) if whole else leaf

        return tree_map(one, grads, is_leaf=partition._is_leaf)

    patch.setattr(partition._Stage, "_sum_rest", forgotten)


def scatter_without_sum(patch):
    def own_chunk(self, x):
        chunks = x.unflatten(1, (self.n, x.shape[1] // self.n))
        return torch.stack([chunks[r, r] for r in range(self.n)])

    patch.setattr(wire.PSumScatter, "simulate", own_chunk)


def ranks_reversed_in_gather(patch):
    gather = wire.AllGather.simulate
    patch.setattr(wire.AllGather, "simulate", lambda self, x: gather(self, x.flip(0)))


def reduced_in_bfloat16(patch):
    narrow = functools.partial(sharding.scatter_sum_buffers)

    def scatter(fulls, like, axis, *, reduce_dtype=None):
        return narrow(fulls, like, axis, reduce_dtype=torch.bfloat16)

    patch.setattr(partition, "scatter_sum_buffers", scatter)


def gathered_in_float32(patch):
    patch.setattr(gathered.Wire, "sent", lambda self, stored, wanted: torch.float32)


def over_microbatches(combine):
    """``accumulate``'s core with another way to combine (tally, gradients) pairs."""

    def microbatched(grad_fn, n):
        def summed(params, batch, samples):
            indices = (
                samples.index.chunk(n) if len(samples.index) else [samples.index] * n
            )
            pairs = [
                grad_fn(params, piece, step.Samples(samples.key, index))
                for piece, index in zip(
                    accumulate._split(batch, n), indices, strict=True
                )
            ]
            return functools.reduce(
                lambda a, b: tree_map(torch.add, a, b), combine(pairs)
            )

        return summed

    return microbatched


def mean_of_means(patch):
    def normalized(pair):
        tally, grads = pair
        weight = tally.loss.weight
        by = torch.where(weight == 0, 1, weight)
        mean = zf.Mean(tally.loss.total / by, torch.ones_like(by))
        return dataclasses.replace(tally, loss=mean), tree_map(lambda g: g / by, grads)

    wrong = over_microbatches(lambda pairs: map(normalized, pairs))
    patch.setattr(accumulate, "_microbatched", wrong)


def last_microbatch_dropped(patch):
    wrong = over_microbatches(lambda pairs: pairs[:-1] or pairs)
    patch.setattr(accumulate, "_microbatched", wrong)


def accumulate_in_the_slot_of_partition(patch):
    """Around autodiff instead of around the step's gradient."""

    def wrong(n):
        def transform(made):
            def grad(loss):
                return accumulate._microbatched(made.grad(loss), n)

            return made._replace(grad=grad)

        return transform

    patch.setattr(zf, "accumulate", wrong)
    patch.setattr(recipes, "accumulate", wrong)


def no_rank_in_the_sample_index(patch):
    with_collectives(patch, axis_index=lambda axis, mesh: torch.tensor(0))


def microbatch_samples_counted_from_0(patch):
    def samples(key, index):
        return step.Samples(key, torch.arange(len(index)))

    patch.setattr(accumulate, "Samples", samples)


def keys_from_a_hidden_counter(patch):
    fold_in, calls = step.fold_in, []

    def counted(key, data):
        if data.dim() == 0:
            calls.append(1)
            return fold_in(key, data * 0 + len(calls))
        return fold_in(key, data)

    patch.setattr(step, "fold_in", counted)


def one_key_for_all_steps(patch):
    fold_in = step.fold_in
    patch.setattr(
        step, "fold_in", lambda key, data: fold_in(key, data) if data.dim() else key
    )


def moments_in_another_leaf_order(patch):
    def reversed_zeros(params):
        leaves, spec = tree_flatten(params)
        return tree_unflatten(spec, [torch.zeros_like(x) for x in reversed(leaves)])

    patch.setattr(adam, "zeros_wide", reversed_zeros)
    patch.setattr(sgd, "zeros_wide", reversed_zeros)


def donation_leaves_the_old_state_alive(patch):
    patch.setattr(step, "_taken", lambda state: state)


def donation_rounds_the_update(patch):
    patch.setattr(update, "_add_in_place", lambda p, u: p.add_(u.float()))


def pure_step_writes_in_place(patch):
    patch.setattr(step, "pure_update", update.consuming_update)


def remat_from_a_stale_input(patch):
    save = remat._Remat.setup_context

    def stale(ctx, inputs, output):
        call, rank, *tensors = inputs
        old = [t * (1 - 1e-3) if t.is_floating_point() else t for t in tensors]
        save(ctx, (call, rank, *old), output)

    patch.setattr(remat._Remat, "setup_context", staticmethod(stale))


def rank_is_identity(patch):
    def same(a, b):
        return (a.axes, a.kind, a.rank) == (b.axes, b.kind, b.rank)

    patch.setattr(Mesh, "__eq__", same)


def update_rounded_to_bfloat16(patch):
    def rounded(p, u):
        return (p + u).bfloat16().to(p.dtype)

    patch.setattr(update, "_added", rounded)


def loss_scaled_by_precision(patch):
    """The cast of the loss multiplies by the weight that the step divides by."""
    in_precision = precision._in_precision

    def scaled(loss, policy):
        inner = in_precision(loss, policy)

        def wrong(params, batch, samples):
            tally = inner(params, batch, samples)
            total = tally.loss.total * tally.loss.weight
            return dataclasses.replace(tally, loss=zf.Mean(total, tally.loss.weight))

        return wrong

    patch.setattr(precision, "_in_precision", scaled)


class Mutant(NamedTuple):
    law: str
    patch: Callable[[pytest.MonkeyPatch], None]

    @property
    def name(self):
        return self.patch.__name__.replace("_", " ")


MUTANTS = (
    Mutant("L1", tally_not_summed),
    Mutant("L1", metrics_not_reduced),
    Mutant("L1 weights", weight_forgotten),
    Mutant("L1", local_norm_in_clip),
    Mutant("L1", padded_at_the_head),
    Mutant("L1", scaled_gradient),
    Mutant("L1", stale_gather),
    Mutant("L1", replicated_leaves_not_summed),
    Mutant("L1", scatter_without_sum),
    Mutant("L1", ranks_reversed_in_gather),
    Mutant("L1", reduced_in_bfloat16),
    Mutant("L1", gathered_in_float32),
    Mutant("L1 weights", mean_of_means),
    Mutant("L1 remat", remat_from_a_stale_input),
    Mutant("L2", padded_with_ones),
    Mutant("L3", stage_2_averages_and_multiplies_back),
    Mutant("L4", accumulate_in_the_slot_of_partition),
    Mutant("L5", last_microbatch_dropped),
    Mutant("L6", keys_from_a_hidden_counter),
    Mutant("L7", donation_rounds_the_update),
    Mutant("L7 dead", donation_leaves_the_old_state_alive),
    Mutant("L7 pure", pure_step_writes_in_place),
    Mutant("L10", rank_is_identity),
    Mutant("L11", moments_in_another_leaf_order),
    Mutant("keys", no_rank_in_the_sample_index),
    Mutant("keys", microbatch_samples_counted_from_0),
    Mutant("fresh keys", one_key_for_all_steps),
    Mutant("bf16", update_rounded_to_bfloat16),
    Mutant("bf16", loss_scaled_by_precision),
)


# --- the hunt --------------------------------------------------------------------


class Kill(NamedTuple):
    """The first example that failed: its number, what it was, and how it failed."""

    number: int
    example: tuple[Any, ...]
    error: BaseException


def hunt(law: Law, max_examples: int) -> Kill | None:
    """The first failure of the law; None if it holds of all the examples.

    The examples are those of ``derandomize``, the same on every run. Only an assertion
    is a kill: a crash is an error of the mutant.
    """
    kills: list[Kill] = []
    tried: list[int] = []

    @settings(
        max_examples=max_examples,
        derandomize=True,
        database=None,
        deadline=None,
        suppress_health_check=list(HealthCheck),
        phases=[Phase.generate],
    )
    @given(st.tuples(*law.arguments))
    def attempt(example):
        if kills:
            return
        tried.append(1)
        try:
            law.check(*example)
        except (AssertionError, pytest.fail.Exception) as error:
            kills.append(Kill(len(tried), example, error))

    attempt()
    return kills[0] if kills else None


def hunt_mutant(mutant: Mutant, max_examples: int = 150) -> Kill | None:
    with pytest.MonkeyPatch.context() as patch:
        mutant.patch(patch)
        return hunt(LAWS[mutant.law], max_examples)


def described(value: Any) -> str:
    """An example in a few words: what differs from the defaults, and shapes."""
    if isinstance(value, Case):
        shapes = tree_map(lambda x: tuple(x.shape), value.params)
        return f"{described(value.recipe)} on {value.mesh_shape}, params {shapes}"
    if isinstance(value, low.Linear):
        return f"{described(value.recipe)} on {value.mesh_shape}"
    if isinstance(value, recipes.Recipe):
        default = recipes.Recipe()
        changed = [
            f"{f.name}={getattr(value, f.name)!r}"
            for f in dataclasses.fields(value)
            if f.name == "zero" or getattr(value, f.name) != getattr(default, f.name)
        ]
        return f"Recipe({', '.join(changed)})"
    if isinstance(value, zf.TrainState):
        return "a state"
    return getattr(value, "__name__", repr(value))


def row(mutant: Mutant, kill: Kill | None) -> str:
    """A line of the table."""
    start = f"{mutant.name:<40} {mutant.law:<10} "
    if kill is None:
        return f"{start}SURVIVED"
    example = ", ".join(map(described, kill.example))
    return f"{start}{kill.number:>3}  {example}"


def main() -> None:
    torch.set_num_threads(1)
    print(f"{'mutant':<40} {'law':<10} {'no.':>3}  example")
    for mutant in MUTANTS:
        began = time.perf_counter()
        line = row(mutant, hunt_mutant(mutant))
        print(f"{line}  [{time.perf_counter() - began:.1f} s]", flush=True)


if __name__ == "__main__":
    main()
