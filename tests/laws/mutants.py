# SPDX-License-Identifier: Apache-2.0
"""Wrong versions of the library, one patch each, and the law that sees through each.

``python -m tests.laws.mutants`` prints the table; ``test_mutants.py`` asserts it.
"""

import dataclasses
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

import zfunc as zf
from tests.laws import optim_patches as optims
from tests.laws import patches
from tests.laws import program_patches as programs
from tests.laws import test_keys as keys
from tests.laws import test_l1_commuting_square as l1
from tests.laws import test_l1_whole_leaf_optimizers as whole
from tests.laws import test_l2_placement as l2
from tests.laws import test_l3_stages as l3
from tests.laws import test_l4_transforms_commute as l4
from tests.laws import test_l5_accumulate as l5
from tests.laws import test_l6_resume as l6
from tests.laws import test_l7_donate as l7
from tests.laws import test_l10_round_trip as l10
from tests.laws import test_l11_moments as l11
from tests.laws import test_l15_jit as l15
from tests.laws import test_loss_scale as scale
from tests.laws import test_low_precision as low
from tests.laws import test_rounding as rounding
from tests.laws import test_same_bits as same
from tests.laws.cases import Case, cases, keyed_loss
from zfunc.core.tree import tree_map
from zfunc.testing import Recipe
from zfunc.testing.strategies import meshes


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
    "L1 lamb": Law("commuting square, LAMB", (whole.of("lamb"),), l1.check),
    "L1 muon": Law("commuting square, Muon", (whole.of("muon"),), l1.check),
    "L1 adafactor": Law(
        "commuting square, Adafactor", (whole.of("adafactor"),), l1.check
    ),
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
    "L7 shared": Law(
        "nothing written over", (cases(mesh_shapes=l7.ONE_RANK),), l7.check_shared
    ),
    "L7 dead": Law("donated is dead", (cases(mesh_shapes=l7.ONE_RANK),), l7.check_dead),
    "L7 jit": Law(
        "given to a program is dead",
        (cases(mesh_shapes=l7.ONE_RANK, num_steps=1), st.just(zf.jit)),
        l7.check_dead,
    ),
    "L7 jit bits": Law(
        "donating to a program changes no bit",
        (cases(mesh_shapes=l7.ONE_RANK, num_steps=2),),
        l7.check_clipped_twice,
    ),
    "L7 jit shared": Law(
        "a program writes nothing over that others see",
        (cases(mesh_shapes=l7.ONE_RANK, num_steps=2), st.just(zf.jit)),
        l7.check_shared,
    ),
    "L7 jit pure": Law(
        "a program that does not donate is pure",
        (cases(mesh_shapes=l7.ONE_RANK, num_steps=1),),
        l7.check_untouched,
    ),
    "L7 pure": Law("pure", (cases(num_steps=1),), l7.check_pure),
    "L10": Law("round trip", (cases().map(Case.shard),), l10.check_ranks),
    "L11": Law(
        "init commutes",
        (cases(num_steps=1),),
        lambda case: l11.check(case, case.recipe.tx()),
    ),
    "L11 adagrad": Law(
        "init commutes, Adagrad",
        (cases(num_steps=1, optimizer="adagrad"),),
        lambda case: l11.check(case, case.recipe.tx()),
    ),
    "L15": Law(
        "jit is the step",
        (
            cases(
                mesh_shapes=l15.ONE_RANK,
                num_steps=1,
                num_microbatches=st.integers(2, 3),
            ),
            l15.POLICIES,
        ),
        l15.check_here,
    ),
    "L15 ranks": Law(
        "passes change no bit",
        (
            cases(
                mesh_shapes=st.just({"data": 3}),
                zero=3,
                num_microbatches=1,
                num_steps=1,
                persistence_threshold=0,
            ),
        ),
        l15.check,
    ),
    "L15 gathers": Law(
        "regathered in the backward",
        (cases(zero=3, mesh_shapes=l15.RANKS, num_steps=1),),
        l15.check_regathered,
    ),
    "L15 scatters": Law(
        "reduced early",
        (cases(zero=2, mesh_shapes=l15.RANKS, num_steps=1),),
        l15.check_early,
    ),
    "L15 size": Law("size", (st.integers(0, 3),), l15.check_size),
    "keys": Law("keys", (cases(weighted=False), st.integers(0, 9)), keys.check),
    "fresh keys": Law(
        "a key per step and sample", (st.integers(0, 9),), keys.check_fresh
    ),
    "scale": Law(
        "a loss scale of a power of two is invisible",
        (cases(), scale.POWERS),
        scale.check_power,
    ),
    "overflow": Law(
        "a step that overflows is no step",
        (scale.SCALED_BATCHES, st.integers(0, 1)),
        scale.check_skipped,
    ),
    "same bits": Law(
        "the same bits on any number of ranks",
        (same.NAMES, same.STAGES, same.PLACES, same.DTYPES),
        same.check,
    ),
    "rounding": Law(
        "stochastic rounding on any mesh",
        (rounding.layouts(), meshes(), rounding.KEYS),
        rounding.check,
    ),
    "rounding groups": Law(
        "stochastic rounding in groups of leaves",
        (rounding.layouts(), rounding.KEYS),
        rounding.check_groups,
    ),
    "bf16": Law("low precision bound", (low.problems(),), low.check_compute),
}


