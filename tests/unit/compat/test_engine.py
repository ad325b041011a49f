# SPDX-License-Identifier: Apache-2.0
"""The engine in one process: the numbers of a torch loop, and what it refuses."""

import pytest
import torch
from torch import nn

import zfunc as zf
from tests.unit.compat.cases import (
    Net,
    WithLoss,
    batch,
    default_loss,
    engine_of,
    engine_run,
    made,
    torch_run,
)
from zfunc.compat import CompatError


def assert_same(engine, module):
    want = module.state_dict()
    got = engine.module.state_dict()
    assert got.keys() == want.keys()
    for name, value in want.items():
        torch.testing.assert_close(got[name], value, rtol=0, atol=1e-6, msg=name)


@pytest.mark.parametrize("kind", [Net, WithLoss])
@pytest.mark.parametrize(
    ("zero", "accumulation", "clip"), [(0, 1, None), (3, 3, 0.05), (2, 2, None)]
)
def test_equal_to_a_torch_loop(kind, zero, accumulation, clip):
    engine = engine_of(made(kind), zero=zero, accumulation=accumulation, clip=clip)
    losses = engine_run(engine, 4)
    want, module = torch_run(kind, 4, accumulation, clip=clip)
    assert losses == pytest.approx(want, abs=1e-6)
    assert_same(engine, module)
    assert engine.global_steps == 4
    assert engine.micro_steps == 4 * accumulation


def halved(module, x, y, rank):
    return default_loss(module, x, y, rank) * 0.5


def with_a_penalty(module, x, y, rank):
    out = module(x, y)
    return out["loss"] + 0.1 * out["logits"].square().mean()


def in_place(module, x, y, rank):
    loss = module(x, y)["loss"]
    loss /= 4
    return loss


@pytest.mark.parametrize("loss_of", [halved, with_a_penalty, in_place])
def test_the_scripts_own_arithmetic_counts(loss_of):
    engine = engine_of(made(WithLoss), zero=1)
    # AdamW hides a factor: with a clip in between it shows.
    losses = engine_run(engine, 3, loss_of)
    want, module = torch_run(WithLoss, 3, loss_of=loss_of)
    assert losses == pytest.approx(want, abs=1e-6)
    assert_same(engine, module)


def test_the_gradient_has_the_factor():
    engine = engine_of(made(WithLoss))
    norms = []
    for factor in (1.0, 0.5):
        torch.manual_seed(0)
        engine = engine_of(made(WithLoss))
        engine.backward(factor * engine(*batch(0))["loss"])
        engine.step()
        norms.append(engine.get_global_grad_norm())
    assert norms[1] == pytest.approx(norms[0] / 2)


def test_without_the_division_by_the_microbatches():
    norms = []
    for scaled in (True, False):
        engine = engine_of(made(WithLoss), accumulation=2)
        for i in range(2):
            torch.manual_seed(i)
            loss = engine(*batch(i))["loss"]
            engine.backward(loss, scale_wrt_gas=scaled)
            engine.step()
        norms.append(engine.get_global_grad_norm())
    assert norms[1] == pytest.approx(2 * norms[0])


def test_the_tied_and_the_frozen_stay_so():
    engine = engine_of(made(), zero=3)
    engine_run(engine, 2)
    module = engine.module
    assert module.twice.weight is module.again.weight
    assert torch.equal(module.last.bias, made().last.bias)
    assert not module.last.bias.requires_grad


def test_evaluation_computes_no_gradient_and_forgets_nothing():
    engine = engine_of(made(), zero=3)
    x, y = batch(0)
    assert not engine.eval()(x).requires_grad
    engine.train()
    with torch.no_grad():
        assert not engine(x).requires_grad
    loss = nn.functional.cross_entropy(engine(x), y)
    engine.eval()(x)
    engine.train().backward(loss)
    engine.step()
    torch.testing.assert_close(engine.eval()(x), engine.module.eval()(x))


def test_the_first_form_of_a_call_is_remembered():
    """A module that returns outputs runs twice per microbatch, three times once."""
    calls = []

    class Counting(Net):
        def forward(self, x):
            calls.append(1)
            return super().forward(x)

    engine = engine_of(made(Counting))
    engine_run(engine, 3)
    assert len(calls) == 3 + 2 + 2


def test_a_loss_runs_once_per_microbatch():
    calls = []

    class Counting(WithLoss):
        def forward(self, x, y):
            calls.append(1)
            return super().forward(x, y)

    engine_run(engine_of(made(Counting)), 3)
    assert len(calls) == 3


