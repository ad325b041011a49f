# SPDX-License-Identifier: Apache-2.0
"""What is planned: a model, the ranks, and how each step is made."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass
from types import MappingProxyType
from typing import Final, Literal

from zfunc.plan.errors import PlanError
from zfunc.program.cost import DEVICES, Device

Precision = Literal["bf16", "fp32"]
_RANKS_OF_NODE: Final = 8
# Data sheets of DGX: a card of 400 Gb/s per H100, of 200 Gb/s per A100.
_ACROSS_NODES: Final = MappingProxyType({"h100": 50e9, "a100": 25e9})


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
      device: Whose rates the estimate of time takes: a name of ``cost.DEVICES``.
      wire_gb_per_s: What a rank sends, in 1e9 bytes; None: see ``rates``.

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
    wire_gb_per_s: float | None = None

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

    @property
    def rates(self) -> Device:
        """The rates of a rank: with more ranks than a node has, of its network card.

        Examples:
          >>> Request(model="tiny", ranks=64).rates.wire_bytes_per_s
          50000000000.0
        """
        device, across = DEVICES[self.device], _ACROSS_NODES.get(self.device)
        if self.wire_gb_per_s is not None:
            return dataclasses.replace(
                device, wire_bytes_per_s=1e9 * self.wire_gb_per_s
            )
        if across is not None and self.ranks > _RANKS_OF_NODE:
            return dataclasses.replace(device, wire_bytes_per_s=across)
        return device


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
    if asked.device not in DEVICES:
        yield f"--device {asked.device}: must be {', '.join(DEVICES)}"
    if asked.wire_gb_per_s is not None and not asked.wire_gb_per_s > 0:
        yield f"--wire-gb-per-s {asked.wire_gb_per_s}: must be positive"
    share = asked.ranks * asked.microbatches
    if asked.batch_size is not None and asked.batch_size % share:
        yield (
            f"--batch-size {asked.batch_size}: not a multiple of --ranks {asked.ranks} "
            f"x --microbatches {asked.microbatches}; type "
            f"{-(-asked.batch_size // share) * share}"
        )
