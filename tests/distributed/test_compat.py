# SPDX-License-Identifier: Apache-2.0
"""The bridge on two gloo ranks: one process's numbers, at every stage."""

import difflib
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import nn

import zfunc as zf
from tests.unit.compat import cases, trainers

pytestmark = pytest.mark.distributed
SCRIPTS = Path(__file__).parent / "scripts"


def by_rank(module, x, y, rank):
    """A loss that ranks weigh differently: its factor must not meet a sum of ranks."""
    return cases.default_loss(module, x, y, rank) * (1 + 2 * rank)


def on_one_rank(module, x, y, rank):
    """A loss that needs the logits on the second rank alone."""
    out = module(x, y)
    return out["loss"] + 0.3 * rank * out["logits"].square().mean() * (rank > 0)


def run(kind, zero, accumulation, clip, loss_of):
    engine = cases.engine_of(
        cases.made(kind), zero=zero, accumulation=accumulation, clip=clip
    )
    losses = cases.engine_run(engine, 3, loss_of)
    return losses, dict(engine.module.named_parameters()), engine.get_global_grad_norm()


@pytest.mark.parametrize("zero", [0, 1, 2, 3])
@pytest.mark.parametrize(
    ("kind", "accumulation", "clip", "loss_of"),
    [
        (cases.Net, 2, 0.05, None),
        (cases.WithLoss, 1, None, by_rank),
        (cases.WithLoss, 2, None, on_one_rank),
    ],
)
def test_two_ranks_are_one_process(ranks, zero, kind, accumulation, clip, loss_of):
    answers = ranks(2).run(run, kind, zero, accumulation, clip, loss_of)
    want, module = cases.torch_run(kind, 3, accumulation, 2, clip, loss_of)
    (losses, params, norm), (_, others, other_norm) = answers
    assert losses == pytest.approx(want, abs=2e-6)
    assert norm == other_norm
    for name, value in module.named_parameters():
        torch.testing.assert_close(params[name], value, rtol=0, atol=2e-6)
        assert torch.equal(params[name], others[name])


def overflowing(zero):
    """Rank 1 overflows at the second step; both skip it."""
    rule = zf.DynamicLossScale(initial_scale_power=8, hysteresis=1)
    policy = zf.precision("fp16", loss_scale=rule)
    engine = cases.engine_of(
        cases.made(), zero=zero, transforms=(policy,), compute=torch.float16
    )
    scales = []
    for i in range(3):
        x, y = cases.batch(i, dist.get_rank())
        loss = nn.functional.cross_entropy(engine(x).float(), y)
        engine.backward(loss * 1e9 if (i, dist.get_rank()) == (1, 1) else loss)
        engine.step()
        scales.append((engine.cur_scale, engine.skipped_steps))
    return scales, [p.detach() for p in engine.module.parameters()]


@pytest.mark.parametrize("zero", [0, 3])
def test_an_overflow_on_one_rank_is_skipped_on_both(ranks, zero):
    (scales, params), (other_scales, others) = ranks(2).run(overflowing, zero)
    assert scales == other_scales == [(256.0, 0), (128.0, 1), (128.0, 1)]
    for a, b in zip(params, others, strict=True):
        assert torch.equal(a, b)
        assert a.isfinite().all()


def twice(loss_of):
    """Rank 1 overflows at two steps in a row; hysteresis forgives the first."""
    rule = zf.DynamicLossScale(initial_scale_power=8, hysteresis=2)
    policy = zf.precision("fp16", loss_scale=rule)
    engine = cases.engine_of(
        cases.made(cases.WithLoss), zero=2, transforms=(policy,), compute=torch.float16
    )
    said = []
    for i in range(4):
        loss = loss_of(engine, *cases.batch(i, dist.get_rank()), dist.get_rank())
        engine.backward(loss * 1e9 if i in (1, 2) and dist.get_rank() else loss)
        engine.step()
        said.append((engine.cur_scale, engine.skipped_steps))
    return said, [p.detach() for p in engine.module.parameters()]