def refused(match):
    return pytest.raises(CompatError, match=match)


def test_a_backward_without_its_forward():
    engine = engine_of(made(WithLoss))
    loss = engine(*batch(0))["loss"]
    newer = engine(*batch(1))["loss"]
    with refused(r"depends on a tensor of shape \(\) that requires grad"):
        engine.backward(loss)
    with refused("does not depend on what the engine returned"):
        engine.backward(newer.detach())
    with refused(r"takes a scalar loss, got \(6, 3\)"):
        engine.backward(engine(*batch(1))["logits"])
    engine.backward(engine(*batch(1))["loss"])
    with refused("called twice: call engine.step"):
        engine.backward(newer)
    engine.step()
    with refused("before a forward"):
        engine.backward(newer)
    with refused("without a backward"):
        engine.step()
    with torch.no_grad():
        evaluated = engine(*batch(1))["loss"]
    with refused("before a forward"):
        engine.backward(evaluated)


def test_a_loss_that_needs_a_parameter_is_refused():
    engine = engine_of(made(WithLoss))
    loss = engine(*batch(0))["loss"]
    penalty = sum(p.square().sum() for p in engine.module.parameters())
    with refused("its gradient would be lost"):
        engine.backward(loss + 1e-3 * penalty)


def test_the_module_that_was_given_says_where_its_parameters_are():
    module = made()
    engine_of(module)
    for use in (lambda: module(batch(0)[0]), module.state_dict):
        with refused("its parameters live in the engine now"):
            use()


def test_modules_that_no_pure_function_is():
    with refused(r"model.1 is a BatchNorm1d that writes running statistics"):
        engine_of(nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2)))
    with refused("model is a function, expected a torch.nn.Module"):
        engine_of(lambda x: x)
    with refused("no parameter that requires grad"):
        engine_of(nn.Linear(2, 2).requires_grad_(False))
    with refused("returned a int in which there is no floating tensor"):

        class Counter(nn.Linear):
            def forward(self, x):
                return len(x)

        engine_of(Counter(2, 2))(torch.ones(3, 2))


def test_a_step_that_overflows_is_skipped():
    rule = zf.DynamicLossScale(initial_scale_power=8, hysteresis=1)
    policy = zf.precision("fp16", loss_scale=rule)
    engine = engine_of(made(), transforms=(policy,), compute=torch.float16)
    x, y = batch(0)
    before = engine.module.state_dict()
    engine.backward(nn.functional.cross_entropy(engine(x).float() * 1e6, y) * 1e6)
    engine.step()
    assert (engine.global_steps, engine.skipped_steps) == (1, 1)
    after = engine.module.state_dict()
    assert all(torch.equal(before[name], x) for name, x in after.items())
    engine_run(engine, 3)
    assert (engine.global_steps, engine.skipped_steps) == (4, 1)
    assert engine.cur_scale == 2.0**7


def test_fp16_learns_and_its_outputs_are_half():
    policy = zf.precision("fp16", loss_scale=2.0**8)
    engine = engine_of(made(), zero=2, transforms=(policy,), compute=torch.float16)
    assert engine(batch(0)[0]).dtype == torch.float16
    losses = [engine_run(engine, 1)[0] for _ in range(30)]
    want, _ = torch_run(Net, 1)
    assert losses[0] == pytest.approx(want[0], rel=2e-3)
    assert losses[-1] < 0.8 * losses[0]


@pytest.mark.parametrize(
    ("kind", "loss_of"),
    [(Net, default_loss), (WithLoss, default_loss), (WithLoss, with_a_penalty)],
)
def test_gradients_are_scaled_once_and_unscaled_once(kind, loss_of):
    norms = []
    half = (zf.precision("fp16", loss_scale=2.0**8),)
    for transforms, compute in ((half, torch.float16), ((), None)):
        engine = engine_of(made(kind), transforms=transforms, compute=compute)
        engine_run(engine, 1, loss_of)
        norms.append(engine.get_global_grad_norm())
    assert norms[0] == pytest.approx(norms[1], rel=5e-3)


def tiny(module, x, y, rank):
    """A loss whose gradient by the outputs has no number in float16."""
    return nn.functional.cross_entropy(module(x).float(), y) * 1e-9


def test_the_scale_is_there_before_the_first_half():
    policy = zf.precision("fp16", loss_scale=2.0**24)
    engine = engine_of(made(), transforms=(policy,), compute=torch.float16)
    engine_run(engine, 1, tiny)
    plain = engine_of(made())
    engine_run(plain, 1, tiny)
    want = plain.get_global_grad_norm()
    assert engine.get_global_grad_norm() == pytest.approx(want, rel=2e-2)


