# SPDX-License-Identifier: Apache-2.0
"""What every contender is given alike: weights, ranks, device and optimizer."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch

from zfunc.bench.presets import Preset, llama

# From the token ids of this rank to a loss: of this rank, or the mean over all.
Step = Callable[[torch.Tensor], torch.Tensor]


class AdamW(NamedTuple):
    """The hyper-parameters of every contender's optimizer."""

    lr: float = 1e-3
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8
    weight_decay: float = 0.01


class Setup(NamedTuple):
    """Where and on what a contender trains.

    Attributes:
      preset: The model's sizes.
      world: Number of ranks.
      device: Of this rank.
      adamw: Hyper-parameters.
    """

    preset: Preset
    world: int
    device: torch.device
    adamw: AdamW = AdamW()

    def model(self) -> Any:
        """A new model with the weights that all contenders begin with."""
        return llama(self.preset, self.device)

    def optimizer(self, model: Any) -> torch.optim.AdamW:
        """The fused AdamW of torch over a model's parameters."""
        return torch.optim.AdamW(model.parameters(), **self.adamw._asdict(), fused=True)
