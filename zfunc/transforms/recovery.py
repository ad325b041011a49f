# SPDX-License-Identifier: Apache-2.0
"""What to do about losses that are not finite or jump: a fold that can go back."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Final, Literal, NamedTuple

import torch

from zfunc.core import collectives
from zfunc.core.errors import DonatedBufferError, RecoveryError
from zfunc.core.sharding import is_sharded
from zfunc.core.state import TrainState, check_usable
from zfunc.core.tree import PyTree, leaves_with_path, tree_leaves

Action = Literal["skip", "stop", "rollback"]
Step = Callable[[TrainState, PyTree], TrainState]
_ACTIONS = ("skip", "stop", "rollback")
_DONATES: Final = (
    "recovering: this step uses up the state that it is given, which a policy may have "
    "to go back to: type zf.jit(step, donate=False), or leave zf.donate out"
)


class Decision(NamedTuple):
    """What was done with a batch that was not trained on as usual, and why.

    Attributes:
      batch: Its number; the first that the run was given is 0.
      step: ``state.step`` before it.
      action: "skip" (no update), "rollback", or "pass" (left out after a rollback).
      reason: In words, with the loss and where it shows: leaf and ranks.

    Example:
      >>> Decision(7, 7, "skip", "the loss is nan").action
      'skip'
    """

    batch: int
    step: int
    action: Literal["skip", "rollback", "pass"]
    reason: str


class Snapshot(NamedTuple):
    """A state to go back to, and the losses up to it."""

    state: TrainState
    losses: tuple[float, ...]


class Run(NamedTuple):
    """A training that can go back: a value, which ``recovering`` maps to the next one.

    Attributes:
      state: Where the training is.
      past: What a rollback may go back to besides, oldest first.
      losses: The last losses that were neither skipped nor rolled back.
      num_batches: Batches that it was given.
      num_to_pass: Batches that are still left out.
      num_rollbacks: Rollbacks since the training got further than ever before.
      furthest: The largest ``state.step`` so far.
      decisions: All that was not usual, in order: goes into a checkpoint's ``meta``.

    Example:
      >>> import zfunc as zf
      >>> Run(zf.shard(torch.ones(1), zf.make_mesh({}))).decisions
      ()
    """

    state: TrainState
    past: tuple[Snapshot, ...] = ()
    losses: tuple[float, ...] = ()
    num_batches: int = 0
    num_to_pass: int = 0
    num_rollbacks: int = 0
    furthest: int = 0
    decisions: tuple[Decision, ...] = ()


@dataclass(frozen=True)
class Recovery:
    """A policy for losses and gradients that are not finite, and for jumps of the loss.

    Args:
      on_nonfinite: "skip" leaves the update out, "stop" raises, "rollback" goes back.
        (Overflows that a dynamic loss scale answers by a smaller one are skipped.)
      on_spike: The same for a loss that is further above the median of the last
        ``window`` losses than ``spike_factor - 1`` times that median's size.
      spike_factor: More than 1; given with ``on_spike``, or neither is.
      window: Losses that the median is of; there is none before so many.
      rollback_steps: How many steps a rollback undoes, k, the one with the bad loss
        included. k - 1 old states are kept in memory for it.
      skip_batches: How many batches are left out after it, m.
      max_rollbacks: Rollbacks without getting further; one more stops.

    Raises:
      TypeError, ValueError: A value of the wrong kind or out of its range.

    References:
      Chowdhery et al., `PaLM <https://arxiv.org/abs/2204.02311>`_, 2022, section 5.1:
      back by about 100 steps, 200 to 500 batches left out.

    Example:
      >>> Recovery(on_nonfinite="rollback", rollback_steps=2).skip_batches
      0
    """

    on_nonfinite: Action = "skip"
    on_spike: Action | None = None
    spike_factor: float | None = None
    window: int = 32
    rollback_steps: int = 1
    skip_batches: int = 0
    max_rollbacks: int = 3

    def __post_init__(self) -> None:
        given = ["on_nonfinite", *(["on_spike"] if self.on_spike is not None else [])]
        for name in given:
            if getattr(self, name) not in _ACTIONS:
                raise ValueError(
                    f"Recovery: {name} is {getattr(self, name)!r}, expected one of "
                    f"{', '.join(_ACTIONS)}"
                )
        if (self.on_spike is None) != (self.spike_factor is None):
            raise ValueError(
                "Recovery: on_spike and spike_factor belong together; type for example "
                "on_spike='rollback', spike_factor=2.0"
            )
        lowest = {"window": 1, "rollback_steps": 1, "skip_batches": 0}
        for name, low in {**lowest, "max_rollbacks": 0}.items():
            value = getattr(self, name)
            if type(value) is not int or value < low:
                raise ValueError(
                    f"Recovery: {name} is {value!r}, expected an int of at least {low}"
                )
        factor = self.spike_factor
        if factor is not None and not (
            isinstance(factor, int | float) and 1 < factor < math.inf
        ):
            raise ValueError(
                f"Recovery: spike_factor is {factor!r}, expected a number above 1, as "
                "in spike_factor=2.0, or None"
            )


def recovering(step: Step, policy: Recovery) -> Callable[[Run, PyTree], Run]:
    r"""A training step of runs, which skips, stops or goes back as the policy says.

    A fold: :math:`(r, b) \mapsto r'`, and all it decides by is in r and b, so that the
    same batches give the same decisions again. Ranks decide alike, since metrics are
    reduced. It reads the loss after every step, which waits for the device.

    A skipped batch counts as a step: parameters and moments stay, ``state.step`` goes
    on. After a rollback ``state.step`` is that of the old state; the batches that were
    trained on since do not come again, and the next m are left out.

    Args:
      step: A step or ``zf.jit(step, donate=False)``: it must leave old states usable.
      policy: What to do.

    Returns:
      The function of a ``Run`` and a batch; the first run is ``Run(state)``.

    Raises:
      TypeError: something that is not a step, a policy or (when called) a run.
      RecoveryError: (when called) the policy says stop; the message names the step, the
        loss, and the first leaf whose gradient is not finite with the ranks that hold
        it. The run that was given stays as it was.
      ValueError: a step that donates.

    Laws: decisions and states are functions of the first run and the batches; a policy
      that never has to act gives the states of ``step``, bitwise.

    Differs from DeepSpeed: it skips overflows, and leaves all else to the caller.

    Example:
      >>> import zfunc as zf
      >>> step = zf.train_step(lambda p, b: (p * b).sum(), zf.optim.sgd(0.1))
      >>> go_on = recovering(step, Recovery(on_nonfinite="skip"))
      >>> run = Run(zf.shard(torch.ones(1), zf.make_mesh({})))
      >>> for x in (1.0, torch.nan, 1.0):
      ...     run = go_on(run, torch.tensor([x]))
      >>> run.state.params.buffer, [d.action for d in run.decisions]
      (tensor([0.8000]), ['skip'])
    """
    if not callable(step) or isinstance(step, Recovery | type):
        raise TypeError(f"recovering: the first argument is a step, got {step!r}")
    if not isinstance(policy, Recovery):
        raise TypeError(f"recovering: policy is a zf.Recovery(...), got {policy!r}")
    if getattr(step, "_donate", False):
        raise ValueError(_DONATES)

    def go_on(run: Run, batch: PyTree) -> Run:
        if not isinstance(run, Run):
            raise TypeError(
                f"recovering: this step takes a run, got a {type(run).__name__}: type "
                "zf.Run(state)"
            )
        if run.num_to_pass:
            return _decided(run, "pass", "after a rollback")._replace(
                num_to_pass=run.num_to_pass - 1
            )
        after = step(run.state, batch)
        try:
            check_usable(run.state)
        except DonatedBufferError as error:
            raise ValueError(_DONATES) from error
        loss = float(after.metrics.loss)
        action, reason = _judged(run, after, loss, policy)
        if action == "stop":
            raise RecoveryError(f"step {int(run.state.step)}: {reason}")
        if action == "rollback":
            return _rolled_back(run, reason, policy)
        if action == "skip":
            stay = after  # a step that skips itself counts it
            if not int(after.metrics.skipped):
                stay = run.state.replace(step=run.state.step + 1)
            return _accepted(_decided(run, "skip", reason), stay, policy, run.losses)
        losses = (*run.losses, loss)[-policy.window :]
        counted = run._replace(num_batches=run.num_batches + 1)
        return _accepted(counted, after, policy, losses)

    return go_on


def _judged(
    run: Run, after: TrainState, loss: float, policy: Recovery
) -> tuple[Action | None, str]:
    norm = float(after.metrics.grad_norm)
    if int(after.metrics.skipped) and math.isfinite(loss) and _adapts(run.state, after):
        return "skip", f"the gradients overflowed{_where(after)}"
    if not (math.isfinite(loss) and math.isfinite(norm)):
        reason = f"the loss is {loss}, the gradient's norm {norm}{_where(after)}"
        return policy.on_nonfinite, reason
    if policy.spike_factor is None or len(run.losses) < policy.window:
        return None, ""
    median = statistics.median(run.losses)
    if loss - median <= (policy.spike_factor - 1) * abs(median):
        return None, ""
    return policy.on_spike, (
        f"the loss is {loss:.6g}, more than {policy.spike_factor:g} times the median "
        f"{median:.6g} of the last {len(run.losses)}"
    )


def _adapts(before: TrainState, after: TrainState) -> bool:
    """Whether the loss scale of a step that overflowed came closer to a smaller one."""
    now = after.loss_scale
    if before.loss_scale is None:  # its first step: a dynamic rule has a hysteresis
        return int(now.hysteresis) > 0
    then = before.loss_scale
    is_smaller = bool(now.scale < then.scale)
    return is_smaller or 0 < int(now.hysteresis) < int(then.hysteresis)


def _decided(run: Run, action: Any, reason: str) -> Run:
    made = Decision(run.num_batches, int(run.state.step), action, reason)
    return run._replace(
        num_batches=run.num_batches + 1, decisions=(*run.decisions, made)
    )


def _accepted(
    run: Run, state: TrainState, policy: Recovery, losses: tuple[float, ...]
) -> Run:
    """The run at its next state, the old one among those to go back to."""
    step, before = int(state.step), run.losses
    past: tuple[Snapshot, ...] = ()
    if "rollback" in (policy.on_nonfinite, policy.on_spike):
        snapshots = (*run.past, Snapshot(run.state, before))
        past = snapshots[max(len(snapshots) + 1 - policy.rollback_steps, 0) :]
    if step > run.furthest:
        run = run._replace(furthest=step, num_rollbacks=0)
    return run._replace(state=state, past=past, losses=losses)


def _rolled_back(run: Run, reason: str, policy: Recovery) -> Run:
    if run.num_rollbacks >= policy.max_rollbacks:
        raise RecoveryError(
            f"step {int(run.state.step)}: {reason}; went back {run.num_rollbacks} "
            "times without getting any further"
        )
    snapshots = (*run.past, Snapshot(run.state, run.losses))
    kept = max(len(snapshots) - policy.rollback_steps, 0)
    state, losses = snapshots[kept]
    run = _decided(run, "rollback", f"{reason}; back to step {int(state.step)}")
    return run._replace(
        state=state,
        past=snapshots[:kept],
        losses=losses,
        num_to_pass=policy.skip_batches,
        num_rollbacks=run.num_rollbacks + 1,
    )


def _where(state: TrainState) -> str:
    """The first leaf whose gradient is not finite, and the ranks that hold it."""
    leaves = leaves_with_path(state.grads, is_sharded)
    buffers = [leaf.buffer if is_sharded(leaf) else leaf for _, leaf in leaves]
    bad = torch.stack([~x.isfinite().all() for x in buffers]).to(torch.int64)
    rows = bad.unsqueeze(0)
    first = tree_leaves(state.grads, is_sharded)[0]
    if is_sharded(first):
        for axis, n in reversed(first.sharding.mesh.axes):
            if n > 1:
                rows = collectives.all_gather(rows, axis, first.sharding.mesh)
    found = rows.any(0).nonzero().flatten().tolist()
    if not found:
        return ""
    ranks = rows[:, found[0]].nonzero().flatten().tolist()
    more = f" and {len(found) - 1} other leaves" if len(found) > 1 else ""
    path = f"grads[{leaves[found[0]][0]!r}]"
    return f"; {path}{more} not finite on rank {_listed(ranks)}"


def _listed(ranks: list[int]) -> str:
    shown = ", ".join(map(str, ranks[:8]))
    return shown + (", ..." if len(ranks) > 8 else "")
