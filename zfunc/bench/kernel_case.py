# SPDX-License-Identifier: Apache-2.0
"""What a kernel is measured at: ways to compute one thing, its bytes, and its bars."""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, Literal, NamedTuple

import torch
import torch._functorch.config
from torch import Tensor

from zfunc.core.tree import tree_leaves, tree_map

OURS = "zfunc"


class Way(NamedTuple):
    """One way to compute something; ``call(*args)`` is what is timed.

    Attributes:
      call: Takes the tensors.
      args: They stay alive as long as the way does.
    """

    call: Callable[..., Any]
    args: tuple[Any, ...]

    def __call__(self) -> Any:
        """Compute."""
        return self.call(*self.args)


class Bar(NamedTuple):
    """What a case has to reach.

    Attributes:
      what: "roof" is the fraction of the copy roof, "faster" the time of ``peer`` over
        ours, "leaner" its workspace over ours; "ms", "host us" and "workspace MB" are
        the most that is allowed.
      value: How much.
      peer: Of "faster" and "leaner": the way that is compared with.
    """

    what: Literal["roof", "faster", "leaner", "ms", "host us", "workspace MB"]
    value: float
    peer: str = ""

    @property
    def is_least(self) -> bool:
        """Whether more is better."""
        return self.what in ("roof", "faster", "leaner")

    def passes(self, got: float) -> bool:
        """Whether a value that was measured reaches the bar.

        Examples:
          >>> Bar("roof", 0.9).passes(0.95), Bar("ms", 43).passes(44)
          (True, False)
        """
        return got >= self.value if self.is_least else got <= self.value

    def __str__(self) -> str:
        sign = ">=" if self.is_least else "<="
        against = f" than {self.peer}" if self.peer else ""
        return f"{self.what}{against} {sign} {self.value:g}"


class Case(NamedTuple):
    """One thing that is computed in several ways.

    Attributes:
      name: ``"<function>/<pass>/<dtype>/<sizes>"``.
      bytes: The least that has to be read and written; the roof is for those.
      ways: Makes them on a device. A sentence in the place of a way says why it is not
        there.
      bars: What ``zfunc`` has to reach.
      bound: How far results may be apart, over the largest element; None where a call
        changes its arguments, so results are not compared.
    """

    name: str
    bytes: int
    ways: Callable[[torch.device], Mapping[str, Way | str]]
    bars: tuple[Bar, ...] = ()
    bound: float | None = None


class Layer(NamedTuple):
    """A differentiable function of tensors, ours and the peers'.

    Attributes:
      name: Of the public function, ``zfunc.kernels.<module>.<name>``.
      module: Of ``zfunc.kernels``.
      ours: From that function to one of the tensors.
      eager: The same by torch's own operators.
      liger: From Liger's functional module to the same, or None.
      variant: What sets it apart from other cases of the function, or nothing.
    """

    name: str
    module: str
    ours: Callable[[Callable[..., Any]], Callable[..., Any]]
    eager: Callable[..., Any]
    liger: Callable[[Any], Callable[..., Any]] | None = None
    variant: str = ""

    @property
    def label(self) -> str:
        """The name and the variant."""
        return f"{self.name}-{self.variant}" if self.variant else self.name


def public(module: str, name: str) -> Any:
    """A function of ``zfunc.kernels``, imported when it is needed.

    Args:
      module: Of the package.
      name: Of the function.
    """
    return getattr(importlib.import_module(f"zfunc.kernels.{module}"), name)


def functions(layer: Layer) -> dict[str, Callable[..., Any] | str]:
    """The layer in every way that there is here.

    Args:
      layer: Which.
    """
    found: dict[str, Callable[..., Any] | str] = {
        OURS: layer.ours(public(layer.module, layer.name)),
        "eager": layer.eager,
        "compile": _compiled(layer.eager),
    }
    if layer.liger is not None:
        found["liger"] = _liger(layer.liger)
    return found


def _compiled(fn: Callable[..., Any]) -> Callable[..., Any] | str:
    if not torch.cuda.is_available():
        return "torch.compile is measured on GPUs"
    torch._dynamo.reset()  # every case is a shape anew, and only 8 are kept
    return torch.compile(fn, dynamic=False)


def _liger(get: Callable[[Any], Callable[..., Any]]) -> Callable[..., Any] | str:
    if importlib.util.find_spec("liger_kernel") is None:
        return "Liger is not installed: pip install liger-kernel"
    try:
        return get(importlib.import_module("liger_kernel.transformers.functional"))
    except (ImportError, AttributeError) as error:
        return f"this Liger does not have it: {error}"


