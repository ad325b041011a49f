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
      lr: From the number of updates to the learning rate of the next; None where the
        optimizer that was given knows it alone.
      spec: For ``shard``.
      storage: The dtype of the state; None keeps each parameter's.
      compute: What frozen parameters are cast to; None casts none.
      drop_last: Whether the data loader drops a last batch that is not full.
      has_scheduler: Whether the configuration has a section ``scheduler``.
    """

    tx: Any
    transforms: tuple[Transform, ...]
    zero: int
    accumulation: int
    micro_batch: int
    lr: Callable[[int], float] | None
    spec: Any = None
    storage: torch.dtype | None = None
    compute: torch.dtype | None = None
    drop_last: bool = False
    has_scheduler: bool = False
