# SPDX-License-Identifier: Apache-2.0
"""Live tensor memory, counted: the bytes of all storages that are alive at once."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode

from zfunc.core.tree import PyTree, tree_leaves


class _LiveStorages(TorchDispatchMode):
    """Follows every storage that an operation returns, until it dies."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.live: dict[int, tuple[StorageWeakRef, int]] = {}
        self.peak = [0]

    def watch(self, tensors: list[torch.Tensor]) -> None:
        for tensor in tensors:
            if tensor.is_meta:  # sizes without memory
                continue
            storage = tensor.untyped_storage()
            key = storage._cdata
            if key not in self.live or self.live[key][0].expired():
                self.live[key] = (StorageWeakRef(storage), storage.nbytes())
        dead = [key for key, (ref, _) in self.live.items() if ref.expired()]
        for key in dead:
            del self.live[key]
        self.peak[0] = max(self.peak[0], sum(size for _, size in self.live.values()))

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        out = func(*args, **(kwargs or {}))
        self.watch([x for x in tree_leaves(out) if isinstance(x, torch.Tensor)])
        return out


def peak_live_bytes(
    fn: Callable[..., Any], *args: PyTree, donated: bool = False
) -> tuple[Any, int]:
    """``fn(*args)`` and the most bytes of tensors that were alive at once during it.

    Counts storages, not tensors (views share), of the arguments and of everything made
    by an operation in this process; not the allocator's or the backend's own buffers.
    With ``donated`` the arguments are given up: pass them without keeping a reference.

    Example:
      >>> _, peak = peak_live_bytes(lambda x: (x + 1).sum(), torch.zeros(1000))
      >>> 8000 <= peak < 8100
      True
    """
    mode = _LiveStorages()
    mode.watch([x for x in tree_leaves(args) if isinstance(x, torch.Tensor)])
    owned = list(args)
    if donated:
        del args
    with mode:
        out = fn(*[owned.pop(0) for _ in range(len(owned))])
    return out, mode.peak[0]