def forward(
    layer: Layer, make: Callable[[torch.device], tuple[Any, ...]]
) -> Callable[[torch.device], dict[str, Way | str]]:
    """The ways of a layer's forward, without gradients.

    Args:
      layer: Which.
      make: Its arguments.
    """

    def one(fn: Callable[..., Any], args: tuple[Any, ...]) -> Way:
        return Way(torch.no_grad()(fn), args)

    return lambda device: _each(layer, make(device), one)


def backward(
    layer: Layer, make: Callable[[torch.device], tuple[Any, ...]]
) -> Callable[[torch.device], dict[str, Way | str]]:
    """The ways of a layer's backward alone; the forward is run once before.

    Args:
      layer: Which.
      make: Its arguments; the floating tensors are differentiated.
    """

    def one(fn: Callable[..., Any], args: tuple[Any, ...]) -> Way:
        args = leaves(args)
        # A compiled backward that gives its buffers away could run only once.
        with torch._functorch.config.patch(donated_buffer=False):
            outs = tree_leaves(fn(*args))
        wanted = [x for x in args if isinstance(x, Tensor) and x.requires_grad]

        def pull(*seeds: Tensor) -> tuple[Tensor, ...]:
            return torch.autograd.grad(outs, wanted, seeds, retain_graph=True)

        return Way(pull, tuple(map(cotangent, outs)))

    return lambda device: _each(layer, make(device), one)


def both(
    layer: Layer, make: Callable[[torch.device], tuple[Any, ...]]
) -> Callable[[torch.device], dict[str, Way | str]]:
    """The ways of a layer's forward and backward in one call.

    Args:
      layer: Which.
      make: Its arguments; the floating tensors are differentiated.
    """

    def one(fn: Callable[..., Any], args: tuple[Any, ...]) -> Way:
        args = leaves(args)
        wanted = [x for x in args if isinstance(x, Tensor) and x.requires_grad]
        seeds = [cotangent(out) for out in tree_leaves(fn(*args))]

        def run(*args: Any) -> tuple[Tensor, ...]:
            return torch.autograd.grad(tree_leaves(fn(*args)), wanted, seeds)

        return Way(run, args)

    return lambda device: _each(layer, make(device), one)


def _each(
    layer: Layer,
    args: tuple[Any, ...],
    one: Callable[[Callable[..., Any], tuple[Any, ...]], Way],
) -> dict[str, Way | str]:
    """Every way of a layer. Liger's write over their arguments: it has its own."""
    found: dict[str, Way | str] = {}
    for name, fn in functions(layer).items():
        given = tree_map(_copied, args) if name == "liger" else args
        if isinstance(fn, str):
            found[name] = fn
        elif name == OURS:
            found[name] = one(fn, given)
        else:
            found[name] = tried(partial(one, fn, given))
    return found


def _copied(x: Any) -> Any:
    return x.clone() if isinstance(x, Tensor) else x


def tried(make: Callable[[], Way]) -> Way | str:
    """A peer that was made and called once; or what it raised.

    Args:
      make: Makes it.

    Examples:
      >>> tried(lambda: Way(int, ("one",)))
      "it raised ValueError: invalid literal for int() with base 10: 'one'"
    """
    try:
        way = make()
        way()
    except Exception as error:  # a compiler's, Liger's, or out of memory
        return f"it raised {told(error)}"
    return way


def told(error: Exception) -> str:
    """The class of an exception and the first line of what it says.

    Args:
      error: The exception.
    """
    said = str(error).strip().partition("\n")[0]
    return f"{type(error).__name__}: {said}"


def leaves(args: tuple[Any, ...]) -> tuple[Any, ...]:
    """The floating tensors as leaves that are differentiated.

    Args:
      args: Tensors and others; they are left as they are.
    """
    return tuple(
        x.detach().requires_grad_()
        if isinstance(x, Tensor) and x.is_floating_point()
        else x
        for x in args
    )


def cotangent(out: Tensor) -> Tensor:
    """A fixed tensor like a result: 1 for a loss, else values between -1 and 1.

    Args:
      out: The result.
    """
    if out.ndim == 0:
        return torch.ones_like(out)
    ramp = torch.arange(out.numel(), device=out.device, dtype=torch.float32)
    return torch.sin(ramp).reshape(out.shape).to(out.dtype)
