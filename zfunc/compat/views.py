# SPDX-License-Identifier: Apache-2.0
"""What ``initialize`` returns beside the engine, to read from."""

from __future__ import annotations

from typing import Any, NoReturn

from zfunc.compat.engine import Engine
from zfunc.compat.errors import CompatError
from zfunc.compat.missing import ReadOnly


class OptimizerView:
    """The optimizer of an engine, to read from; ``engine.step()`` steps it."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine

    @property
    def param_groups(self) -> list[dict[str, Any]]:
        """One group with the learning rate of the next update."""
        return [ReadOnly(lr=rate) for rate in self._engine.get_lr()]

    @property
    def cur_scale(self) -> float:
        """The loss scale; 1 where there is none."""
        return self._engine.cur_scale

    loss_scale = cur_scale

    @property
    def overflow(self) -> bool:
        """Whether the last update was left out."""
        return bool(self._engine.state.metrics.skipped)

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Nothing, between steps; see ``Engine.zero_grad``."""
        self._engine.zero_grad()

    def step(self) -> NoReturn:
        """Refused: the engine does it."""
        raise CompatError("optimizer.step(): call engine.step(), which steps it")


class SchedulerView:
    """The schedule of an engine, to read from; ``engine.step()`` advances it."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine

    def get_last_lr(self) -> list[float]:
        """The learning rate of the next update."""
        return self._engine.get_lr()

    get_lr = get_last_lr

    def step(self) -> NoReturn:
        """Refused: the engine does it."""
        raise CompatError("lr_scheduler.step(): call engine.step(), which advances it")
