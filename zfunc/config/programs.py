# SPDX-License-Identifier: Apache-2.0
"""What keys of ZeRO's buckets become: passes of ``zf.jit``."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from zfunc.config.keys_zero import ZERO
from zfunc.program.passes import DEFAULT, bucket, keep_small, prefetch
from zfunc.program.program import Pass


def jit_options(
    given: Mapping[str, Any], stage: int, gather_bytes: int, reduce_bytes: int
) -> dict[str, Any]:
    """Arguments for ``zf.jit``: the default passes with the sizes that are given.

    Args:
      given: Values by path, of the keys in the configuration alone. Sizes count
        elements, as in DeepSpeed.
      stage: Of ZeRO.
      gather_bytes: Of an element that is gathered.
      reduce_bytes: Of an element that is reduced.

    Examples:
      >>> jit_options({}, 2, 4, 4)
      {}
    """
    changed: dict[str, Pass] = {}
    limits = []
    if (size := given.get(f"{ZERO}reduce_bucket_size")) is not None:
        limits.append(size * reduce_bytes)
    name = "stage3_prefetch_bucket_size" if stage == 3 else "allgather_bucket_size"
    ahead = given.get(f"{ZERO}{name}") if stage else None
    if ahead == 0 and stage == 3:
        changed["prefetched"] = prefetch(gathers=0)
    elif ahead is not None:
        limits.append(max(1, ahead * gather_bytes))
    if limits:
        changed["bucketed"] = bucket(bucket_bytes=min(limits))
    names = ("stage3_max_live_parameters", "stage3_max_reuse_distance")
    kept = [given[f"{ZERO}{name}"] for name in names if f"{ZERO}{name}" in given]
    if kept and stage == 3:
        changed["keep_small"] = keep_small(small_bytes=min(kept) * gather_bytes)
    if not changed:
        return {}
    return {"passes": tuple(changed.get(each.__name__, each) for each in DEFAULT)}
