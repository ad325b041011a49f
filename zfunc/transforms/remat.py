# SPDX-License-Identifier: Apache-2.0
"""``remat``: keep a block's inputs instead of its activations, and recompute.

``torch.utils.checkpoint`` rests on saved-tensor hooks, which torch.func refuses. This
is an ``autograd.Function`` whose backward runs the block again under vjp.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import torch
from torch._C._functorch import (
    _grad_decrement_nesting,
    _grad_increment_nesting,
    _unwrap_for_grad,
    is_functorch_wrapped_tensor,
    maybe_current_level,
    maybe_get_level,
    unwrap_if_dead,
)
from torch.overrides import TorchFunctionMode

from zfunc.core.errors import RematError
from zfunc.core.tree import tree_flatten, tree_leaves, tree_unflatten
from zfunc.transforms.gathered import GatherOnUse, close_up, open_up

F = TypeVar("F", bound=Callable[..., Any])


class _Guard(TorchFunctionMode):
    """Raises when the block uses a tensor that is differentiated and not passed in."""

    def __init__(self, call: _Call, inputs: Sequence[Any], level: int) -> None:
        super().__init__()
        self.call, self.level = call, level
        self.passed = {id(x) for x in inputs}

    def __torch_function__(
        self, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        for leaf in tree_leaves((args, kwargs)):
            if isinstance(leaf, torch.Tensor) and self._captured(leaf):
                raise RematError(
                    f"the block {_name(self.call.block)!r} given to remat uses a "
                    f"tensor of shape {tuple(leaf.shape)} that is being differentiated "
                    "but is not an argument: its gradient would be silently wrong. "
                    "Pass it in:"
                    "\n  wrong: remat(lambda x: x @ w)(x)"
                    "\n  right: remat(lambda w, x: x @ w)(w, x)"
                )
        return func(*args, **(kwargs or {}))

    def _captured(self, leaf: torch.Tensor) -> bool:
        if type(leaf) is GatherOnUse:
            buffer, _ = open_up(leaf)
            return id(buffer) not in self.passed and self._captured(buffer)
        if not self.call.top:  # outside of torch.func plain autograd differentiates
            return leaf.requires_grad and id(leaf) not in self.passed
        wrapped = is_functorch_wrapped_tensor(leaf)
        return wrapped and self.level < maybe_get_level(leaf) <= self.call.top


def _guarded(call: _Call, rank: Any, tensors: Sequence[Any]) -> tuple[Any, ...]:
    """Run the block, checking what it captures.

    It runs above every level that exists where remat was called: a transform inside
    the block would otherwise take the level of a captured tensor for its own.
    """
    level, added = maybe_current_level() or 0, []
    try:
        while call.top and (maybe_current_level() or 0) <= call.top:
            added.append(_grad_increment_nesting())
        with _Guard(call, tensors, level):
            outputs = call.run(rank, tensors)
        for above in reversed(added):
            outputs = [_unwrap_for_grad(o, above) for o in outputs]
    finally:
        for _ in added:
            _grad_decrement_nesting()
    return tuple(outputs)


class _Call:
    """One call of a block: everything about it that is not a tensor."""

    __slots__ = (
        "block",
        "out_spec",
        "positions",
        "rests",
        "rng",
        "spec",
        "static",
        "top",
    )

    def __init__(self, block: Any, args: Any, kwargs: Any) -> None:
        leaves, self.spec = tree_flatten((args, kwargs))
        self.block = block
        self.positions = [i for i, x in enumerate(leaves) if _is_tensor(x)]
        opened = [open_up(leaves[i]) for i in self.positions]
        self.rests = [rest for _, rest in opened]
        self.static = [None if _is_tensor(x) else x for x in leaves]
        self.out_spec: list[Any] = []
        self.rng = _rng_state()
        self.top = maybe_current_level() or 0

    def run(self, rank: Any, tensors: Any) -> list[torch.Tensor]:
        leaves = list(self.static)
        closed = close_up(list(tensors), self.rests, rank)
        for i, value in zip(self.positions, closed, strict=True):
            leaves[i] = value
        args, kwargs = tree_unflatten(self.spec, leaves)
        outputs, spec = tree_flatten(self.block(*args, **kwargs))
        if not self.out_spec:
            self.out_spec.append(spec)
        for out in outputs:
            if not _is_tensor(out):
                raise RematError(
                    f"the block {_name(self.block)!r} given to remat returned a "
                    f"{type(out).__name__}: return tensors (or a pytree of them)."
                )
        # An output that is an argument needs a tensor of its own.
        given = {id(x) for x in closed}
        return [o.view_as(o) if id(o) in given else o for o in outputs]


class _Remat(torch.autograd.Function):
    @staticmethod
    def forward(call: _Call, rank: Any, *tensors: torch.Tensor) -> Any:
        return _guarded(call, rank, tensors)

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        ctx.call, ctx.rank, *tensors = inputs
        ctx.save_for_backward(*tensors)
        ctx.mark_non_differentiable(*[o for o in output if not _is_smooth(o)])

    @staticmethod
    def backward(ctx: Any, *cotangents: Any) -> Any:
        call, rank = ctx.call, ctx.rank
        # Called late, the wrappers of a finished transform are dead: unwrap them.
        tensors = [unwrap_if_dead(t) for t in ctx.saved_tensors]
        needed = [
            i
            for i, t in enumerate(tensors)
            if ctx.needs_input_grad[i + 2] and _is_smooth(t)
        ]

        def recompute(*chosen: torch.Tensor) -> Any:
            full = list(tensors)
            for i, t in zip(needed, chosen, strict=True):
                full[i] = t
            outputs = call.run(rank, full)
            return tuple(o for o in outputs if _is_smooth(o))

        with _replayed(call.rng):
            vjp: Any = torch.func.vjp  # annotated without its pair form
            _, pull = vjp(recompute, *[tensors[i] for i in needed])
        given = [unwrap_if_dead(c) for c in cotangents if c is not None]
        given = [c for c in given if _is_smooth(c)]
        nested = torch.is_grad_enabled()
        grads = pull(tuple(given), retain_graph=nested, create_graph=nested)
        results: list[Any] = [None] * (len(ctx.needs_input_grad))
        for i, grad in zip(needed, grads, strict=True):
            results[i + 2] = grad
        return tuple(results)

    @staticmethod
    def vmap(info: Any, in_dims: Any, call: _Call, rank: Any, *tensors: Any) -> Any:
        def flat(rank: Any, *xs: torch.Tensor) -> Any:
            return _guarded(call, rank, xs)

        dims = (in_dims[1], *in_dims[2:])
        mapped = torch.func.vmap(flat, dims, randomness=info.randomness)
        outputs = mapped(rank, *tensors)
        return outputs, (0,) * len(outputs)


def remat(block: F) -> F:
    r"""The same function, whose backward recomputes it instead of keeping activations.

    Memory: the block's inputs instead of everything between input and output; one more
    forward of compute. With ``partition(zero=3)`` the block's parameters are gathered
    at its first use, freed at its end and gathered again in the recompute, so that a
    stack of blocks needs its shards and two blocks (one of weights, one of gradients).

    ``block`` must be closed: every tensor that is differentiated is an argument. Random
    numbers from torch's generators are replayed; keys are better.

    Raises:
      RematError: the block captures a tensor that is being differentiated, or returns
        something that is not a tensor.

    Differs from ``torch.utils.checkpoint``: works under torch.func (grad, vjp, vmap),
    nested, and it checks its closure.

    References:
      Chen et al., `Training deep nets with sublinear memory cost
      <https://arxiv.org/abs/1604.06174>`_, 2016.

    Example:
      >>> from zfunc.core.autodiff import value_and_grad
      >>> block = remat(lambda w, x: torch.sin(x * w))
      >>> x = torch.tensor(0.0)
      >>> value_and_grad(lambda w: block(w, x))(torch.tensor(2.0))
      (tensor(0.), tensor(0.))
    """

    @functools.wraps(block)
    def wrapped(*args: Any, **kwargs: Any) -> Any:
        call = _Call(block, args, kwargs)
        leaves = tree_flatten((args, kwargs))[0]
        tensors = [open_up(leaves[i])[0] for i in call.positions]
        ranks = [
            rest.sharding.mesh.rank
            for rest in call.rests
            if rest is not None and rest.sharding.mesh.kind == "simulated"
        ]
        run: Any = _Remat.apply
        outputs = run(call, ranks[0] if ranks else None, *tensors)
        return tree_unflatten(call.out_spec[0], outputs)

    return wrapped  # type: ignore[return-value]


def _is_tensor(x: Any) -> bool:
    return isinstance(x, torch.Tensor)


def _is_smooth(x: torch.Tensor) -> bool:
    return x.is_floating_point() or x.is_complex()


def _name(block: Any) -> str:
    return getattr(block, "__name__", type(block).__name__)


def _rng_state() -> Any:
    """States of torch's generators, taken before the forward."""
    if torch._guards.detect_fake_mode() is not None:
        return None
    devices = range(torch.cuda.device_count()) if torch.cuda.is_initialized() else ()
    return torch.get_rng_state(), [(d, torch.cuda.get_rng_state(d)) for d in devices]


class _replayed:  # noqa: N801 (a context manager used as a word)
    """Run the body with the generators as they were, and put them back after."""

    __slots__ = ("after", "before")

    def __init__(self, before: Any) -> None:
        self.before, self.after = before, _rng_state() if before else None

    def __enter__(self) -> None:
        _set_rng_state(self.before)

    def __exit__(self, *exc: object) -> None:
        _set_rng_state(self.after)


def _set_rng_state(state: Any) -> None:
    if state is None:
        return
    cpu, devices = state
    torch.set_rng_state(cpu)
    for device, value in devices:
        torch.cuda.set_rng_state(value, device)