def test_a_checkpoint_continues_bitwise(tmp_path):
    engine = engine_of(made(), zero=3, accumulation=2)
    engine_run(engine, 2)
    with pytest.warns(UserWarning, match="there is no .*latest"):
        assert engine.load_checkpoint(tmp_path) == (None, None)
    assert engine.save_checkpoint(tmp_path, client_state={"epoch": 3})
    assert (tmp_path / "latest").read_text() == "global_step2"
    engine_run(engine, 2)
    other = engine_of(made(), zero=1, accumulation=2)
    path, client_state = other.load_checkpoint(tmp_path)
    assert path == str(tmp_path / "global_step2" / "step-00000002")
    assert client_state == {"epoch": 3}
    assert (other.global_steps, other.micro_steps) == (2, 4)
    engine_run(other, 2)
    for a, b in zip(
        zf.tree_leaves(engine.state), zf.tree_leaves(other.state), strict=True
    ):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-7)


def test_a_tag_that_is_used_again_holds_the_newest(tmp_path):
    engine = engine_of(made())
    for _ in range(2):
        engine_run(engine, 1)
        engine.save_checkpoint(tmp_path, tag="best", save_latest=False)
    assert [p.name for p in (tmp_path / "best").iterdir()] == ["step-00000002"]
    assert engine.save_checkpoint(tmp_path, tag="best", save_latest=False)  # once more
    assert [p.name for p in tmp_path.iterdir()] == ["best"]
    assert not (tmp_path / "latest").exists()
    fresh = engine_of(made())
    fresh.load_checkpoint(tmp_path, "best", load_module_only=True)
    assert fresh.global_steps == 0
    assert_same(fresh, engine.module)


@pytest.mark.parametrize("name", ["notes.txt", "mp_rank_00_model_states.pt"])
def test_a_folder_with_other_things_in_it_is_kept(tmp_path, name):
    engine = engine_of(made())
    (tmp_path / "best").mkdir()
    (tmp_path / "best" / name).write_text("mine")
    with pytest.raises(CompatError, match=name):
        engine.save_checkpoint(tmp_path, tag="best")
    assert (tmp_path / "best" / name).read_text() == "mine"
    assert not (tmp_path / "latest").exists()


def test_checkpoints_that_are_refused(tmp_path):
    engine = engine_of(made(), accumulation=2)
    loss = default_loss(engine, *batch(0), 0)
    engine.backward(loss)
    with refused("amid a step of 2, whose gradients would be lost"):
        engine.save_checkpoint(tmp_path)
    engine.step()
    with refused("1 microbatches so far"):
        engine.zero_grad()
    engine.backward(default_loss(engine, *batch(1), 0))
    engine.step()
    engine.zero_grad()
    for tag in ("a/b", "..", "latest", ""):
        with refused("is not a name of a folder"):
            engine.save_checkpoint(tmp_path, tag)
    engine.save_checkpoint(tmp_path)
    module = made()
    module.shift += 1
    with refused("other frozen parameters or buffers"):
        engine_of(module, accumulation=2).load_checkpoint(tmp_path)
    theirs = tmp_path / "global_step9"
    theirs.mkdir()
    (theirs / "zero_pp_rank_0_mp_rank_00_optim_states.pt").touch()
    with refused("is a checkpoint of DeepSpeed .*zero_to_fp32.py"):
        engine.load_checkpoint(tmp_path, "global_step9")


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.safetensors"])
def test_save_16bit_model(tmp_path, name):
    engine = engine_of(
        made(), transforms=(zf.precision("bf16"),), compute=torch.bfloat16
    )
    engine.save_16bit_model(tmp_path, name)
    if name.endswith(".bin"):
        found = torch.load(tmp_path / name)
    else:
        from safetensors.torch import load_file

        found = load_file(tmp_path / name)
    assert {x.dtype for x in found.values()} == {torch.bfloat16}
    assert found.keys() == made().state_dict().keys()


def test_what_it_says():
    engine = engine_of(made(), accumulation=2, zero=2)
    assert engine.get_lr() == [1e-2]
    assert engine.get_global_grad_norm() is None
    assert engine.cur_scale == engine.loss_scale == 1.0
    assert engine.train_micro_batch_size_per_gpu() == 6
    assert engine.train_batch_size() == 12
    assert engine.zero_optimization_stage() == 2
    assert engine.device == torch.device("cpu")
    assert not engine.is_gradient_accumulation_boundary()