@pytest.mark.parametrize("loss_of", [cases.default_loss, on_one_rank])
def test_hysteresis_is_that_of_all_ranks(ranks, loss_of):
    (said, params), (other, others) = ranks(2).run(twice, loss_of)
    assert said == other == [(256.0, 0), (256.0, 1), (128.0, 2), (128.0, 2)]
    for a, b in zip(params, others, strict=True):
        assert torch.equal(a, b)
        assert a.isfinite().all()


def unequal_seeds(zero):
    torch.manual_seed(dist.get_rank())
    module = cases.Net()
    module.shift.normal_()
    engine = cases.engine_of(module, zero=zero)
    out = engine.eval()(cases.batch(0)[0])
    return [out, *(x.detach() for x in engine.module.state_dict().values())]


def test_ranks_begin_with_the_values_of_the_first(ranks):
    mine, others = ranks(2).run(unequal_seeds, 3)
    torch.manual_seed(0)
    module = cases.Net()
    module.shift.normal_()
    want = [module.eval()(cases.batch(0)[0]), *module.state_dict().values()]
    for a, b, c in zip(mine, others, want, strict=True):
        assert torch.equal(a, b)
        assert torch.equal(a, c)


def saving(folder, zero):
    engine = cases.engine_of(cases.made(), zero=zero)
    if zero == 3:
        cases.engine_run(engine, 2)
        engine.save_checkpoint(folder, client_state={"seen": 24})
        engine.save_16bit_model(folder)
        return None
    _, client_state = engine.load_checkpoint(folder)
    return client_state, [p.detach() for p in engine.module.parameters()]


def test_a_checkpoint_of_stage_3_goes_on_at_stage_1(ranks, tmp_path):
    ranks(2).run(saving, tmp_path, 3)
    (client_state, params), _ = ranks(2).run(saving, tmp_path, 1)
    assert client_state == {"seen": 24}
    _, module = cases.torch_run(cases.Net, 2, world=2)
    for a, b in zip(params, module.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=2e-6)
    assert (tmp_path / "pytorch_model.bin").is_file()
    alone = cases.engine_of(cases.made(), zero=2)  # and on one rank
    assert alone.load_checkpoint(tmp_path)[1] == {"seen": 24}
    for a, b in zip(alone.module.parameters(), params, strict=True):
        assert torch.equal(a, b)


def trained(folder, kind, stage):
    import transformers

    transformers.utils.logging.set_verbosity_error()
    if kind == "ours":
        trainer = trainers.ours(folder, trainers.config(stage), max_steps=4)
    else:
        trainer = trainers.theirs(folder, max_steps=4)
    trainer.train()
    loss = trainer.evaluate()["eval_loss"]
    trainer.save_model(folder)
    return trainers.logged(trainer), loss


def test_the_trainer_is_that_of_transformers_on_two_ranks(ranks, tmp_path):
    [(mine, loss), _] = ranks(2).run(trained, tmp_path / "ours", "ours", 3)
    [(plain, expected), _] = ranks(2).run(trained, tmp_path / "theirs", "theirs", 0)
    assert len(mine) == 4
    assert mine == [pytest.approx(row, rel=1e-5, abs=1e-6) for row in plain]
    assert loss == pytest.approx(expected, rel=1e-5)
    assert (tmp_path / "ours" / "model.safetensors").is_file()


def test_a_script_changes_two_lines():
    before, after = (
        (SCRIPTS / name).read_text("utf-8").splitlines()
        for name in ("simple_deepspeed.py", "simple_zfunc.py")
    )
    changed = [
        line for line in difflib.ndiff(before, after) if line.startswith(("+ ", "- "))
    ]
    assert sum(line.startswith("+ ") for line in changed) == 2
    assert sum(line.startswith("- ") for line in changed) == 2


def test_the_script_learns_in_fp16_at_stage_2():
    done = subprocess.run(
        [
            *(sys.executable, "-m", "torch.distributed.run", "--standalone"),
            *("--nproc-per-node", "2", SCRIPTS / "simple_zfunc.py"),
        ],
        env={**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    losses = [float(x) for x in re.findall(r"loss ([\d.]+)", done.stdout)]
    assert len(losses) == 6
    assert losses[-1] < 0.1 * losses[0]
