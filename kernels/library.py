# SPDX-License-Identifier: Apache-2.0
"""How a Triton kernel becomes an operator that torch.func, make_fx and inductor keep.

``torch.library.custom_op(...).register_autograd`` does not work under ``torch.func``;
an ``autograd.Function`` with ``setup_context`` whose forward and backward call plain
operators does. ``define`` makes such an operator: the launch for CUDA (and for the CPU
where Triton interprets), its shapes for tracing, its rule for ``vmap``, and an error in
the place of a second derivative, which torch would otherwise let be zero.
"""

from collections.abc import Callable, Iterator
from typing import Any, Final, Literal, get_args

import torch
import triton
from torch import Tensor
from torch._functorch.utils import unwrap_dead_wrappers
from torch.autograd import forward_ad
from torch.utils._pytree import tree_map

NAMESPACE: Final = "zfunc"
DTYPES: Final = (torch.float64, torch.float32, torch.float16, torch.bfloat16)
Kernel = Literal["auto", "triton", "reference"]
_LIBRARY: Final = torch.library.Library(NAMESPACE, "FRAGMENT")


def define(
    schema: str,
    launch: Callable[..., Any],
    *,
    fake: Callable[..., Any],
    vmap: Callable[..., Any],
) -> Any:
    """The operator of a schema such as ``"rms_norm(Tensor x, float eps) -> Tensor"``.

    Args:
      schema: Name, arguments and results; the namespace is ``zfunc``.
      launch: Computes the results by Triton.
      fake: The same signature; gives tensors of the right shapes and dtypes.
      vmap: ``(info, in_dims, *args) -> (results, out_dims)``, as in ``torch.library``.

    Returns:
      The overload, ``torch.ops.zfunc.<name>.default``.
    """
    name = schema[: schema.index("(")]
    _LIBRARY.define(schema)
    qualified = f"{NAMESPACE}::{name}"
    op = getattr(getattr(torch.ops, NAMESPACE), name).default
    infos = [x.alias_info for x in op._schema.arguments]
    written = [i for i, info in enumerate(infos) if info and info.is_write]

    def first_order(*args: Any, **kwargs: Any) -> Any:
        if _differentiated((*args, *kwargs.values())):
            raise RuntimeError(_no_second(name))
        with torch._C._AutoDispatchBelowAutograd():
            results = op(*args, **kwargs)
        for i in written:  # else a backward would read what is new without a word
            torch.autograd.graph.increment_version(_tensors(args[i : i + 1]))
        return results

    for device in ("CPU", "CUDA"):
        _LIBRARY.impl(name, _on_its_device(launch), device)
    _LIBRARY.impl(name, first_order, "Autograd")
    torch.library.register_fake(qualified, fake, lib=_LIBRARY)
    torch.library.register_vmap(qualified, vmap, lib=_LIBRARY)
    return op


def at_once(op: Any, launch: Callable[..., Any]) -> Callable[..., Any]:
    """An operator, or what it launches where nobody listens to the dispatcher.

    Its two calls into Python take 0.2 ms with a cold cache, as after a pass over all
    parameters.

    Args:
      op: What ``define`` returned.
      launch: What was given to it.
    """
    arguments = op._schema.arguments
    written = [
        i for i, x in enumerate(arguments) if x.alias_info and x.alias_info.is_write
    ]

    def call(*args: Any) -> Any:
        if not _unobserved(args):
            return op(*args)
        results = _on_its_device(launch)(*args)
        for i in written:
            torch.autograd.graph.increment_version(args[i])
        return results

    return call


def _unobserved(args: Any) -> bool:
    """Whether no mode, transformation, compiler or derivative is at work."""
    modes = torch._C._len_torch_dispatch_stack() + torch._C._len_torch_function_stack()
    if modes or _transformed() or torch.compiler.is_compiling():
        return False
    plain = all(type(x) is Tensor and not x.is_inference() for x in _tensors(args))
    return plain and not torch.is_inference_mode_enabled() and not _differentiated(args)


def _on_its_device(launch: Callable[..., Any]) -> Callable[..., Any]:
    """Triton launches on the current device, whatever device the pointers are of."""

    def call(*args: Any) -> Any:
        first = next((x for x in args if isinstance(x, Tensor)), None)
        if first is None:
            return launch(*args)
        with torch.cuda.device_of(first):
            return launch(*args)

    return call


