# SPDX-License-Identifier: Apache-2.0
"""``precision``: the grammar of policies, and the dtype of everything in a step."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import zfunc as zf
from tests.unit.core.common import (
    F64,
    STAGES,
    alone,
    assert_bitwise,
    example_batch,
    example_params,
    on_mesh,
    randn,
    reference,
)

BF16, F32 = torch.bfloat16, torch.float32
NAMES = {"bf16": BF16, "f32": F32, "f64": F64}
ALIASES = {
    "bf16": BF16,
    "bfloat16": BF16,
    "f32": F32,
    "fp32": F32,
    "float32": F32,
    "f64": F64,
    "fp64": F64,
    "float64": F64,
}
POLICIES = st.builds(
    zf.Policy,
    st.sampled_from(list(NAMES.values())),
    st.sampled_from(list(NAMES.values())),
)


def loss(params, batch):
    y = torch.tanh(batch["x"] @ params["w"] + params["b"])
    return (y - batch["y"]).square().mean() + 0.1 * params["v"].square().mean()


def narrow(tree, dtype):
    return zf.tree_map(lambda x: x.to(dtype) if x.is_floating_point() else x, tree)


# --- the grammar --------------------------------------------------------------


@given(POLICIES)
def test_text_and_policy_are_inverse(policy):
    assert zf.Policy.parse(str(policy)) == policy
    assert str(zf.Policy.parse(str(policy))) == str(policy)


@given(
    st.sampled_from(sorted(ALIASES)), st.sampled_from(sorted(ALIASES)), st.booleans()
)
def test_every_spelling(compute, output, swapped):
    parts = [f"compute={compute}", f"output={output}"]
    text = ", ".join(reversed(parts) if swapped else parts)
    assert zf.Policy.parse(text) == zf.Policy(ALIASES[compute], ALIASES[output])
    assert zf.Policy.parse(compute) == zf.Policy(ALIASES[compute])


@given(st.text(max_size=12))
def test_any_other_text_is_refused(text):
    if text in ALIASES:
        return
    with pytest.raises(ValueError, match="precision: "):
        zf.Policy.parse(text)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("fp8", "DTYPE one of bf16, fp16, f32, f64"),
        ("compute=f8", "cannot read 'compute=f8'"),
        ("compute=bf16,compute=f32", "cannot read 'compute=f32'"),
        ("output=f32", "names no compute dtype"),
        ("params=bf16,compute=bf16", r"zf.shard\(params, mesh, dtype=...\)"),
        ("compute=bf16,grads=f32", "cannot read 'grads=f32'"),
        ("", "cannot read"),
        ("compute=bf16,", "cannot read ''"),
    ],
)
def test_messages(text, message):
    with pytest.raises(ValueError, match=message):
        zf.precision(text)


@pytest.mark.parametrize(
    "dtype", [torch.float8_e5m2, torch.int32, torch.float8_e4m3fn, "bf16"]
)
def test_a_policy_of_other_dtypes(dtype):
    with pytest.raises(ValueError, match="must be one of bf16, fp16, f32, f64"):
        zf.Policy(dtype)
    with pytest.raises(ValueError, match="must be one of bf16, fp16, f32, f64"):
        zf.Policy(BF16, dtype)


@pytest.mark.parametrize("policy", [BF16, None, 16, ("bf16",)])
def test_something_that_is_no_policy(policy):
    with pytest.raises(TypeError, match="takes a string or a Policy"):
        zf.precision(policy)


def test_a_policy_is_frozen_and_a_string_is_one():
    with pytest.raises(AttributeError):
        zf.Policy(BF16).compute = F32
    step = zf.train_step(loss, zf.optim.sgd(0.1), zf.precision(zf.Policy(BF16)))
    assert "compute=bf16,output=f32" in repr(step)


def test_a_step_has_one_precision():
    """The second would decide nothing: the innermost cast wins."""
    with pytest.raises((TypeError, ValueError), match="precision"):
        zf.train_step(
            loss, zf.optim.sgd(0.1), zf.precision("bf16"), zf.precision("fp32")
        )


# --- what the loss sees -------------------------------------------------------


@pytest.mark.parametrize("ranks", [1, 2])
@pytest.mark.parametrize("zero", [None, *STAGES])
@pytest.mark.parametrize("name", NAMES)
def test_the_loss_computes_in_the_compute_dtype(name, zero, ranks):
    seen = {}

    def looking(params, batch):
        seen.update({f"params/{k}": x.dtype for k, x in params.items()})
        seen.update({f"batch/{k}": getattr(x, "dtype", x) for k, x in batch.items()})
        seen["result"] = (batch["x"] @ params["w"]).dtype
        return loss(params, batch)

    batch = {**example_batch(), "mask": torch.ones(6, dtype=torch.bool)}
    policy = zf.precision(name)
    if zero is None:
        state = reference(looking, example_params(), batch, policy)
    else:
        state = on_mesh(
            looking, example_params(), batch, policy, zero=zero, ranks=ranks
        )
    dtype = NAMES[name]
    assert seen.pop("batch/index") == torch.int64
    assert seen.pop("batch/mask") == torch.bool
    assert set(seen.values()) == {dtype}
    assert {g.dtype for g in state.grads.values()} == {F64}
    assert {p.dtype for p in state.params.values()} == {F64}


@pytest.mark.parametrize("storage", [BF16, F32, F64])
@pytest.mark.parametrize("name", NAMES)
def test_gradients_have_the_storage_dtype(name, storage):
    params = narrow(example_params(), storage)
    state = reference(loss, params, example_batch(), zf.precision(name))
    assert {g.dtype for g in state.grads.values()} == {storage}


@pytest.mark.parametrize("zero", STAGES)
def test_bfloat16_is_close_to_float64(zero):
    """|error| <= c u |g| with u = 2^-8 and c the few roundings on the way to each g."""
    want = reference(loss, example_params(), example_batch())
    got = on_mesh(
        loss,
        example_params(),
        example_batch(),
        zf.precision("bf16"),
        zero=zero,
        ranks=2,
    )
    for k, g in want.grads.items():
        error = (got.grads[k] - g).norm() / g.norm()
        assert 0 < error < 16 * 2**-8
    assert abs(got.metrics.loss - want.metrics.loss) < 16 * 2**-8 * want.metrics.loss


def test_it_is_the_cast_program():
    """precision(p) of a loss is the loss of cast arguments, to the last bit."""

    def cast(params, batch):
        return loss(narrow(params, BF16), narrow(batch, BF16))

    want = reference(cast, example_params(), example_batch())
    got = reference(loss, example_params(), example_batch(), zf.precision("bf16"))
    assert_bitwise(got.grads, want.grads)
    assert_bitwise(got.metrics.loss, want.metrics.loss)


@pytest.mark.parametrize("zero", [1, 2, 3])
def test_the_stages_agree_bitwise(zero):
    want = on_mesh(
        loss, example_params(), example_batch(), zf.precision("bf16"), zero=1, ranks=2
    )
    got = on_mesh(
        loss,
        example_params(),
        example_batch(),
        zf.precision("bf16"),
        zero=zero,
        ranks=2,
    )
    assert_bitwise(got.grads, want.grads)


def test_fp32_of_a_float32_state_changes_nothing():
    params, batch = narrow(example_params(), F32), narrow(example_batch(), F32)
    assert_bitwise(
        reference(loss, params, batch, zf.precision("fp32")),
        reference(loss, params, batch),
    )


# --- what comes out -----------------------------------------------------------


@pytest.mark.parametrize("output", NAMES)
def test_the_loss_is_rounded_to_the_output_dtype(output):
    policy = zf.precision(f"compute=f64,output={output}")
    got = reference(loss, example_params(), example_batch(), policy).metrics.loss
    want = reference(loss, example_params(), example_batch()).metrics.loss
    assert got == want.to(NAMES[output])


@pytest.mark.parametrize("count", [1, 300, 600])
def test_weights_are_not_rounded(count):
    """bfloat16 counts up to 256."""
    policy = zf.precision("compute=f32,output=bf16")
    step = zf.train_step(
        lambda p, b: zf.Mean((p * b).sum(), b.sum()),
        zf.optim.sgd(1.0),
        policy,
        zf.accumulate(count),
    )
    state = step(zf.shard(torch.ones(()), alone()), torch.ones(600))
    assert state.grads.buffer == 1.0


def test_aux_keeps_its_own_precision():
    def with_aux(params, batch):
        return loss(params, batch), {"count": zf.Mean(torch.tensor(1001.0), 1)}

    state = reference(with_aux, example_params(), example_batch(), zf.precision("bf16"))
    assert state.metrics.aux["count"] == 1001.0


def test_a_master_weight_takes_steps_that_bfloat16_cannot():
    """The state is the master copy: updates far below bfloat16's resolution count."""
    step = zf.train_step(
        lambda p, b: (p * b).sum(), zf.optim.sgd(1e-4), zf.precision("bf16")
    )
    state = zf.shard(torch.ones(1), alone())
    for _ in range(10):
        state = step(state, torch.ones(1))
    torch.testing.assert_close(state.params.buffer, torch.tensor([0.999]))


@pytest.mark.parametrize("transforms", ["pa", "ap", "pz", "zp", "paz", "zap"])
def test_the_order_of_transformations_does_not_matter(transforms):
    made = {
        "p": zf.precision("bf16"),
        "a": zf.accumulate(3),
        "z": zf.partition(zero=3),
    }
    mesh = zf.make_mesh({"data": 1})
    params, batch = {"w": randn(5, 4)}, {"x": randn(6, 5, seed=1)}

    def run(order):
        step = zf.train_step(
            lambda p, b: (b["x"] @ p["w"]).square().mean(),
            zf.optim.sgd(0.1),
            *[made[letter] for letter in order],
        )
        where = mesh if "z" in order else alone()
        return zf.unshard(step(zf.shard(params, where), batch))

    assert_bitwise(run(transforms), run("".join(sorted(transforms))))
