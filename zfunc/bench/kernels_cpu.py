# SPDX-License-Identifier: Apache-2.0
"""What is measured on a CPU: the paths there that are not eager torch."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from zfunc.bench.kernel_case import Bar, Case
from zfunc.bench.kernels_layers import FULL, Sizes, linear_case
from zfunc.bench.kernels_optimizers import adamw_mixed, adamw_same, lists

# 64 MiB in each tensor of the optimizer, 256 MiB of logits.
FULL_CPU = FULL._replace(
    num_params=1 << 24, tokens=2048, hidden=256, vocab=32768, dtype=torch.float32
)


def cpu_cases(sizes: Sizes = FULL_CPU) -> Iterator[Case]:
    """Every case of a CPU.

    Args:
      sizes: The bars are those of the default.
    """
    num_params = sizes.num_params
    yield Case(
        f"adamw/mixed/bfloat16/{num_params}",
        28 * num_params,
        lambda device: adamw_mixed(
            lists(device, num_params, num_params, torch.bfloat16), "auto"
        ),
        (Bar("faster", 1 / 1.10, "fused"), Bar("faster", 2.8, "chain")),
    )
    yield Case(
        f"adamw/same/float32/{num_params}",
        28 * num_params,
        lambda device: adamw_same(
            lists(device, num_params, num_params, torch.float32), "auto"
        ),
        (Bar("faster", 0.95, "fused"),),
    )
    logits_bytes = 4 * sizes.tokens * sizes.vocab
    bars = (Bar("faster", 1 / 1.05, "eager"), Bar("leaner", 4.0, "eager"))
    yield linear_case(sizes, logits_bytes // 16, "auto", bars)