def _differentiated(args: Any) -> bool:
    """Whether a derivative of an operator is on record, backward or forward."""
    backward = torch.is_grad_enabled()
    forward = forward_ad._current_level >= 0
    if not (backward or forward):
        return False
    return any(
        (backward and x.requires_grad)
        or (forward and forward_ad.unpack_dual(x).tangent is not None)
        for x in _tensors(args)
    )


def _tensors(args: Any) -> Iterator[Tensor]:
    """Those among arguments and lists of them; torch's own way takes 90 us."""
    for x in args:
        if isinstance(x, Tensor):
            yield x
        elif isinstance(x, (list, tuple)):
            yield from _tensors(x)


class FirstOrder(torch.autograd.Function):
    """A function whose forward and backward call operators; base of all of them."""

    generate_vmap_rule = True

    @staticmethod
    def jvp(ctx: Any, *tangents: Any) -> Any:
        """Raise: ``torch.func.jvp``, ``jacfwd`` and ``hessian`` arrive here."""
        raise RuntimeError(
            "zfunc.kernels: a kernel has a derivative in reverse mode, and none in "
            'forward mode, which was asked for. Pass kernel="reference" for it, and '
            "for a Hessian."
        )


def pullback(op: Callable[..., Any]) -> Callable[..., Any]:
    """The operator of a backward, as what an ``autograd.Function`` may call there.

    ``torch.func.grad`` differentiates every backward in case somebody asks for the
    second derivative; this one is differentiable until then, and raises only if it
    really is asked for.

    Args:
      op: What ``define`` returned; its arguments are tensors, numbers and None.

    Returns:
      The operator with a backward that raises ``RuntimeError``.
    """
    name = op.name().partition("::")[2].partition(".")[0]

    class Pullback(FirstOrder):
        @staticmethod
        def forward(*args: Any) -> Any:
            return op(*args)

        @staticmethod
        def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
            pass

        @staticmethod
        def backward(ctx: Any, *grads: Any) -> Any:
            raise RuntimeError(_no_second(name))

    def call(*args: Any) -> Any:
        if torch.is_grad_enabled() or _transformed():
            return Pullback.apply(*args)
        return op(*args)

    return call


def applied(function: Any) -> Callable[..., Any]:
    """``function.apply`` without its look at the signature, which takes 25 us a call.

    Args:
      function: An ``autograd.Function``, whose forward has no default arguments.

    Returns:
      A callable of its positional arguments; ``function.apply`` itself where a
      transformation or the compiler is at work.
    """
    direct = super(torch.autograd.Function, function).apply

    def call(*args: Any) -> Any:
        if torch.compiler.is_compiling() or _transformed():
            return function.apply(*args)
        return direct(*unwrap_dead_wrappers(args))

    return call


def _transformed() -> bool:
    return bool(torch._C._are_functorch_transforms_active())


def _no_second(name: str) -> str:
    return (
        f"zfunc.kernels: {name} has no derivative of its own: the kernel has a first "
        'derivative and no second. Pass kernel="reference" for a Hessian.'
    )


def runs_triton(name: str, kernel: Kernel, *tensors: Tensor | None) -> bool:
    """Whether a public function launches its kernel, by ``kernel`` and the devices.

    Args:
      name: The function, for messages.
      kernel: What the user asked for: "auto" is Triton on CUDA and torch elsewhere.
      *tensors: The tensors of the call, all on one device.

    Raises:
      ValueError: Another ``kernel``; tensors on two devices; "triton" where there is
        neither a CUDA device nor the interpreter.
    """
    if kernel not in get_args(Kernel):
        raise ValueError(
            f"{name}: kernel is {kernel!r}, expected one of "
            f'{", ".join(map(repr, get_args(Kernel)))}; type kernel="auto"'
        )
    devices = {x.device for x in tensors if x is not None}
    if len(devices) > 1:
        names = ", ".join(sorted(map(str, devices)))
        raise ValueError(
            f"{name}: tensors on {names}, expected one device; move them with "
            "x.to(device)"
        )
    on_cuda = bool(devices) and next(iter(devices)).type == "cuda"
    if kernel == "triton" and not (on_cuda or interpreting()):
        where = ", ".join(map(str, devices)) or "no device"
        raise ValueError(
            f'{name}: kernel="triton" on {where}, expected CUDA tensors; type '
            'kernel="auto", or set TRITON_INTERPRET=1 before Python starts to try '
            "the kernel slowly on a CPU"
        )
    return kernel == "triton" or (kernel == "auto" and on_cuda)


