# SPDX-License-Identifier: Apache-2.0
"""The closing table says what was measured."""

import io
import math

import torch
from rich.console import Console

import zfunc as zf
from zfunc.cli.metrics import Row
from zfunc.cli.plot import plot_loss
from zfunc.cli.report import (
    Bytes,
    Summary,
    closing_table,
    final_train_loss,
    mean_tokens_per_s,
    measured_bytes,
)


def summary(**changes):
    part = Bytes(per_rank=500_000, unsharded=2_000_000)
    figures = {
        "ranks": 4,
        "zero": 3,
        "precision": "fp32",
        "steps": 100,
        "num_params": 500_000,
        "params": part,
        "grads": part,
        "moments": Bytes(per_rank=1_000_000, unsharded=4_000_000),
        "peak_rss_mb": 432.1,
        "train_loss": 1.6976,
        "validation_loss": 1.741,
        "unigram_entropy": 3.2364,
        "tokens": 204_800,
        "tokens_per_s": 9039.4,
        "compared_steps": 3,
        "loss_difference": 4.8e-7,
        "gradient_difference": 6.1e-7,
        "params_sha256": "0123456789abcdef" * 4,
    }
    return Summary.model_validate({**figures, **changes})


def shown(what):
    console = Console(file=io.StringIO(), width=100)
    console.print(closing_table(what))
    return console.file.getvalue()


def line(text, start):
    (found,) = [each for each in text.splitlines() if start in each]
    return found


def test_sizes_are_per_rank_and_unsharded():
    text = shown(summary())
    assert "state on 4 ranks, ZeRO 3" in text
    assert line(text, "params ").split("│")[2:5] == [
        "        0.50 ",
        "         2.00 ",
        " 0.250 ",
    ]
    assert line(text, "all three").split("│")[2].strip() == "2.00"
    assert line(text, "all three").split("│")[3].strip() == "8.00"


def test_losses_are_beside_the_entropy():
    text = shown(summary())
    assert "1.6976 nats/byte" in line(text, "train loss, mean of the last 20 steps")
    assert "1.7410 nats/byte" in line(text, "validation loss")
    assert "3.2364 nats/byte" in line(text, "byte-unigram entropy")
    assert "9,039" in line(text, "tokens/s")
    assert "432 MB" in line(text, "peak RSS")


def test_the_comparison_is_shown_if_there_was_one():
    text = shown(summary())
    assert "4.8e-07" in line(text, "difference from 3 steps unsharded in float32: loss")
    assert "6.1e-07" in line(text, "and gradients")
    assert "unsharded in" not in shown(summary(compared_steps=0))


def test_replicated_state_is_called_so():
    assert "state on 1 rank, replicated" in shown(summary(zero=0, ranks=1))


def test_bytes_are_those_of_the_buffers():
    # On three ranks a dim of 4 is padded to 6: the buffers are what is counted.
    mesh = zf.AbstractMesh({"data": 3})
    params = zf.abstract({"w": torch.ones(4, 2), "scale": torch.ones(())})
    state = zf.shard(params, mesh, tx=zf.optim.adamw(1e-3))
    assert measured_bytes(state.params) == Bytes(per_rank=20, unsharded=36)
    moments = measured_bytes(state.moments)
    assert moments.unsharded - 2 * 36 == moments.per_rank - 2 * 20


def rows(losses):
    return [
        Row(i, x, 1.0, 1e-3, 64 * i, 10.0, 2.0 * i, 1.0, 0)
        for i, x in enumerate(losses, 1)
    ]


def test_the_final_loss_is_a_mean():
    assert final_train_loss(rows([9.0] * 5 + [1.0, 3.0] * 10)) == 2.0
    assert final_train_loss(rows([4.0])) == 4.0
    assert math.isnan(final_train_loss([]))


def test_tokens_per_s_is_of_the_whole_run():
    assert mean_tokens_per_s(rows([1.0, 1.0])) == 32.0
    assert math.isnan(mean_tokens_per_s([]))


def test_the_plot_is_a_png(tmp_path):
    plot_loss(tmp_path / "loss.png", rows([3.0, 2.0]), 3.2)
    assert (tmp_path / "loss.png").read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
    assert [path.name for path in tmp_path.iterdir()] == ["loss.png"]
