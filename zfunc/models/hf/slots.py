# SPDX-License-Identifier: Apache-2.0
"""What the models of transformers see of a ``KVCache``: its ``Cache``, without state.

Imported when a decoder is made, since it needs transformers.
"""

from __future__ import annotations

from typing import Any

import torch
from transformers.cache_utils import Cache, CacheLayerMixin, EncoderDecoderCache

from zfunc.models.decoding import KVCache, Reading


class Slots(CacheLayerMixin):  # type: ignore[no-untyped-call]
    """The slots of one layer, for one forward: written once, read from then on."""

    # Then a mask is made for every decode step, whatever its values: one program.
    is_compileable = True

    def __init__(
        self, keys: torch.Tensor, values: torch.Tensor, length: Any, where: Any
    ) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.keys, self.values = keys, values
        self.is_initialized = True
        self.length, self.where = length, where
        self.size = keys.shape[2]
        self.written: list[tuple[torch.Tensor, torch.Tensor]] = []

    def lazy_initialization(self, key_states: Any, value_states: Any) -> None:
        """Nothing: the slots are there."""

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *_: Any, **__: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """All keys and values, with the new ones in their slots."""
        keys = self.where.put(self.keys, key_states)
        values = self.where.put(self.values, value_states)
        self.written.append((keys, values))
        return keys.to(key_states.dtype), values.to(value_states.dtype)

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """(Keys that a mask is about, the slot of the first)."""
        return self.size, 0

    def get_seq_length(self) -> Any:
        """Slots in use before this forward."""
        return self.length

    def get_max_length(self) -> int:
        """All slots."""
        return self.size


def view_of(cache: KVCache, where: Reading) -> tuple[Any, list[Slots]]:
    """The cache as transformers reads it, and the layers that it writes to.

    Args:
      cache: What was read so far.
      where: Where the new tokens go.
    """
    layers = [
        Slots(k, v, cache.length, where)
        for k, v in zip(cache.keys, cache.values, strict=True)
    ]
    own = Cache(layers=[*layers])
    if "cross_keys" not in cache.extra:
        return own, layers
    crossed = zip(cache.extra["cross_keys"], cache.extra["cross_values"], strict=True)
    cross = Cache(layers=[Slots(k, v, k.shape[2], where) for k, v in crossed])
    return EncoderDecoderCache(own, cross), layers
