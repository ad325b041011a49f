# SPDX-License-Identifier: Apache-2.0
"""Who takes part, by name."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Literal, NamedTuple

from zfunc.bench import deepspeed_peer, ours, peers
from zfunc.bench.errors import BenchError
from zfunc.bench.presets import INSTALL
from zfunc.bench.setup import Setup, Step


class Contender(NamedTuple):
    """One way to train.

    Attributes:
      name: What ``--contenders`` takes.
      sharded: Whether it needs several ranks; the others run in one process.
      make: Builds its step, from the weights that all begin with.
      peers: The contenders that its time is divided by.
      counted: Whether its tensors can be counted on the CPU: code of inductor makes
        its buffers where a counter of operations does not see them.
    """

    name: str
    sharded: bool
    make: Callable[[Setup], Step]
    peers: tuple[str, ...] = ()
    counted: bool = True


def _sharded(name: str, make: Callable[..., Step], **how: int) -> Contender:
    return Contender(name, True, functools.partial(make, **how))


def _ours(zero: Literal[0, 1, 2, 3], *rivals: str) -> tuple[Contender, Contender]:
    """A stage of ZeRO, as ``zf.jit`` comes on the CPU, and compiled."""
    name, make = f"zfunc-{zero}", functools.partial(ours.sharded, zero=zero)
    replayed, compiled = (
        functools.partial(make, backend=backend) for backend in ("aten", "inductor")
    )
    return (
        Contender(name, True, replayed, rivals),
        Contender(f"{name}-inductor", True, compiled, rivals, counted=False),
    )


CONTENDERS = (
    *_ours(0, "ddp"),
    *_ours(1, "deepspeed-1", "ddp"),
    *_ours(2, "deepspeed-2", "ddp"),
    *_ours(3, "fsdp2", "deepspeed-3", "ddp"),
    _sharded("ddp", peers.ddp),
    _sharded("fsdp2", peers.fsdp2),
    _sharded("deepspeed-1", deepspeed_peer.deepspeed, stage=1),
    _sharded("deepspeed-2", deepspeed_peer.deepspeed, stage=2),
    _sharded("deepspeed-3", deepspeed_peer.deepspeed, stage=3),
    Contender(
        "zfunc-aten",
        False,
        functools.partial(ours.alone, backend="aten"),
        ("eager", "compile"),
    ),
    Contender(
        "zfunc-inductor",
        False,
        functools.partial(ours.alone, backend="inductor"),
        ("compile", "eager"),
        counted=False,
    ),
    Contender("eager", False, peers.eager),
    Contender("compile", False, peers.compiled, counted=False),
)


def available(nproc: int) -> tuple[Contender, ...]:
    """Those that run on a number of ranks, installed or not.

    Examples:
      >>> [contender.name for contender in available(1)]
      ['zfunc-aten', 'zfunc-inductor', 'eager', 'compile']
    """
    return tuple(c for c in CONTENDERS if c.sharded == (nproc > 1))


class Choice(NamedTuple):
    """Who takes part, and who was left out because it is not installed."""

    contenders: tuple[Contender, ...]
    left_out: tuple[str, ...]


def choose(
    names: Sequence[str] | None, nproc: int, *, has_deepspeed: bool | None = None
) -> Choice:
    """The contenders of a benchmark.

    Args:
      names: Which; None is all that run on so many ranks and are installed.
      nproc: Number of ranks.
      has_deepspeed: Whether DeepSpeed is installed; looked up if None.

    Raises:
      BenchError: An unknown name, one that needs another number of ranks, one that
        was given twice, one that is not installed, or none at all.

    Examples:
      >>> [c.name for c in choose(["zfunc-3", "fsdp2"], 2).contenders]
      ['zfunc-3', 'fsdp2']
      >>> choose(None, 2, has_deepspeed=False).left_out
      ('deepspeed-1', 'deepspeed-2', 'deepspeed-3')
    """
    if has_deepspeed is None:
        has_deepspeed = deepspeed_peer.is_installed()
    if names is None:
        everyone = available(nproc)
        missing = tuple(c for c in everyone if not has_deepspeed and _needs_extra(c))
        left = tuple(c for c in everyone if c not in missing)
        return Choice(left, tuple(c.name for c in missing))
    chosen = tuple(_named(name, nproc) for name in names)
    if not chosen or len({c.name for c in chosen}) < len(chosen):
        raise BenchError("give every contender once, as in zfunc-3,fsdp2")
    absent = [c.name for c in chosen if _needs_extra(c) and not has_deepspeed]
    if absent:
        raise BenchError(f"{absent[0]} needs DeepSpeed: {INSTALL}")
    return Choice(chosen, ())


def _named(name: str, nproc: int) -> Contender:
    fitting = available(nproc)
    for contender in fitting:
        if contender.name == name:
            return contender
    known = ", ".join(contender.name for contender in fitting)
    ranks = "one rank" if nproc == 1 else f"{nproc} ranks"
    if any(contender.name == name for contender in CONTENDERS):
        other = "--nproc 1" if nproc > 1 else "--nproc 2"
        raise BenchError(f"{name} needs {other}; on {ranks} there are {known}")
    raise BenchError(f"there is no {name!r}; on {ranks} there are {known}")


def _needs_extra(contender: Contender) -> bool:
    return contender.name.startswith("deepspeed")
