# SPDX-License-Identifier: Apache-2.0
"""The layer kernels that are measured on a GPU: sizes, peers and bars, as data."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from zfunc.bench.kernel_case import Bar, Case, Layer, backward, both, forward


class Sizes(NamedTuple):
    """How large the tensors are.

    Attributes:
      numel: Elements of an activation.
      widths: Of its rows.
      tokens: Rows of the logits.
      hidden: Width of what is projected onto them.
      vocab: Their number.
      num_params: Of the optimizers.
      dtype: Of activations.
      few: Rows and width that take a GPU less time than the host.
    """

    numel: int
    widths: tuple[int, ...]
    tokens: int
    hidden: int
    vocab: int
    num_params: int
    dtype: torch.dtype
    few: tuple[int, int]


# The pass of cases that are too small for the roof: they show the host.
HOST = "forward+backward"
# 256 MiB in each activation, 1e9 parameters.
FULL = Sizes(
    1 << 27,
    (2048, 4096, 8192, 16384, 32768),
    8192,
    4096,
    131072,
    1_000_000_000,
    torch.bfloat16,
    (128, 1024),
)
# Seconds, to try the command; in float32, which the interpreter computes rightly.
TINY = Sizes(1 << 10, (64,), 16, 8, 96, 3000, torch.float32, (3, 64))


def normal(device: torch.device, dtype: torch.dtype, *shape: int) -> Tensor:
    """Standard normal values of a fixed seed.

    Args:
      device: Where.
      dtype: Of the values.
      *shape: Theirs.
    """
    generator = torch.Generator(device).manual_seed(0)
    return torch.randn(shape, device=device, generator=generator).to(dtype)


def layer_cases(sizes: Sizes) -> Iterator[Case]:
    """Every case, in the order of the files.

    Args:
      sizes: ``FULL``, or ``TINY`` to try.
    """
    yield from _norms(sizes)
    for width in sizes.widths:
        rows = (sizes.numel // width, width)
        yield from _two(sizes, SOFTMAX, rows, (2, 3), _values(sizes, rows), _SOFTMAX)
    side = min(sizes.widths[1 % len(sizes.widths) :])
    square = (max(1, sizes.numel // side**2), side, side)
    # Half is read, and all of it is written: zeros too.
    yield from _two(sizes, CAUSAL, square, (1.5, 2), _values(sizes, square))
    rows = (sizes.numel // side, side)
    pair = _values(sizes, rows, rows)
    yield from _two(sizes, SWIGLU, rows, (3, 5), pair)
    yield from _two(sizes, GEGLU, rows, (3, 5), pair)
    yield from _two(sizes, BIAS_GELU, rows, (2, 3), _values(sizes, rows, rows[1:]))
    for case in _two(sizes, DROPOUT, rows, (3, 2), _keyed(sizes, rows)):
        yield case._replace(bound=None)  # torch's dropout drops others
    width = min(128, side // 2)
    heads = (side // width, sizes.numel // side, width)
    yield from _two(sizes, ROPE, heads, (2, 2), _turned(sizes, heads))
    yield from _losses(sizes)


_NORM = ((Bar("roof", 0.90),), (Bar("roof", 0.75), Bar("faster", 1.6, "liger")))
_SOFTMAX = ((Bar("roof", 0.92),), (Bar("roof", 0.88),))
_EPS = 1e-6

RMS_NORM = Layer(
    "rms_norm",
    "rms_norm",
    lambda fn: lambda x, scale: fn(x, scale, _EPS, kernel="triton"),
    lambda x, scale: F.rms_norm(x, x.shape[-1:], scale, _EPS),
    lambda liger: partial(liger.liger_rms_norm, eps=_EPS, in_place=False),
)
ADD_RMS_NORM = Layer(
    "rms_norm",
    "rms_norm",
    lambda fn: lambda x, scale, r: fn(x, scale, _EPS, residual=r, kernel="triton"),
    lambda x, scale, r: (F.rms_norm(x + r, x.shape[-1:], scale, _EPS), x + r),
    lambda liger: _added(liger.liger_fused_add_rms_norm),
    variant="residual",
)
LAYER_NORM = Layer(
    "layer_norm",
    "layer_norm",
    lambda fn: lambda x, scale, bias: fn(x, scale, bias, _EPS, kernel="triton"),
    lambda x, scale, bias: F.layer_norm(x, x.shape[-1:], scale, bias, _EPS),
    lambda liger: partial(liger.liger_layer_norm, eps=_EPS),
)
ADD_LAYER_NORM = Layer(
    "layer_norm",
    "layer_norm",
    lambda fn: (
        lambda x, scale, bias, r: fn(x, scale, bias, _EPS, residual=r, kernel="triton")
    ),
    lambda x, scale, bias, r: (
        F.layer_norm(x + r, x.shape[-1:], scale, bias, _EPS),
        x + r,
    ),
    variant="residual",
)

SOFTMAX = Layer(
    "softmax",
    "softmax",
    lambda fn: lambda x: fn(x, kernel="triton"),
    lambda x: F.softmax(x, -1),
    lambda liger: liger.liger_softmax,
)
CAUSAL = Layer(
    "softmax",
    "softmax",
    lambda fn: lambda x: fn(x, causal=True, kernel="triton"),
    lambda x: F.softmax(x.masked_fill(_above(x), -torch.inf), -1),
    variant="causal",
)
SWIGLU = Layer(
    "swiglu",
    "swiglu",
    lambda fn: lambda gate, up: fn(gate, up, kernel="triton"),
    lambda gate, up: F.silu(gate) * up,
    lambda liger: liger.liger_swiglu,
)
GEGLU = Layer(
    "geglu",
    "geglu",
    lambda fn: lambda gate, up: fn(gate, up, approximate="tanh", kernel="triton"),
    lambda gate, up: F.gelu(gate, approximate="tanh") * up,
    lambda liger: liger.liger_geglu,
)
BIAS_GELU = Layer(
    "bias_gelu",
    "bias_gelu",
    lambda fn: lambda x, bias: fn(x, bias, approximate="tanh", kernel="triton"),
    lambda x, bias: F.gelu(x + bias, approximate="tanh"),
)
DROPOUT = Layer(
    "bias_dropout_residual",
    "bias_dropout_residual",
    lambda fn: lambda x, bias, r, key: fn(x, bias, r, key, 0.1, kernel="triton"),
    lambda x, bias, r, key: r + F.dropout(x + bias, 0.1),
)
ROPE = Layer(
    "rope",
    "rope",
    lambda fn: lambda x, tables: fn(x, *tables, kernel="triton"),
    lambda x, tables: _rotated(x, *tables),
)


def _added(fn: Callable[..., Any]) -> Callable[..., Any]:
    return lambda x, scale, r: fn(x, r, scale, _EPS)


def _norms(sizes: Sizes) -> Iterator[Case]:
    """Every width; one with the residual added; small ones for the time of the host."""
    for layer, added in ((RMS_NORM, ADD_RMS_NORM), (LAYER_NORM, ADD_LAYER_NORM)):
        vectors = 1 if layer is RMS_NORM else 2
        for width in sizes.widths:
            rows = (sizes.numel // width, width)
            make = _values(sizes, rows, *[(width,)] * vectors)
            yield from _two(sizes, layer, rows, (2, 3), make, _NORM)
        width = sizes.widths[1 % len(sizes.widths)]
        rows = (sizes.numel // width, width)
        make = _values(sizes, rows, *[(width,)] * vectors, rows)
        yield from _two(sizes, added, rows, (4, 4), make)
        few = sizes.few
        yield Case(
            f"{layer.name}/{HOST}/{_name(sizes, few)}",
            5 * math.prod(few) * sizes.dtype.itemsize,
            both(layer, _values(sizes, few, *[few[1:]] * vectors)),
            (Bar("host us", 60),),
            _bound(sizes),
        )


# The peers take means, so ours does too. Liger writes the gradient over the logits.
CROSS_ENTROPY = Layer(
    "cross_entropy",
    "cross_entropy",
    lambda fn: lambda logits, labels: fn(logits, labels, kernel="triton").mean(),
    F.cross_entropy,
    lambda liger: liger.liger_cross_entropy,
)


def fused_loss(workspace_bytes: int, kernel: str = "triton") -> Layer:
    """The loss of a model's last layer; the peers keep all logits, but for Liger.

    Args:
      workspace_bytes: For the logits of some rows.
      kernel: Of ours.
    """
    options: Any = {"workspace_bytes": workspace_bytes, "kernel": kernel}
    return Layer(
        "linear_cross_entropy",
        "linear_cross_entropy",
        lambda fn: lambda x, w, labels: fn(x, w, labels, **options),
        lambda x, w, labels: F.cross_entropy(x @ w.mT, labels, reduction="sum"),
        lambda liger: partial(liger.liger_fused_linear_cross_entropy, reduction="sum"),
    )


def linear_case(
    sizes: Sizes, workspace_bytes: int, kernel: str, bars: tuple[Bar, ...]
) -> Case:
    """Loss and gradients; the bytes are those of the arguments and gradients alone.

    Args:
      sizes: Tokens, hidden and vocabulary.
      workspace_bytes: For the logits of some rows.
      kernel: Of ours.
      bars: What it has to reach.
    """
    tokens, hidden, vocab = sizes.tokens, sizes.hidden, sizes.vocab
    return Case(
        f"linear_cross_entropy/{HOST}/{_name(sizes, (tokens, hidden, vocab))}",
        2 * (tokens + vocab) * hidden * sizes.dtype.itemsize,
        both(
            fused_loss(workspace_bytes, kernel),
            _labelled(sizes, (tokens, hidden), (vocab, hidden)),
        ),
        bars,
        4 * _bound(sizes),
    )


def _losses(sizes: Sizes) -> Iterator[Case]:
    """The loss, which reads the logits once; with its gradient 2 reads and a write."""
    shape = (sizes.tokens, sizes.vocab)
    for kind, ways, count, some in (
        ("forward", forward, 1, ()),
        ("forward+backward", both, 3, (Bar("roof", 0.90),)),
    ):
        yield Case(
            f"cross_entropy/{kind}/{_name(sizes, shape)}",
            count * math.prod(shape) * sizes.dtype.itemsize,
            ways(CROSS_ENTROPY, _labelled(sizes, shape)),
            some,
            _bound(sizes),
        )
    bars = (Bar("ms", 43), Bar("workspace MB", 0.6 * 2**30 / 1e6))
    yield linear_case(sizes, 512 * 2**20, "triton", bars)


def _labelled(
    sizes: Sizes, *shapes: tuple[int, ...]
) -> Callable[[torch.device], tuple[Tensor, ...]]:
    """Floating tensors and the labels of the tokens."""

    def make(device: torch.device) -> tuple[Tensor, ...]:
        labels = torch.arange(sizes.tokens, device=device) * 7919 % sizes.vocab
        return (*_values(sizes, *shapes)(device), labels)

    return make


def _above(x: Tensor) -> Tensor:
    ones = torch.ones(x.shape[-2:], dtype=torch.bool, device=x.device)
    return ones.triu(1)


def _rotated(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    a, b = x.chunk(2, -1)
    turned = torch.cat([a * cos - b * sin, b * cos + a * sin], -1)
    return turned.to(x.dtype)


def _values(
    sizes: Sizes, *shapes: tuple[int, ...]
) -> Callable[[torch.device], tuple[Tensor, ...]]:
    def make(device: torch.device) -> tuple[Tensor, ...]:
        return tuple(normal(device, sizes.dtype, *shape) for shape in shapes)

    return make


def _keyed(
    sizes: Sizes, shape: tuple[int, ...]
) -> Callable[[torch.device], tuple[Tensor, ...]]:
    """``x``, bias, residual and a key."""

    def make(device: torch.device) -> tuple[Tensor, ...]:
        tensors = _values(sizes, shape, shape[1:], shape)(device)
        return (*tensors, torch.full((), 7, device=device))

    return make


def _turned(
    sizes: Sizes, shape: tuple[int, ...]
) -> Callable[[torch.device], tuple[Any, ...]]:
    """Queries [heads, T, K], and the tables as one argument, which has no gradient."""

    def make(device: torch.device) -> tuple[Any, ...]:
        _, tokens, width = shape
        x = normal(device, sizes.dtype, *shape)
        angles = normal(device, torch.float32, tokens, width // 2)
        return x, (angles.cos(), angles.sin())

    return make


def _two(
    sizes: Sizes,
    layer: Layer,
    shape: tuple[int, ...],
    passes: tuple[float, float],
    make: Callable[[torch.device], tuple[Any, ...]],
    bars: tuple[tuple[Bar, ...], tuple[Bar, ...]] = ((), ()),
) -> Iterator[Case]:
    """Forward and backward apart, with so many passes over a tensor of this shape."""
    for kind, ways, count, some in zip(
        ("forward", "backward"), (forward, backward), passes, bars, strict=True
    ):
        yield Case(
            f"{layer.label}/{kind}/{_name(sizes, shape)}",
            int(count * math.prod(shape) * sizes.dtype.itemsize),
            ways(layer, make),
            some,
            _bound(sizes),
        )


def _name(sizes: Sizes, shape: tuple[int, ...]) -> str:
    dtype = str(sizes.dtype).removeprefix("torch.")
    return f"{dtype}/{'x'.join(map(str, shape))}"


def _bound(sizes: Sizes) -> float:
    """Eager torch rounds every operation; a few roundings of the dtype."""
    return 16 * torch.finfo(sizes.dtype).eps
