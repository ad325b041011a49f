# SPDX-License-Identifier: Apache-2.0
"""The three batch sizes, of which one or two are enough."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from zfunc.config.checking import Checked
from zfunc.config.errors import Problem
from zfunc.config.keys_training import BATCH

_TRAIN, _MICRO, _STEPS = BATCH


@dataclass(frozen=True)
class DataOptions:
    """What a data loader has to know.

    Attributes:
      train_batch_size: Samples of one update, over all ranks.
      micro_batch_size: Samples of one microbatch on one rank.
      accumulation_steps: Microbatches of one update.
      world: Data-parallel ranks.
      drop_last: Whether a last batch that is not full is dropped.
      seed: Of the order; 0 is that of torch's DistributedSampler, as in DeepSpeed.

    Examples:
      >>> DataOptions(16, 4, 2, 2).batch_size
      8
    """

    train_batch_size: int
    micro_batch_size: int
    accumulation_steps: int
    world: int
    drop_last: bool = False
    seed: int = 0

    @property
    def batch_size(self) -> int:
        """Samples that a step is given on each rank."""
        return self.micro_batch_size * self.accumulation_steps


def batch_sizes(checked: Checked, world: int, problems: list[Problem]) -> DataOptions:
    """The triple, with what is missing inferred as DeepSpeed does.

    Args:
      checked: The configuration.
      world: Data-parallel ranks.
      problems: Gets those of the triple.
    """
    sizes: list[Any] = [checked.values.get(path) for path in BATCH]
    train, micro, steps = sizes
    if {problem.path for problem in checked.problems} & set(BATCH):
        return DataOptions(world, 1, 1, world)
    if _undecided(checked, problems):
        return DataOptions(world, 1, 1, world)
    if train is None:
        steps = steps or 1
        train = micro * steps * world
    elif micro is None:
        steps = steps or 1
        _divide(
            _TRAIN, train, f"{_STEPS} {steps} x {world} ranks", steps * world, problems
        )
        micro = train // (steps * world)
    elif steps is None:
        _divide(
            _TRAIN, train, f"{_MICRO} {micro} x {world} ranks", micro * world, problems
        )
        steps = train // (micro * world)
    elif train != micro * steps * world:
        product = micro * steps * world
        problems.append(
            Problem(
                _TRAIN,
                str(train),
                f"{product} = {_MICRO} {micro} x {_STEPS} {steps} x {world} ranks",
                f'type "{_TRAIN}": {product}, or delete one of the three',
            )
        )
    drop_last = checked.values.get("dataloader_drop_last", False)
    return DataOptions(train, micro or 1, steps or 1, world, drop_last)


def _undecided(checked: Checked, problems: list[Problem]) -> bool:
    """Whether the triple cannot be inferred; then it is a problem."""
    known = [path for path in BATCH if path in checked.values]
    autos = [path for path in BATCH if path in checked.autos]
    enough = len(known) == 2 or len(known) == 3
    if enough or (not autos and known and known != [_STEPS]):
        return False
    if autos:
        values = ", ".join(f'"{path}": ...' for path in autos)
        expected = "a number, which nobody gave"
        instead = (
            f"type auto={{{values}}} (two are enough; in a shell --auto "
            f"{autos[0]}=32), or numbers in the file"
        )
        problems += [Problem(path, '"auto"', expected, instead) for path in autos]
    else:
        problems.append(
            Problem(_MICRO, "nothing", "an integer, 1 or more", f'type "{_MICRO}": 8')
        )
    return True


def _divide(
    path: str, total: int, parts: str, size: int, problems: list[Problem]
) -> None:
    if total % size:
        problems.append(
            Problem(
                path,
                str(total),
                f"a multiple of {size} = {parts}",
                f'type "{path}": {-(-total // size) * size}',
            )
        )


def check_world(world: Any) -> int:
    """The number of data-parallel ranks.

    Raises:
      TypeError: Not an int.
      ValueError: Less than 1.

    Examples:
      >>> check_world(4)
      4
    """
    return check_count("world", world, "the number of data-parallel ranks", 2)


def check_count(name: str, value: Any, what: str, example: int) -> int:
    """An argument that counts something.

    Args:
      name: Of the argument.
      value: Its value.
      what: What it counts.
      example: A value that could be typed instead.

    Raises:
      TypeError: Not an int.
      ValueError: Less than 1.

    Examples:
      >>> check_count("total_steps", 7, "a number of updates", 1000)
      7
    """
    instead = f"type for example {name}={example}"
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(
            f"from_ds_config: {name} is a {type(value).__name__}, expected {what}; "
            f"{instead}"
        )
    if value < 1:
        raise ValueError(
            f"from_ds_config: {name} is {value}, expected an int >= 1; {instead}"
        )
    return value