class Mutant(NamedTuple):
    law: str
    patch: Callable[[pytest.MonkeyPatch], None]

    @property
    def name(self):
        return self.patch.__name__.replace("_", " ")


MUTANTS = (
    Mutant("L1", patches.tally_not_summed),
    Mutant("L1", patches.metrics_not_reduced),
    Mutant("L1 weights", patches.weight_forgotten),
    Mutant("L1", patches.local_norm_in_clip),
    Mutant("L1", patches.padded_at_the_head),
    Mutant("L1", patches.scaled_gradient),
    Mutant("L1", patches.stale_gather),
    Mutant("L1", patches.replicated_leaves_not_summed),
    Mutant("L1", patches.scatter_without_sum),
    Mutant("L1", patches.ranks_reversed_in_gather),
    Mutant("L1", patches.reduced_in_bfloat16),
    Mutant("L1", patches.gathered_in_float32),
    Mutant("L1 weights", patches.mean_of_means),
    Mutant("L1 remat", patches.remat_from_a_stale_input),
    Mutant("L1 lamb", patches.local_norms_in_lamb),
    Mutant("L1 muon", patches.pieces_orthogonalized_in_muon),
    Mutant("L1 adafactor", patches.padding_counted_in_adafactor),
    Mutant("L1 adafactor", patches.local_means_in_adafactor),
    Mutant("L2", patches.padded_with_ones),
    Mutant("L3", patches.stage_2_averages_and_multiplies_back),
    Mutant("L4", patches.accumulate_in_the_slot_of_partition),
    Mutant("L5", patches.last_microbatch_dropped),
    Mutant("L6", patches.keys_from_a_hidden_counter),
    Mutant("L7", patches.donation_forgets_the_last_group),
    Mutant("L7 shared", patches.donation_writes_in_place),
    Mutant("L7 dead", patches.donation_leaves_the_old_state_alive),
    Mutant("L7 pure", patches.pure_step_writes_in_place),
    Mutant("L10", patches.rank_is_identity),
    Mutant("L11", patches.moments_in_another_leaf_order),
    Mutant("L11 adagrad", optims.accumulator_starts_in_the_padding),
    Mutant("L7 jit", programs.jit_leaves_the_old_state_alive),
    Mutant("L7 jit bits", programs.written_over_while_in_use),
    Mutant("L7 jit shared", programs.written_over_while_others_look),
    Mutant("L7 jit pure", programs.written_over_undonated),
    Mutant("L15", programs.loop_drops_the_last_microbatch),
    Mutant("L15", programs.casts_taken_for_layouts),
    Mutant("L15 ranks", programs.released_before_the_last_use),
    Mutant("L15 ranks", programs.missing_wait),
    Mutant("L15 ranks", programs.regathered_from_a_stale_shard),
    Mutant("L15 ranks", programs.bucket_order_swapped_on_one_rank),
    Mutant("L15 ranks", programs.prefetch_on_one_rank_only),
    Mutant("L15 ranks", programs.scattered_before_the_last_summand),
    Mutant("L15 ranks", programs.ranks_added_up_in_reverse),
    Mutant("L15 gathers", programs.regather_merged_into_the_forward_gather),
    Mutant("L15 scatters", programs.reduced_at_the_end),
    Mutant("L15 size", programs.loop_unrolled),
    Mutant("keys", patches.no_rank_in_the_sample_index),
    Mutant("keys", patches.microbatch_samples_counted_from_0),
    Mutant("fresh keys", patches.one_key_for_all_steps),
    Mutant("scale", patches.scale_left_in_the_gradients),
    Mutant("overflow", patches.update_kept_after_an_overflow),
    Mutant("overflow", patches.overflow_judged_by_each_rank),
    Mutant("same bits", patches.ranks_added_up_in_a_chain),
    Mutant("same bits", patches.virtual_shards_added_up_in_a_chain),
    Mutant("same bits", patches.norm_by_pieces_in_a_deterministic_clip),
    Mutant("rounding", optims.random_bits_by_the_local_index),
    Mutant("rounding groups", optims.random_bits_by_the_place_of_a_leaf),
    Mutant("bf16", patches.update_rounded_to_bfloat16),
    Mutant("bf16", patches.loss_scaled_by_precision),
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
    if isinstance(value, Recipe):
        default = type(value)()
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
    start = f"{mutant.name:<40} {mutant.law:<13} "
    if kill is None:
        return f"{start}SURVIVED"
    example = ", ".join(map(described, kill.example))
    return f"{start}{kill.number:>3}  {example}"


def main() -> None:
    torch.set_num_threads(1)
    print(f"{'mutant':<40} {'law':<13} {'no.':>3}  example")
    for mutant in MUTANTS:
        began = time.process_time()
        line = row(mutant, hunt_mutant(mutant))
        print(f"{line}  [{time.process_time() - began:.1f} s]", flush=True)


if __name__ == "__main__":
    main()
