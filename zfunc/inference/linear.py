# SPDX-License-Identifier: Apache-2.0
"""Products with large weights on the CPU, by the library that reads them fastest.

A decode step is as fast as its weights are read. For few rows in float32 torch calls
MKL, which read a weight of ``nn.Linear`` at 20 GB/s where oneDNN did at 28 (one thread
of a Xeon, 1024 x 2816, torch 2.13, 2026-11-21); other dtypes go to oneDNN already.
"""

from __future__ import annotations

from typing import Any, Final

import torch
import torch.nn.functional as F
from torch.overrides import TorchFunctionMode

from zfunc.transforms.gathered import GatherOnUse

# Smaller weights stay in a cache, and a call of oneDNN costs 10 us more.
LARGE_BYTES: Final = 1 << 20


class FastLinear(TorchFunctionMode):
    """Computes ``F.linear`` with large float32 weights by oneDNN; for inference only.

    Autocast, other layouts and shapes that do not fit are left to ``F.linear``.

    Laws: ``F.linear``, to rounding; the same bits whether it is traced or not.

    Examples:
      >>> x, w = torch.randn(1, 512), torch.randn(512, 512)
      >>> with torch.no_grad(), FastLinear():
      ...     y = F.linear(x, w)
      >>> bool(torch.allclose(y, x @ w.T, atol=1e-4))
      True
    """

    def __torch_function__(
        self, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        plain = func is F.linear and not kwargs and not torch.is_autocast_enabled("cpu")
        if plain and _is_for_onednn(*args):
            x, weight, *bias = args
            # detach() of a parameter in pieces is the gathered tensor.
            rest = (*bias, None)[0]
            return torch.ops.mkldnn._linear_pointwise(
                x, weight.detach(), rest, "none", [], ""
            )
        return func(*args, **kwargs)


def _is_for_onednn(x: Any, weight: Any, bias: Any = None) -> bool:
    return bool(
        weight.dtype == x.dtype == torch.float32
        and weight.ndim == 2
        and x.shape[-1:] == weight.shape[1:]
        and (bias is None or _is_dense(bias, weight.shape[0]))
        and weight.device.type == "cpu"
        and weight.numel() * 4 >= LARGE_BYTES
        and torch.backends.mkldnn.is_available()
        and torch.backends.mkldnn.enabled
        and hasattr(torch.ops.mkldnn, "_linear_pointwise")
    )


def _is_dense(bias: Any, width: int) -> bool:
    """Whether it is read as it lies: oneDNN is not told of strides, or of one for all.

    A parameter in pieces is dense once it is gathered.
    """
    return bool(
        bias.dtype == torch.float32
        and bias.shape == (width,)
        and (type(bias) is GatherOnUse or bias.is_contiguous())
    )
