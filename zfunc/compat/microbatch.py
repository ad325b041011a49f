# SPDX-License-Identifier: Apache-2.0
r"""One microbatch of the bridge, as pure functions: outputs, and reduced gradients.

A script written for an engine calls the model, makes a loss of what comes out, and
asks for the backward after that. So the gradient is that of
:math:`\sum_i \langle c_i, y_i(p) \rangle`, where :math:`y_i` are the outputs and
:math:`c_i = \partial L / \partial y_i` are computed from the script's own loss L.
Where the module returns its loss, that gradient is known after the forward, for c = 1.
"""

from __future__ import annotations

import contextlib
import dataclasses
import random
from collections.abc import Callable, Iterator
from typing import Any, Final, NamedTuple

import numpy as np
import torch
from torch.func import functional_call
from torch.utils import _pytree as torch_tree

from zfunc.compat.errors import CompatError
from zfunc.core.state import TrainState
from zfunc.core.step import TrainStep, keep
from zfunc.core.tally import Samples, Tally
from zfunc.core.tree import PyTree, tree_map
from zfunc.core.update import widen
from zfunc.transforms.donation import donate
from zfunc.transforms.gathered import Wire, gather_on_use

AXIS = "data"
# From a loss to the step that trains on it: the optimizer and the rest are given.
Build = Callable[[Callable[..., Any]], TrainStep]
Batch = tuple[tuple[Any, ...], dict[str, Any]]
Pair = tuple[Tally, PyTree]
_WRITES: Final = (
    "in its forward, which a pure function cannot: it would be lost, or done more than "
    "once. Compute it anew in each call, or make the module without it"
)


@dataclasses.dataclass(frozen=True, eq=False)
class Model:
    """A module without trained parameters of its own, as a function of them.

    Attributes:
      shell: The module; its trained parameters are on the meta device.
      rest: Its frozen parameters and buffers, by name.
      names: Each place of a parameter or buffer, and the name of what is there. (A
        part with two names has one place: torch puts back what it finds in the second
        one of two.)
    """

    shell: torch.nn.Module
    rest: dict[str, torch.Tensor]
    names: dict[str, str]

    def __call__(self, params: PyTree, batch: Batch) -> Any:
        """What the module returns for ``(args, kwargs)``."""
        args, kwargs = batch
        values = {**params, **self.rest}
        placed = {place: values[name] for place, name in self.names.items()}
        versions = {name: x._version for name, x in self.rest.items()}
        try:
            out = functional_call(self.shell, placed, args, kwargs, tie_weights=False)
        except RuntimeError as error:
            if "mutate a captured Tensor" not in str(error):
                raise
            raise CompatError(f"the module writes to a buffer {_WRITES}") from None
        # torch puts what the forward has assigned into the dictionary.
        for place, name in self.names.items():
            if name not in versions:
                continue
            x = self.rest[name]
            if placed[place] is not x or x._version != versions[name]:
                raise CompatError(f"the module writes to {place} {_WRITES}")
        return out


class Rng(NamedTuple):
    """The states of the generators that a forward may use.

    Attributes:
      cpu: Of torch.
      cuda: Of the device, if it is one of CUDA.
      python: Of ``random``.
      numpy: Of ``numpy.random``.
    """

    cpu: torch.Tensor
    cuda: torch.Tensor | None
    python: Any
    numpy: Any


class Given(NamedTuple):
    """What a training forward handed out, and what its backward needs.

    Attributes:
      leaves: The floating outputs, which require grad.
      loss: Which of them is the module's own loss, whose gradient is ``pair``.
      pair: The tally and the reduced gradients of that loss.
      batch: The arguments of the call.
      rng: The state of the generators before it.
    """

    leaves: tuple[torch.Tensor, ...]
    loss: int | None
    pair: Pair | None
    batch: Batch
    rng: Rng


class _NoLossError(Exception):
    """The module returned outputs and no loss."""


def outputs_of(build: Build, model: Model, params: PyTree, batch: Batch) -> Any:
    """What the module returns; no gradient is computed.

    Args:
      build: Makes the step, whose precision applies.
      model: The module.
      params: The state's parameters.
      batch: The arguments of the call.
    """
    seen: list[Any] = []

    def loss_fn(p: PyTree, b: Batch) -> torch.Tensor:
        seen.append(model(p, b))
        return torch.zeros(())

    whole = gather_on_use(params, Wire(AXIS))
    none = torch.zeros((), dtype=torch.int64)
    with torch.no_grad():
        build(loss_fn).loss(whole, batch, Samples(none, none[None][:0]))
    return seen[0]


