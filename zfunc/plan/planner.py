# SPDX-License-Identifier: Apache-2.0
"""``plan``: what the stages of ZeRO need on every rank, from their traced programs."""

from __future__ import annotations

import functools
import logging
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Final, NamedTuple

from zfunc.core.tree import tree_leaves
from zfunc.plan.errors import PlanError
from zfunc.plan.models import Model, load
from zfunc.plan.recording import MANY_OPERANDS, Token, record
from zfunc.plan.request import Request
from zfunc.plan.scaling import scaled
from zfunc.plan.states import ModelStates, model_states
from zfunc.plan.totals import Peak, Seconds, comm_rows, peak_of, seconds_of
from zfunc.plan.tracing import Zero, lower, passes_of
from zfunc.program.comm import CommRow

logger = logging.getLogger("zfunc.plan")

# A first and a last layer.
_LEAST_DEPTH: Final = 2
STAGES: Final[tuple[Zero, ...]] = (0, 1, 2, 3)


@dataclass(frozen=True)
class Stage:
    """What one stage of ZeRO needs on one rank.

    Args:
      zero: The stage.
      num_params: Parameters of the whole model (elements).
      states: Model states, in bytes.
      peak: The most bytes that are alive at once, and when.
      comm: Messages by collective and dtype, as ``Program.comm_analysis`` has them.
      flops: Operations of matrix products and attention in a step.
      moved_bytes: Read from memory and written to it in a step.
      seconds: Estimated times on the request's device.
      traced: The numbers of layers that were traced; empty for a model without layers.
      tokens: The program, moment by moment.
    """

    zero: Zero
    num_params: int
    states: ModelStates
    peak: Peak
    comm: tuple[CommRow, ...]
    flops: int
    moved_bytes: int
    seconds: Seconds
    traced: tuple[int, ...]
    tokens: tuple[Token, ...]

    @property
    def peak_bytes(self) -> int:
        """The most bytes that are alive at once."""
        return self.peak.bytes.total

    @property
    def peak_at(self) -> str:
        """What is computed at the peak, for people."""
        return self.tokens[self.peak.place].key

    @property
    def sent_bytes(self) -> int:
        """Bytes that a rank sends in a step."""
        return sum(row.sent_bytes for row in self.comm)

    @property
    def wire_elements(self) -> int:
        r"""Elements of full tensors on the wire: :math:`2 \Psi` at stages 0 to 2.

        An all-reduce counts twice. A rank sends (n - 1) / n of them.
        """
        passes = {"all_reduce": 2}
        return sum(
            passes.get(row.kind, 1) * row.payload_bytes // itemsize(row.dtype)
            for row in self.comm
        )


class _Traced(NamedTuple):
    tokens: list[Token]
    states: ModelStates
    num_params: int


def itemsize(dtype: str) -> int:
    """Bytes of an element of a dtype by its short name.

    Example:
      >>> itemsize("bf16"), itemsize("f32")
      (2, 4)
    """
    return math.ceil(int("".join(c for c in dtype if c.isdigit())) / 8)


def plan(
    request: Request, zero: Zero, *, late: bool = False, check: bool = True
) -> Stage:
    """What a stage needs on one rank.

    Args:
      request: Model, ranks, sizes and precision.
      zero: The stage.
      late: Reduce gradients after the backward, as the ZeRO paper's stage 1 does.
      check: Trace a third depth, and if it is not what the first two say, the whole
        model, however long that takes.

    Raises:
      PlanError: There is no such model, or ``request.remat`` of one whose function does
        not take it.
    """
    model = load(request.model, request.layers)
    if request.remat and not model.takes_remat:
        raise PlanError(
            f"--remat: {model.name} takes no parameter remat; give its function one, "
            "and transform its block with it"
        )
    traced = functools.cache(lambda depth: _trace(model, request, zero, late, depth))
    depth = model.depth
    if depth is None:
        return _stage(zero, traced(depth), request, ())
    first = _first_depth(model, request.seq_len, depth)
    depths = tuple(range(first, first + 2 + check))
    if depth > depths[-1]:
        found = _scaled(traced, depths, depth)
        if found is not None:
            return _stage(zero, found, request, depths)
        logger.warning("%s does not repeat layer by layer: traced whole", model.name)
    return _stage(zero, traced(depth), request, (depth,))


def _first_depth(model: Model, seq_len: int, depth: int) -> int:
    """The least number of layers of which a call about all parameters is known."""
    depths = range(_LEAST_DEPTH, depth)
    counts = ((d, tree_leaves(model.build(d, seq_len, None).params)) for d in depths)
    return next((d for d, leaves in counts if len(leaves) > MANY_OPERANDS), depth)


def _scaled(
    traced: Callable[[int], _Traced], depths: tuple[int, ...], depth: int
) -> _Traced | None:
    """The model at ``depth``, from two depths; None if one more, or it, is not so."""
    first, *third = depths[0], *depths[2:]
    short, long = traced(first), traced(first + 1)
    try:
        if any(_at_depth(short, long, first, d) != traced(d) for d in third):
            return None
        return _at_depth(short, long, first, depth)
    except PlanError:
        return None


def _at_depth(short: _Traced, long: _Traced, first: int, depth: int) -> _Traced:
    """The model at ``depth``, from those with ``first`` layers and with one more."""
    more = depth - first - 1
    return _Traced(
        scaled(short.tokens, long.tokens, (first, first + 1), depth),
        short.states.scaled(long.states, more),
        long.num_params + more * (long.num_params - short.num_params),
    )


def _trace(
    model: Model, request: Request, zero: Zero, late: bool, depth: int | None
) -> _Traced:
    found = lower(model, request, zero, depth, chosen=passes_of(late=late))
    params = model.build(depth, request.seq_len, None).params
    num_params = sum(leaf.numel() for leaf in tree_leaves(params))
    # What waits is read before updates are batched, which moves calls about.
    return _Traced(record(found.program), model_states(found.unbatched), num_params)


def _stage(
    zero: Zero, found: _Traced, request: Request, traced: tuple[int, ...]
) -> Stage:
    tokens = found.tokens
    return Stage(
        zero=zero,
        num_params=found.num_params,
        states=found.states,
        peak=peak_of(tokens),
        comm=comm_rows(tokens),
        flops=sum(token.times * token.flops for token in tokens),
        moved_bytes=sum(token.times * token.moved_bytes for token in tokens),
        seconds=seconds_of(tokens, request.rates),
        traced=traced,
        tokens=tuple(tokens),
    )
