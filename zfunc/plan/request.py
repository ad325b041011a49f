# SPDX-License-Identifier: Apache-2.0
"""What is planned: a model, the ranks, and how each step is made."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

from zfunc.plan.errors import PlanError

Precision = Literal["bf16", "fp32"]


@dataclass(frozen=True, kw_only=True)
class Request:
    """One configuration, but for the stage.

    Args:
      model: A preset's name or ``your.module:function``.
      ranks: Size of the mesh axis "data".
      precision: Arithmetic of the loss; parameters and moments are stored in fp32.
      reduce: What gradient reductions send.
      seq_len: Tokens per sample.
      batch_size: Samples per step over all ranks; None: one per rank and microbatch.
      microbatches: Parts in which each rank computes its batch.
      remat: Whether each block is recomputed in the backward.
      layers: Number of repeated layers; None: the model's own.
      device: Whose arithmetic and bandwidth the estimate of time takes.

    Raises:
      PlanError: Something that cannot be planned; the message says what to type.

    Examples:
      >>> Request(model="tiny", ranks=8, microbatches=2).samples_per_rank
      2
      >>> Request(model="tiny", ranks=8, batch_size=12)
      Traceback (most recent call last):
      zfunc.plan.errors.PlanError: --batch-size 12: not a multiple of --ranks 8 x ...
    """

    model: str
    ranks: int
    precision: Precision = "bf16"
    reduce: Precision = "fp32"
    seq_len: int = 1024
    batch_size: int | None = None
    microbatches: int = 1
    remat: bool = False
    layers: int | None = None
    device: str = "h100"

    def __post_init__(self) -> None:
        for problem in _problems(self):
            raise PlanError(problem)

    @property
    def samples(self) -> int:
        """Samples per step, over all ranks."""
        return self.batch_size or self.ranks * self.microbatches

    @property
    def samples_per_rank(self) -> int:
        """Samples that one rank computes in a step."""
        return self.samples // self.ranks


def _problems(asked: Request) -> Iterator[str]:
    counts = {
        "--ranks": asked.ranks,
        "--seq-len": asked.seq_len,
        "--batch-size": asked.batch_size,
        "--microbatches": asked.microbatches,
        "--layers": asked.layers,
    }
    for option, value in counts.items():
        if value is not None and value < 1:
            yield f"{option} {value}: must be at least 1"
    for option, text in (("--precision", asked.precision), ("--reduce", asked.reduce)):
        if text not in ("bf16", "fp32"):
            yield f"{option} {text}: must be bf16 or fp32"
    share = asked.ranks * asked.microbatches
    if asked.batch_size is not None and asked.batch_size % share:
        yield (
            f"--batch-size {asked.batch_size}: not a multiple of --ranks {asked.ranks} "
            f"x --microbatches {asked.microbatches}; type "
            f"{-(-asked.batch_size // share) * share}"
        )
