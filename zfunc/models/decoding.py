# SPDX-License-Identifier: Apache-2.0
"""``Decoder``: a model read one token at a time, with what it has read as a pytree.

The cache is preallocated and its shapes never change, so a decode step is one program
that is traced once. Every row writes to the same slot: rows of other lengths are padded
on the left, and ``mask`` says which slots hold a token.

Shape suffixes: B batch, T new tokens, S slots, V vocabulary.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from zfunc.core.tree import PyTree, pytree


@pytree
class KVCache:
    """What a decoder has read; a pytree of tensors whose shapes never change.

    Args:
      keys: One tensor ``[B, heads, S, head dim]`` per layer.
      values: Likewise.
      mask: bool ``[B, S]``, true where a slot holds a token of the row.
      length: int64, 0-d: the number of slots in use, padding included.
      extra: What else a model keeps, such as the keys of its cross-attention.

    Examples:
      >>> cache = kv_cache([(2, 4)], batch_size=3, max_len=8)
      >>> cache.keys[0].shape, cache.mask.shape, int(cache.length)
      (torch.Size([3, 2, 8, 4]), torch.Size([3, 8]), 0)
    """

    keys: tuple[Tensor, ...]
    values: tuple[Tensor, ...]
    mask: Tensor
    length: Tensor
    extra: dict[str, Any]


class InitCache(Protocol):
    """An empty cache: ``init_cache(batch_size, max_len, dtype=None, device=None)``."""

    def __call__(
        self,
        batch_size: int,
        max_len: int,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
    ) -> Any:
        """The cache."""


class Apply(Protocol):
    """``apply(params, ids, cache, ...)``: new tokens to logits and the next cache."""

    def __call__(
        self,
        params: PyTree,
        ids: Tensor,
        cache: Any,
        *,
        attention_mask: Tensor | None = None,
        all_logits: bool = False,
        donate: bool = False,
    ) -> tuple[Tensor, Any]:
        """Logits ``[B, T or 1, V]``, and the cache with the new tokens."""


class Encode(Protocol):
    """What an encoder-decoder does with the prompt, once."""

    def __call__(
        self,
        params: PyTree,
        ids: Tensor,
        cache: Any,
        *,
        attention_mask: Tensor | None = None,
    ) -> Any:
        """The cache with the prompt, as the decoder's cross-attention reads it."""


@dataclass(frozen=True, eq=False)
class Decoder:
    r"""A causal model that reads new tokens and remembers those it has read.

    With logits :math:`f(x_1 \ldots x_t)` of the whole model, for any split of a text
    into ``a`` and ``b``: ``apply`` of ``b`` on the cache of ``a`` gives the logits of
    ``f(a + b)`` at the positions of ``b``.

    Args:
      init_cache: ``(batch_size, max_len, dtype=None, device=None)`` to an empty cache
        of ``max_len`` slots.
      apply: ``(params, ids, cache, *, attention_mask=None, all_logits=False,
        donate=False)`` to ``(logits, cache)``. ``ids`` are int64 ``[B, T]``: a prompt
        (T > 1) or the next token (T = 1). ``attention_mask`` ``[B, T]`` is 0 for the
        padding on the left of shorter rows (default: nothing is padding). Logits are
        ``[B, 1, V]`` of the last position, or ``[B, T, V]`` with ``all_logits``. The
        cache that is given stays as it was, except with ``donate``: then its buffers
        are written over, and only the one that is returned may be used.
      max_positions: The most tokens that a row may have, prompt included; None where
        positions do not end.
      vocab_size: Ids are below it.
      encode: For an encoder-decoder: reads the prompt into the cache, once. What is
        generated then begins with ``start``.
      start: The first token of the decoder of an encoder-decoder.
      programs: Decode steps that were traced for this decoder, by what they were
        traced for; ``zf.generate`` fills it, so a second call need not trace.

    Laws: ``donate=True`` gives the same bits; ``apply(p, ids)`` at once is ``apply``
    token by token, to rounding; a row of a padded batch is that row alone, to rounding.

    Examples:
      >>> from zfunc.models import GPTConfig, gpt, gpt_decoder
      >>> config = GPTConfig(d_model=32, n_layers=2, d_ff=64)
      >>> decoder, params = gpt_decoder.decoder(config), gpt.init(config)
      >>> cache = decoder.init_cache(1, 16)
      >>> logits, cache = decoder.apply(params, torch.tensor([[72, 105]]), cache)
      >>> logits, cache = decoder.apply(params, torch.tensor([[33]]), cache)
      >>> logits.shape, int(cache.length)
      (torch.Size([1, 1, 256]), 3)

    Differs from:
      ``past_key_values`` of transformers, which is an object that the model changes.
    """

    init_cache: InitCache
    apply: Apply
    max_positions: int | None = None
    vocab_size: int | None = None
    encode: Encode | None = None
    start: int | None = None
    programs: dict[Any, Any] = dataclasses.field(default_factory=dict, repr=False)


