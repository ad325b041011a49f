# SPDX-License-Identifier: Apache-2.0
"""The count of live tensors, on sizes that are known."""

import torch

from zfunc.bench.memory import live_peak, peak_rss_bytes

CPU = torch.device("cpu")
KB = 1024


def test_what_was_made_before_the_restart_still_counts():
    with live_peak(CPU, counted=True) as live:
        kept = torch.zeros(KB, dtype=torch.uint8)
        torch.zeros(9 * KB, dtype=torch.uint8)  # dead before the restart
        live.restart()
        torch.zeros(KB, dtype=torch.uint8)
    assert live.peak_bytes == 2 * KB
    del kept


def test_views_share_and_freed_storages_are_gone():
    with live_peak(CPU, counted=True) as live:
        live.restart()
        base = torch.zeros(KB, dtype=torch.uint8)
        base[: KB // 2].view(2, -1).add_(1)
        del base
        torch.zeros(KB, dtype=torch.uint8)
    assert live.peak_bytes == KB


def test_a_storage_resized_to_nothing_counts_nothing():
    with live_peak(CPU, counted=True) as live:
        unsharded = torch.zeros(8 * KB, dtype=torch.uint8)
        unsharded.untyped_storage().resize_(0)
        live.restart()
        torch.zeros(KB, dtype=torch.uint8)
    assert live.peak_bytes == KB


def test_tensors_without_memory_count_nothing():
    with live_peak(CPU, counted=True) as live:
        live.restart()
        torch.zeros(KB, device="meta")
    assert live.peak_bytes == 0


def test_what_cannot_be_counted_is_unknown():
    with live_peak(CPU, counted=False) as live:
        live.restart()
    assert live.peak_bytes is None


def test_peak_rss_is_in_bytes():
    assert 10e6 < peak_rss_bytes() < 1e12
