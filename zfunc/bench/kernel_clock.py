# SPDX-License-Identifier: Apache-2.0
"""Time, launches and memory of one call, on a CPU and on a GPU."""

from __future__ import annotations

import contextlib
import os
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any, Protocol

import torch
from torch import Tensor

from zfunc.bench.kernel_case import Way
from zfunc.core.tree import tree_leaves

# Larger than the caches of the GPUs we know (50 MB on an H100, 126 MB on a B200).
_FLUSHED_BYTES = 256 << 20
# About 10 ms: the host has then handed over the whole call before the device begins.
_AHEAD_CYCLES = 20_000_000
_HOST_CALLS = 20


class Clock(Protocol):
    """What can be known of a call on a device."""

    device: torch.device

    def device_s(self, way: Way) -> float:
        """Seconds of one call on the device, with cold caches on a GPU."""
        ...

    def host_s(self, way: Way) -> float | None:
        """Seconds until a call returns, while the device has nothing to do."""
        ...

    def launches(self, way: Way) -> int | None:
        """Kernels and copies of one call on the device."""
        ...

    def workspace_bytes(self, way: Way) -> int | None:
        """The most that a call allocates, without its results."""
        ...


class CpuClock:
    """The wall clock; host and device are one."""

    device = torch.device("cpu")

    def device_s(self, way: Way) -> float:
        """Seconds of one call."""
        begun_s = time.perf_counter()
        way()
        return time.perf_counter() - begun_s

    def host_s(self, way: Way) -> float | None:
        """Not apart from the device."""
        return None

    def launches(self, way: Way) -> int | None:
        """Not counted."""
        return None

    def workspace_bytes(self, way: Way) -> int | None:
        """What the allocator tells the profiler: inside operators too."""
        kinds = [torch.profiler.ProfilerActivity.CPU]
        with (
            _quiet(),
            torch.profiler.profile(activities=kinds, profile_memory=True) as p,
        ):
            out = way()
        found: Any = p.profiler
        events = [e for e in found.kineto_results.events() if e.name() == "[memory]"]
        held_bytes = peak_bytes = 0
        for event in sorted(events, key=lambda e: int(e.start_ns())):
            held_bytes += event.nbytes()
            peak_bytes = max(peak_bytes, held_bytes)
        return max(0, peak_bytes - _storage_bytes((way.args, out), but=way.args))


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """The profiler's library writes to the descriptor of stderr that it started."""
    sys.stderr.flush()
    kept = os.dup(2)
    nowhere = os.open(os.devnull, os.O_WRONLY)
    try:
        os.dup2(nowhere, 2)
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)
        os.close(nowhere)


class CudaClock:
    """Events around a call that the host hands over ahead of the device.

    Args:
      device: A CUDA device.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._flushed = torch.empty(_FLUSHED_BYTES, dtype=torch.int8, device=device)

    def device_s(self, way: Way) -> float:
        """Seconds of one call after the cache was filled with something else."""
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        self._flushed.zero_()
        torch.cuda._sleep(_AHEAD_CYCLES)
        begin.record()
        way()
        end.record()
        end.synchronize()
        return 1e-3 * float(begin.elapsed_time(end))

    def host_s(self, way: Way) -> float | None:
        """The median of calls that each find the device idle."""
        times_s = []
        for _ in range(_HOST_CALLS):
            torch.cuda.synchronize(self.device)
            begun_s = time.perf_counter()
            way()
            times_s.append(time.perf_counter() - begun_s)
        return statistics.median(times_s)

    def launches(self, way: Way) -> int | None:
        """What the profiler sees on the device; None where it sees nothing."""
        activities = [torch.profiler.ProfilerActivity.CUDA]
        if not set(activities) <= torch.profiler.supported_activities():
            return None
        torch.cuda.synchronize(self.device)  # what is still on its way is not counted
        with _quiet(), torch.profiler.profile(activities=activities) as profile:
            way()
            torch.cuda.synchronize(self.device)
        seen = [e for e in profile.events() or () if "CUDA" in str(e.device_type)]
        return len(seen) or None

    def workspace_bytes(self, way: Way) -> int | None:
        """What the allocator counts."""
        torch.cuda.synchronize(self.device)
        before_bytes = torch.cuda.memory_allocated(self.device)
        torch.cuda.reset_peak_memory_stats(self.device)
        out = way()
        peak_bytes = torch.cuda.max_memory_allocated(self.device) - before_bytes
        return max(0, peak_bytes - _storage_bytes((way.args, out), but=way.args))


def _storage_bytes(tree: Any, but: Any = ()) -> int:
    """The bytes of the storages of a tree's tensors, without those of another."""
    found = {
        x.untyped_storage().data_ptr(): x.untyped_storage().nbytes()
        for x in tree_leaves(tree)
        if isinstance(x, Tensor)
    }
    for x in tree_leaves(but):
        if isinstance(x, Tensor):
            found.pop(x.untyped_storage().data_ptr(), None)
    return sum(found.values())


def make_clock(device: torch.device) -> Clock:
    """The clock of a device.

    Args:
      device: A CPU or a CUDA device.

    Examples:
      >>> make_clock(torch.device("cpu")).device
      device(type='cpu')
    """
    return CudaClock(device) if device.type == "cuda" else CpuClock()


def roof(clock: Clock, numel: int, rounds: int) -> float:
    """Bytes per second of the simplest pass over memory, read and written together.

    On a GPU a copy; on a CPU an addition in place, since a copy to fresh memory there
    reads it first and is no roof.

    Args:
      clock: Of the device.
      numel: float32 elements of each tensor: more than the caches hold.
      rounds: Timed calls; the least time counts.
    """
    x, y = (torch.ones(numel, device=clock.device) for _ in range(2))
    call: Callable[..., Any] = Tensor.copy_ if x.is_cuda else Tensor.add_
    passes = 2 if x.is_cuda else 3
    way = Way(call, (x, y))
    way()
    return passes * 4 * numel / min(clock.device_s(way) for _ in range(rounds))
