# SPDX-License-Identifier: Apache-2.0
"""The laws of one schedule at a time: L1 at every stage, L2, L6 and L11, in float64.

(What a checkpoint holds of a schedule is a count, whichever it is: see L13.)
"""

import functools

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import zfunc as zf
from tests.laws import test_l11_moments as l11
from tests.laws.cases import assert_bitwise, cases, examples
from zfunc.core.tree import tree_flatten, tree_leaves, tree_structure, tree_unflatten
from zfunc.testing import simulate

o = zf.optim
CYCLE = o.one_cycle(0.01, 0.1, cycle_first_step_size=2)
SCHEDULES = {
    "constant": o.constant(0.1),
    "warmup_linear": o.warmup_linear(0.1, 2, 4),
    "warmup_cosine": o.warmup_cosine(0.1, 2, 4),
    "cosine": o.cosine(0.1, 4),
    "wsd": o.wsd(0.1, 1, 2, 4),
    "warmup_lr": o.warmup_lr(0.01, 0.1, warmup_num_steps=3),
    "warmup_lr linear": o.warmup_lr(0.01, 0.1, 3, warmup_type="linear"),
    "warmup_decay_lr": o.warmup_decay_lr(4, 0.01, 0.1, warmup_num_steps=2),
    "warmup_cosine_lr": o.warmup_cosine_lr(0.1, 4, 0.1, warmup_num_steps=2),
    "one_cycle": CYCLE.learning_rate,
    "lr_range_test": o.lr_range_test(0.01, 2, 2.0),
    "lr_range_test staircase": o.lr_range_test(0.01, 2, 2.0, True),
    "join": o.join([o.constant(0.1), o.cosine(0.1, 3)], [1]),
    "scaled": o.scaled(o.warmup_linear(0.1, 1, 4), 0.5),
}
OPTIMIZERS = {
    "sgd": functools.partial(o.sgd, momentum=CYCLE.momentum),
    "adamw": functools.partial(o.adamw, b1=CYCLE.momentum),
}
every_schedule = pytest.mark.parametrize("name", SCHEDULES)
STEPS = 4


def folded(case, tx, batches=None, state=None):
    """The state on the simulated mesh."""
    sim = simulate(case.recipe.step()._replace(tx=tx), case.mesh_shape)
    start = case.shard(tx=tx) if state is None else state
    return functools.reduce(sim, case.split() if batches is None else batches, start)


def unsharded(case, tx):
    state = zf.shard(case.params, zf.make_mesh({}), tx=tx)
    step = case.recipe.reference()._replace(tx=tx)
    return zf.unshard(functools.reduce(step, case.batches, state))


@every_schedule
@examples(0.02)
@given(data=st.data(), zero=st.integers(0, 3), kind=st.sampled_from(sorted(OPTIMIZERS)))
def test_sharded_training_is_unsharded_training(name, data, zero, kind):
    case = data.draw(cases(zero=zero, clip=None, num_steps=STEPS))
    tx = OPTIMIZERS[kind](SCHEDULES[name])
    end = folded(case, tx)
    assert tree_structure(end.params) == tree_structure(case.shard(tx=tx).params)
    got, want = case.unshard(end), unsharded(case, tx)
    for field in ("params", "grads", "moments"):
        pairs = zip(
            tree_leaves(getattr(got, field)),
            tree_leaves(getattr(want, field)),
            strict=True,
        )
        for a, b in pairs:
            torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9)


@every_schedule
@examples(0.01)
@given(data=st.data(), cut=st.integers(0, STEPS))
def test_resuming_is_not_stopping(name, data, cut):
    case = data.draw(cases(clip=None, num_steps=STEPS))
    tx, batches = OPTIMIZERS["adamw"](SCHEDULES[name]), case.split()
    leaves, spec = tree_flatten(folded(case, tx, batches[:cut]))
    copy = tree_unflatten(spec, [leaf.clone() for leaf in leaves])
    assert_bitwise(folded(case, tx, batches[cut:], copy), folded(case, tx), "resumed")
    l11.check(case, tx)
