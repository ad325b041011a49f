# SPDX-License-Identifier: Apache-2.0
"""What an engine needs of a configuration."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch

from zfunc.core.step import Transform


class Setting(NamedTuple):
    """What an engine needs of a configuration.

    Attributes:
      tx: The optimizer, clipping included.
      transforms: Partition and precision; microbatches come one by one.
      zero: The stage.
      accumulation: Microbatches per update.
      micro_batch: Samples per rank and microbatch.
      lr: From the number of updates to the learning rate of the next.
      storage: The dtype of the state.
      compute: The dtype of the forward; None for the state's.
    """

    tx: Any
    transforms: tuple[Transform, ...]
    zero: int
    accumulation: int
    micro_batch: int
    lr: Callable[[int], float]
    storage: torch.dtype = torch.float32
    compute: torch.dtype | None = None