def forward(
    build: Build, model: Model, state: TrainState, batch: Batch, *, try_loss: bool
) -> tuple[Any, Given]:
    """The outputs of a training forward, as tensors that require grad.

    Args:
      build: Makes the step from a loss.
      model: The module.
      state: Between steps.
      batch: The arguments of the call.
      try_loss: Whether the module may return its loss; its gradient is then computed
        in the same pass.

    Raises:
      CompatError: an argument requires grad, which would get none.
    """
    strangers = [x for x in torch_tree.tree_leaves(batch) if _needs_grad(x)]
    if strangers:
        raise CompatError(
            f"the engine was called with a tensor of shape {tuple(strangers[0].shape)} "
            "that requires grad, and its gradient would be lost: give x.detach(), or "
            "make what computed it a part of the module"
        )
    device = state.key.device
    rng = rng_of(device)
    if try_loss:
        try:
            out, loss, pair = _loss_pass(build, model, state, batch)
            return _handed_out(out, loss, pair, batch, rng)
        except _NoLossError:
            set_rng(device, rng)
    out = outputs_of(build, model, state.params, batch)
    return _handed_out(out, None, None, batch, rng)


def weighted(
    build: Build, model: Model, state: TrainState, given: Given, loss: torch.Tensor
) -> Pair:
    """The reduced gradient of a script's loss, through that by each output.

    One more forward, with the same random numbers.

    Args:
      build: Makes the step from a loss.
      model: The module.
      state: Between steps.
      given: Of the forward.
      loss: Computed from what the forward handed out.
    """
    scaling = build(no_loss).loss_scale_of(state)
    scaled = widen(loss) if scaling is None else widen(loss) * scaling.scale
    slopes = _slopes(scaled, given)

    def loss_fn(p: PyTree, b: Batch) -> torch.Tensor:
        outs = [x for x in torch_tree.tree_leaves(model(p, b)) if _floating(x)]
        terms = [
            (widen(x) * widen(slope)).sum()
            for x, slope in zip(outs, slopes, strict=True)
            if slope is not None
        ]
        return sum(terms[1:], terms[0])

    device = state.key.device
    with _again(device, given.rng):
        return _pair_of(build(loss_fn), state, given.batch, scaled=False)


def applied(build: Build, state: TrainState, pair: Pair) -> TrainState:
    """The next state: the pure step with its gradient computed already.

    Args:
      build: Makes the step from a loss.
      state: Before; it is used up.
      pair: The sums over microbatches of their tallies and reduced gradients.
    """
    step = build(no_loss)._replace(grad=lambda loss: lambda *_: pair, accumulate=keep)
    return donate(step)(state, ())


def added(total: Pair | None, more: Pair, factor: float = 1.0) -> Pair:
    """``total + factor * more``, in float32 at least.

    Args:
      total: So far; None is zero.
      more: Of one microbatch.
      factor: What its gradients are multiplied by.
    """
    tally, grads = more
    grads = tree_map(lambda g: widen(g) if factor == 1 else widen(g) * factor, grads)
    if total is None:
        return tally, grads
    return tree_map(torch.add, total[0], tally), tree_map(torch.add, total[1], grads)


def rng_of(device: torch.device) -> Rng:
    """The states of the generators that a forward on a device may use."""
    cuda = torch.cuda.get_rng_state(device) if device.type == "cuda" else None
    return Rng(torch.get_rng_state(), cuda, random.getstate(), np.random.get_state())


def set_rng(device: torch.device, rng: Rng) -> None:
    """Put the generators back to what ``rng_of`` returned."""
    torch.set_rng_state(rng.cpu)
    if rng.cuda is not None:
        torch.cuda.set_rng_state(rng.cuda, device)
    random.setstate(rng.python)
    np.random.set_state(rng.numpy)


@contextlib.contextmanager
def _again(device: torch.device, rng: Rng) -> Iterator[None]:
    """With the generators as they were; after it, as they are."""
    now = rng_of(device)
    set_rng(device, rng)
    try:
        yield
    finally:
        set_rng(device, now)


def no_loss(params: PyTree, batch: PyTree) -> torch.Tensor:
    """The loss of a step whose gradient is known already: never called."""
    raise CompatError("this step has its gradient already")


