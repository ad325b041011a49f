# SPDX-License-Identifier: Apache-2.0
"""The closing table: what was trained, how well, in how much memory."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from pydantic import BaseModel, ConfigDict
from rich.console import Group, RenderableType
from rich.table import Table

import zfunc as zf
from zfunc.cli.metrics import Row
from zfunc.core.sharding import is_sharded

LAST_STEPS = 20


class Bytes(BaseModel):
    """The size of a part of the state: one rank's buffers, and whole tensors."""

    model_config = ConfigDict(frozen=True)

    per_rank: int
    unsharded: int


class Summary(BaseModel):
    """The figures of a finished run; ``summary.json`` in its directory."""

    model_config = ConfigDict(frozen=True)

    ranks: int
    zero: int
    precision: str
    steps: int
    num_params: int
    params: Bytes
    grads: Bytes
    moments: Bytes
    peak_rss_mb: float
    train_loss: float
    validation_loss: float
    unigram_entropy: float
    tokens: int
    tokens_per_s: float
    compared_steps: int
    loss_difference: float
    gradient_difference: float
    params_sha256: str

    @property
    def state(self) -> Bytes:
        """All three parts together."""
        parts = (self.params, self.grads, self.moments)
        return Bytes(
            per_rank=sum(part.per_rank for part in parts),
            unsharded=sum(part.unsharded for part in parts),
        )


def measured_bytes(tree: Any) -> Bytes:
    """The size of a tree of placed tensors, from its buffers.

    Examples:
      >>> import torch
      >>> state = zf.shard({"w": torch.ones(3)}, zf.make_mesh({"data": 1}))
      >>> measured_bytes(state.params)
      Bytes(per_rank=12, unsharded=12)
    """
    per_rank = unsharded = 0
    for leaf in zf.tree_leaves(tree, is_sharded):
        buffer = leaf.buffer if is_sharded(leaf) else leaf
        shape = leaf.global_shape if is_sharded(leaf) else buffer.shape
        per_rank += buffer.numel() * buffer.element_size()
        unsharded += math.prod(shape) * buffer.element_size()
    return Bytes(per_rank=per_rank, unsharded=unsharded)


def final_train_loss(rows: Sequence[Row]) -> float:
    """The mean over the last 20 steps: one batch alone is noisy."""
    last = [row.loss for row in rows[-LAST_STEPS:]]
    return math.fsum(last) / len(last) if last else math.nan


def mean_tokens_per_s(rows: Sequence[Row]) -> float:
    """Over all of the training, checkpoints included."""
    if not rows or rows[-1].elapsed_s <= 0:
        return math.nan
    return rows[-1].tokens / rows[-1].elapsed_s


def closing_table(summary: Summary) -> RenderableType:
    """The summary for people."""
    return Group(_memory_table(summary), _figures(summary))


def _memory_table(summary: Summary) -> Table:
    kind = f"ZeRO {summary.zero}" if summary.zero else "replicated"
    ranks = f"{summary.ranks} rank{'s' * (summary.ranks > 1)}"
    table = Table()
    table.add_column(f"state on {ranks}, {kind}")
    for name in ("MB per rank", "MB unsharded", "ratio"):
        table.add_column(name, justify="right")
    for name in ("params", "grads", "moments", "state"):
        part = getattr(summary, name)
        ratio = part.per_rank / part.unsharded if part.unsharded else math.nan
        table.add_row(
            "all three" if name == "state" else name,
            f"{part.per_rank / 1e6:.2f}",
            f"{part.unsharded / 1e6:.2f}",
            f"{ratio:.3f}",
            style="bold" if name == "state" else None,
        )
    return table


def _figures(summary: Summary) -> Table:
    table = Table(show_header=False)
    table.add_column()
    table.add_column(justify="right")
    last = _steps(min(LAST_STEPS, summary.steps))
    rows = [
        (f"train loss, mean of the last {last}", _nats(summary.train_loss)),
        ("validation loss", _nats(summary.validation_loss)),
        ("byte-unigram entropy of the corpus", _nats(summary.unigram_entropy)),
        ("tokens/s, all ranks", f"{summary.tokens_per_s:,.0f}"),
        ("peak RSS per rank", f"{summary.peak_rss_mb:,.0f} MB"),
    ]
    if summary.compared_steps:
        first = f"{_steps(summary.compared_steps)} unsharded in float32"
        rows += [
            (
                f"largest difference from {first}: loss",
                f"{summary.loss_difference:.1e}",
            ),
            ("    and gradients, relative", f"{summary.gradient_difference:.1e}"),
        ]
    rows.append(("sha256 of the parameters", f"{summary.params_sha256[:16]}..."))
    for name, value in rows:
        table.add_row(name, value)
    return table


def _steps(count: int) -> str:
    return f"{count} step{'s' * (count != 1)}"


def _nats(value: float) -> str:
    return f"{value:.4f} nats/byte"
