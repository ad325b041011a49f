# SPDX-License-Identifier: Apache-2.0
"""The layer kernels that are measured on a GPU: sizes, peers and bars, as data."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from zfunc.bench.kernel_case import Bar, Case, Layer, backward, forward


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
    """

    numel: int
    widths: tuple[int, ...]
    tokens: int
    hidden: int
    vocab: int
    num_params: int
    dtype: torch.dtype


# 256 MiB in each activation, 1e9 parameters.
FULL = Sizes(
    1 << 27,
    (2048, 4096, 8192, 16384, 32768),
    8192,
    4096,
    131072,
    1_000_000_000,
    torch.bfloat16,
)
# Seconds, to try the command; in float32, which the interpreter computes rightly.
TINY = Sizes(1 << 10, (64,), 16, 8, 96, 3000, torch.float32)


def normal(device: torch.device, dtype: torch.dtype, *shape: int) -> Tensor:
    """Standard normal values of a fixed seed.

    Args:
      device: Where.
      dtype: Of the values.
      *shape: Theirs.
    """
    generator = torch.Generator(device).manual_seed(0)
    return torch.randn(shape, device=device, generator=generator).to(dtype)


SWIGLU = Layer(
    "swiglu",
    "swiglu",
    lambda fn: lambda gate, up: fn(gate, up, kernel="triton"),
    lambda gate, up: F.silu(gate) * up,
    lambda liger: liger.liger_swiglu,
)


def layer_cases(sizes: Sizes) -> Iterator[Case]:
    """Every case, in the order of the files.

    Args:
      sizes: ``FULL``, or ``TINY`` to try.
    """
    yield from _elementwise(sizes, SWIGLU, (3, 5), _two)


def _two(sizes: Sizes, width: int) -> Callable[[torch.device], tuple[Any, ...]]:
    def make(device: torch.device) -> tuple[Tensor, Tensor]:
        shape = (sizes.numel // width, width)
        x, y = (normal(device, sizes.dtype, *shape) for _ in range(2))
        return x, y

    return make


def _elementwise(
    sizes: Sizes,
    layer: Layer,
    passes: tuple[int, int],
    make: Callable[..., Any],
    bars: tuple[tuple[Bar, ...], tuple[Bar, ...]] = ((), ()),
) -> Iterator[Case]:
    """Forward and backward at the second width, with so many passes over memory."""
    width = sizes.widths[min(1, len(sizes.widths) - 1)]
    args = make(sizes, width)
    for kind, ways, count, some in zip(
        ("forward", "backward"), (forward, backward), passes, bars, strict=True
    ):
        yield Case(
            f"{layer.name}/{kind}/{_name(sizes)}/{sizes.numel // width}x{width}",
            count * sizes.numel * sizes.dtype.itemsize,
            ways(layer, args),
            some,
            _bound(sizes),
        )


def _name(sizes: Sizes) -> str:
    return str(sizes.dtype).removeprefix("torch.")


def _bound(sizes: Sizes) -> float:
    """Eager torch rounds every operation; a few roundings of the dtype."""
    return 16 * torch.finfo(sizes.dtype).eps