def interpreting() -> bool:
    """Whether Triton runs kernels in Python: ``TRITON_INTERPRET=1`` at the import."""
    return bool(triton.knobs.runtime.interpret)


def looped(op: Callable[[], Any]) -> Callable[..., Any]:
    """A rule for ``vmap`` that runs the operator once per element, and stacks.

    Args:
      op: Gives the operator, which does not exist yet when its rule is made.

    Returns:
      The rule.
    """

    def rule(info: Any, in_dims: Any, *args: Any) -> Any:
        results = [op()(*_picked(args, in_dims, i)) for i in range(info.batch_size)]
        stacked = tree_map(lambda *xs: torch.stack(xs), *results)
        return stacked, tree_map(lambda _: 0, stacked)

    return rule


def _picked(args: Any, dims: Any, i: int) -> Any:
    """The i-th element of every mapped tensor among arguments and lists of them."""
    if isinstance(args, (list, tuple)):
        dims = dims if isinstance(dims, (list, tuple)) else [dims] * len(args)
        return [_picked(x, d, i) for x, d in zip(args, dims, strict=True)]
    return args if dims is None else args.select(dims, i)


def batched_first(x: Any, dim: int | None, batch_size: int) -> Any:
    """A mapped tensor with its mapped dim first; one that is not mapped, expanded.

    Args:
      x: A tensor, or None.
      dim: The mapped dim, or None.
      batch_size: Its length.
    """
    if not isinstance(x, Tensor):
        return x
    if dim is None:
        return x.expand(batch_size, *x.shape)
    return x.movedim(dim, 0)


def compute_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype of arithmetic on stored values: float32, or float64 for float64."""
    return torch.promote_types(dtype, torch.float32)


def check_floating(name: str, **tensors: Tensor | None) -> None:
    """Raise unless all are strided tensors of one of ``DTYPES``, or None.

    Raises:
      TypeError: Something else, named.
    """
    for argument, x in tensors.items():
        if x is None:
            continue
        if not isinstance(x, Tensor) or not x.is_floating_point():
            got = x.dtype if isinstance(x, Tensor) else type(x).__name__
            raise TypeError(
                f"{name}: {argument} is {got}, expected a floating tensor; use "
                f"{argument}.float()"
            )
        if x.dtype not in DTYPES:
            raise TypeError(
                f"{name}: {argument} is {x.dtype}, expected one of "
                f"{', '.join(map(str, DTYPES))}; use {argument}.to(torch.bfloat16)"
            )
        if x.layout is not torch.strided:
            raise TypeError(
                f"{name}: {argument} has layout {x.layout}, expected a strided tensor; "
                f"use {argument}.to_dense()"
            )


def check_shape(name: str, argument: str, x: Tensor, shape: tuple[int, ...]) -> None:
    """Raise unless a tensor has this shape.

    Raises:
      ValueError: It has another.
    """
    if tuple(x.shape) != tuple(shape):
        raise ValueError(
            f"{name}: {argument} has shape {tuple(x.shape)}, expected {tuple(shape)}"
        )


def check_number(name: str, argument: str, value: object) -> None:
    """Raise unless an option is a number of Python's, which no device is asked for.

    Raises:
      TypeError: It is something else, a tensor for example.
    """
    if not isinstance(value, int | float):
        raise TypeError(
            f"{name}: {argument} is {type(value).__name__}, expected a number; use "
            f"float({argument}), which waits for a device"
        )


def check_columns(name: str, argument: str, x: Tensor) -> None:
    """Raise unless the columns of a row can be counted in 32 bits.

    Raises:
      ValueError: There are more. (Of rows there may be any number.)
    """
    if x.shape[-1] >= 2**31 - 2**16:
        raise ValueError(
            f"{name}: {argument} has {x.shape[-1]} columns, expected fewer than 2^31; "
            "split the last dim"
        )
