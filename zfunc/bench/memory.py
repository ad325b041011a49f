# SPDX-License-Identifier: Apache-2.0
"""The most bytes of tensors that a contender keeps alive during one step."""

from __future__ import annotations

import resource
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils import _python_dispatch as dispatch
from torch.utils._pytree import tree_leaves


class LivePeak:
    """The peak since ``restart``; None where it cannot be counted."""

    def restart(self) -> None:
        """Forget the peak, not what is alive."""

    @property
    def peak_bytes(self) -> int | None:
        """The most bytes that were alive at once."""
        return None


class _Counted(LivePeak, dispatch.TorchDispatchMode):
    """Follows every storage that an operation returns, until it dies.

    A contender is built within it, so its buffers are known from the beginning, also
    those of C++ engines. Sizes are read anew each time: FSDP2 frees parameters by
    resizing their storage to nothing. (``zfunc.testing.memory`` follows one function
    and takes its arguments as what is alive before.)
    """

    def __init__(self) -> None:
        dispatch.TorchDispatchMode.__init__(self)
        self.live: dict[int, StorageWeakRef] = {}
        self.peak = [0]

    def restart(self) -> None:
        self.peak[0] = 0

    @property
    def peak_bytes(self) -> int | None:
        return self.peak[0]

    def _follow(self, tensor: torch.Tensor) -> None:
        wraps: bool = dispatch.is_traceable_wrapper_subclass(tensor)
        if wraps:  # a DTensor, whose local tensor is followed itself
            return
        storage = tensor.untyped_storage()
        if storage.device.type == "cpu":  # sizes without memory are on meta
            self.live[storage._cdata] = StorageWeakRef(storage)

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        out = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(out):
            if isinstance(leaf, torch.Tensor):
                self._follow(leaf)
        total_bytes = 0
        for key, reference in list(self.live.items()):
            storage: Any = torch.UntypedStorage._new_with_weak_ptr(reference.cdata)
            if storage is None:
                del self.live[key]
            else:
                total_bytes += storage.nbytes()
        self.peak[0] = max(self.peak[0], total_bytes)
        return out


class _OnCuda(LivePeak):
    """The allocator's own count, without what others hold."""

    def __init__(self) -> None:
        self.before_bytes = torch.cuda.memory_allocated()

    def restart(self) -> None:
        torch.cuda.reset_peak_memory_stats()

    @property
    def peak_bytes(self) -> int | None:
        return torch.cuda.max_memory_allocated() - self.before_bytes


@contextmanager
def live_peak(device: torch.device, *, counted: bool) -> Iterator[LivePeak]:
    """Within it, the tensors of a contender are counted: build it there.

    Args:
      device: Where they are. On CUDA the allocator counts them.
      counted: False if an operation on the CPU does not show them.

    Yields:
      What to restart before the step whose peak is wanted.

    Examples:
      >>> with live_peak(torch.device("cpu"), counted=True) as live:
      ...     kept = torch.zeros(1000)
      ...     live.restart()
      ...     x = kept + 1
      >>> live.peak_bytes
      8000
    """
    if device.type == "cuda":
        yield _OnCuda()
    elif counted:
        with _Counted() as mode:
            yield mode
    else:
        yield LivePeak()


def peak_rss_bytes() -> int:
    """The most memory that this process has held resident so far."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else 1024 * peak
