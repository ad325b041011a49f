# SPDX-License-Identifier: Apache-2.0
"""What is measured on a CPU: the paths there that are not eager torch."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from zfunc.bench.kernel_case import Bar, Case
from zfunc.bench.kernels_optimizers import adamw_mixed, adamw_same, lists

NUM_PARAMS = 1 << 24


def cpu_cases(num_params: int = NUM_PARAMS) -> Iterator[Case]:
    """Every case of a CPU.

    Args:
      num_params: Of AdamW; the bars are those of the default.
    """
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