def kv_cache(
    sizes: list[tuple[int, int]],
    batch_size: int,
    max_len: int,
    dtype: torch.dtype | None = None,
    device: torch.device | str | None = None,
) -> KVCache:
    """An empty cache.

    Args:
      sizes: (heads, head dim) of each layer's keys and values.
      batch_size: Rows.
      max_len: Slots.
      dtype: Of keys and values; default: torch's default dtype.
      device: Default: torch's default device.

    Raises:
      ValueError: ``batch_size`` or ``max_len`` is not a positive integer.

    Examples:
      >>> kv_cache([(1, 2)], 1, 0)
      Traceback (most recent call last):
      ValueError: init_cache: got max_len=0, expected a positive integer
    """
    for name, value in (("batch_size", batch_size), ("max_len", max_len)):
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise ValueError(
                f"init_cache: got {name}={value!r}, expected a positive integer"
            )

    def slots() -> tuple[Tensor, ...]:
        return tuple(
            torch.zeros(batch_size, heads, max_len, width, dtype=dtype, device=device)
            for heads, width in sizes
        )

    return KVCache(
        slots(),
        slots(),
        torch.zeros(batch_size, max_len, dtype=torch.bool, device=device),
        torch.zeros((), dtype=torch.int64, device=device),
        {},
    )


@dataclass(frozen=True, eq=False)
class Reading:
    """One call of ``apply``: where the new tokens go, and what they may look at.

    Args:
      slots: The slots of the new tokens ``[T]``.
      mask: Which slots hold a token, the new ones included.
      positions: The position of each new token in its row; 0 for padding.
      donate: Whether buffers are written over.
    """

    slots: Tensor
    mask: Tensor
    positions: Tensor
    donate: bool

    def put(self, buffer: Tensor, new: Tensor) -> Tensor:
        """A buffer ``[B, heads, S, K]`` with new keys or values in their slots."""
        new = new.to(buffer.dtype)
        if self.donate:
            return buffer.index_copy_(2, self.slots, new)
        return buffer.index_copy(2, self.slots, new)

    def causal(self) -> Tensor:
        """What each new token may look at, bool ``[B, 1, T, S]``."""
        every = torch.arange(self.mask.shape[1], device=self.mask.device)
        past_TS = every[None, :] <= self.slots[:, None]
        return (past_TS & self.mask[:, None, :])[:, None]


def reading(
    ids: Tensor, cache: KVCache, attention_mask: Tensor | None, donate: bool
) -> Reading:
    """Where the tokens of a call of ``apply`` go.

    Raises:
      ValueError: Shapes or dtypes that are not those of ``Decoder.apply``, or more
        tokens than the cache has slots.

    Examples:
      >>> cache = kv_cache([(1, 2)], batch_size=2, max_len=4)
      >>> mask = torch.tensor([[0, 1, 1], [1, 1, 1]])
      >>> reading(torch.ones(2, 3, dtype=torch.int64), cache, mask, False).positions
      tensor([[0, 0, 1],
              [0, 1, 2]])
    """
    _check(ids, cache, attention_mask)
    length = ids.shape[1]
    slots = cache.length + torch.arange(length, device=ids.device)
    new_BT = (
        torch.ones_like(ids, dtype=torch.bool)
        if attention_mask is None
        else attention_mask.to(torch.bool)
    )
    before_B1 = cache.mask.sum(1, keepdim=True)
    positions_BT = (before_B1 + new_BT.cumsum(1) - 1).clamp(min=0)
    put = cache.mask.index_copy_ if donate else cache.mask.index_copy
    return Reading(slots, put(1, slots, new_BT), positions_BT, donate)