def _pair_of(step: TrainStep, state: TrainState, batch: Batch, scaled: bool) -> Pair:
    scaling = step.loss_scale_of(state) if scaled else None
    index = torch.zeros(0, dtype=torch.int64, device=state.key.device)
    samples = Samples(state.key, index, None if scaling is None else scaling.scale)
    return step.accumulate(step.grad(step.loss))(state.params, batch, samples)


def _loss_pass(
    build: Build, model: Model, state: TrainState, batch: Batch
) -> tuple[Any, int, Pair]:
    seen: list[Any] = []

    def loss_fn(p: PyTree, b: Batch) -> torch.Tensor:
        out = model(p, b)
        loss = loss_in(out)
        if loss is None:
            raise _NoLossError
        leaves = [x for x in torch_tree.tree_leaves(out) if _floating(x)]
        where = [i for i, x in enumerate(leaves) if x is loss]
        if not where:
            raise _NoLossError  # in an object that is no container of torch's
        seen.append((torch_tree.tree_map(_unwrapped, out), where[0]))
        return loss

    pair = _pair_of(build(loss_fn), state, batch, scaled=True)
    return *seen[0], pair


def loss_in(out: Any) -> torch.Tensor | None:
    """The loss among a module's outputs: itself, ``loss``, or the first of a tuple.

    Examples:
      >>> loss_in({"loss": torch.tensor(2.0), "logits": torch.zeros(3)})
      tensor(2.)
      >>> loss_in(torch.zeros(3)) is None
      True
    """
    if isinstance(out, dict):
        out = out.get("loss")
    elif isinstance(out, tuple) and not hasattr(out, "_fields"):
        out = out[0] if out else None
    elif not isinstance(out, torch.Tensor):
        out = getattr(out, "loss", None)
    return out if _floating(out) and out.dim() == 0 else None


def _floating(x: Any) -> bool:
    return isinstance(x, torch.Tensor) and x.is_floating_point()


def _needs_grad(x: Any) -> bool:
    return isinstance(x, torch.Tensor) and x.requires_grad


def _unwrapped(x: Any) -> Any:
    """The tensor below the levels of torch.func, which end when the pass does."""
    if not isinstance(x, torch.Tensor):
        return x
    while torch._C._functorch.is_functorch_wrapped_tensor(x):
        x = torch._C._functorch.get_unwrapped(x)
    return x.detach()


def _handed_out(
    out: Any, loss: int | None, pair: Pair | None, batch: Batch, rng: Any
) -> tuple[Any, Given]:
    leaves: list[torch.Tensor] = []

    def one(x: Any) -> Any:
        if not _floating(x):
            return x if _is_plain(x) else None
        leaves.append(x.detach().requires_grad_())
        # A loss may be changed in place (loss /= n), which a leaf may not.
        return leaves[-1].clone() if x.dim() == 0 else leaves[-1]

    handed = torch_tree.tree_map(one, out)
    if not leaves:
        raise CompatError(
            f"the module returned a {type(out).__name__} in which there is no floating "
            "tensor: return a tensor, or a tuple, list, dictionary or ModelOutput of "
            "them."
        )
    return handed, Given(tuple(leaves), loss, pair, batch, rng)


def _is_plain(x: Any) -> bool:
    return x is None or isinstance(x, torch.Tensor | bool | int | float | str)


def slope_of(loss: torch.Tensor, given: Given) -> torch.Tensor | None:
    """The derivative of a script's loss by the module's own, if that is all it needs.

    Args:
      loss: The script's.
      given: Of the forward it was computed from.
    """
    if given.loss is None:
        return None
    slopes = _slopes(loss, given)
    used = [i for i, slope in enumerate(slopes) if slope is not None]
    return slopes[given.loss] if used == [given.loss] else None


def _slopes(loss: torch.Tensor, given: Given) -> tuple[torch.Tensor | None, ...]:
    return torch.autograd.grad(loss, given.leaves, allow_unused=True, retain_graph=True)


def leaves_of(loss: torch.Tensor) -> list[torch.Tensor]:
    """The tensors that require grad from which a loss was computed."""
    found, waiting, visited = [], [loss.grad_fn], set()
    if loss.grad_fn is None and loss.requires_grad:
        return [loss]
    while waiting:
        node: Any = waiting.pop()
        if node is None or node in visited:
            continue
        visited.add(node)
        if hasattr(node, "variable"):
            found.append(node.variable)
        waiting.extend(parent for parent, _ in node.next_functions)
    return found