def _check(ids: Tensor, cache: KVCache, attention_mask: Tensor | None) -> None:
    """Static checks only (shapes and dtypes), so that tracing sees none of them."""
    batch_size, slots = cache.mask.shape
    if ids.ndim != 2 or ids.dtype not in (torch.int32, torch.int64):
        raise ValueError(
            f"Decoder.apply: ids are {ids.dtype} {tuple(ids.shape)}, expected int64 "
            "[B, T]; use ids.long(), and ids[None] for a single sequence"
        )
    if ids.shape[0] != batch_size or not 1 <= ids.shape[1] <= slots:
        raise ValueError(
            f"Decoder.apply: got ids {tuple(ids.shape)} for a cache of {batch_size} "
            f"rows and {slots} slots; make one with init_cache({ids.shape[0]}, "
            f"{max(slots, ids.shape[1])})"
        )
    if attention_mask is not None and attention_mask.shape != ids.shape:
        raise ValueError(
            f"Decoder.apply: attention_mask has shape {tuple(attention_mask.shape)}, "
            f"expected that of ids, {tuple(ids.shape)}: it is about the new tokens only"
        )


def _check_logits(logits: Any, ids: Tensor) -> None:
    """Raise where a plain function returns something else."""
    shape = tuple(getattr(logits, "shape", ()))
    if not isinstance(logits, Tensor) or (len(shape), shape[:2]) != (3, ids.shape):
        rows, length = ids.shape
        raise ValueError(
            f"uncached: of ids [{rows}, {length}] the function makes a "
            f"{type(logits).__name__} {shape}, expected logits [{rows}, "
            f"{length}, V], those of every position"
        )


def uncached(apply: Callable[[PyTree, Tensor], Tensor]) -> Decoder:
    """A decoder of any causal function, which runs all that was read for each token.

    Quadratic work, for a model that has no decoder of its own, or to check one.

    Args:
      apply: ``(params, ids [B, S])`` to logits ``[B, S, V]``, where those at a position
        depend on no later one.

    Returns:
      A decoder whose cache is the tokens themselves. It takes no padded batches.

    Examples:
      >>> def count(params, ids):  # the next token is the last one plus one
      ...     return torch.nn.functional.one_hot((ids + 1) % 5, 5).float()
      >>> decoder = uncached(count)
      >>> logits, _ = decoder.apply(
      ...     {}, torch.tensor([[2, 3]]), decoder.init_cache(1, 8)
      ... )
      >>> logits.argmax(-1)
      tensor([[4]])
    """

    def init_cache(
        batch_size: int,
        max_len: int,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
    ) -> KVCache:
        empty = kv_cache([], batch_size, max_len, dtype, device)
        return dataclasses.replace(
            empty, extra={"ids": torch.zeros_like(empty.mask, dtype=torch.int64)}
        )

    def read(
        params: PyTree,
        ids: Tensor,
        cache: KVCache,
        *,
        attention_mask: Tensor | None = None,
        all_logits: bool = False,
        donate: bool = False,
    ) -> tuple[Tensor, KVCache]:
        if attention_mask is not None:
            raise ValueError(
                "uncached: got an attention_mask, expected rows of one length: a plain "
                "function of (params, ids) is not told of padding. Generate rows of "
                "one length together, or pass a Decoder."
            )
        where = reading(ids, cache, None, donate)
        known = cache.extra["ids"]
        put = known.index_copy_ if donate else known.index_copy
        known = put(1, where.slots, ids.to(torch.int64))
        logits = apply(params, known)
        _check_logits(logits, known)
        wanted = where.slots if all_logits else where.slots[-1:]
        new = KVCache((), (), where.mask, cache.length + ids.shape[1], {"ids": known})
        return logits.index_select(1, wanted), new

    return Decoder(init_cache, read)
