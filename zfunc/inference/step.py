# SPDX-License-Identifier: Apache-2.0
"""A generation as a fold: the state, and the step from one token to the next.

Shape suffixes: B batch, N new tokens, V vocabulary.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from torch import Tensor

from zfunc.core.tree import PyTree, pytree
from zfunc.inference.linear import FastLinear
from zfunc.inference.options import Request
from zfunc.inference.sampling import choose
from zfunc.inference.streamed import streamed
from zfunc.models.decoding import Decoder


@pytree
class Decoding:
    """Everything that changes from one token to the next; tensors of fixed shapes.

    Args:
      cache: The decoder's.
      token: The last token of each row, ``[B, 1]``.
      ids: What was generated, ``[B, N]``; padding where nothing is yet.
      lengths: How many tokens of it each row has, its end included, ``[B]``.
      finished: Which rows have ended, ``[B]``.
      broken: Which rows had logits that are not numbers, ``[B]``.
      step: How many tokens were chosen, 0-d.
      keys: The random key of each row, ``[B]``.
    """

    cache: Any
    token: Tensor
    ids: Tensor
    lengths: Tensor
    finished: Tensor
    broken: Tensor
    step: Tensor
    keys: Tensor


def begun(cache: Any, keys_B: Tensor, request: Request) -> Decoding:
    """The state before the first token.

    Args:
      cache: What the decoder knows of the prompt.
      keys_B: One random key per row.
      request: What was asked for.

    Examples:
      >>> from zfunc.inference.sampling import Sampling
      >>> begun(None, torch.arange(2), Request(3, Sampling(), (7,), 0)).ids
      tensor([[0, 0, 0],
              [0, 0, 0]])
    """
    rows, device = keys_B.shape[0], keys_B.device
    shape = (rows, request.max_new_tokens)
    return Decoding(
        cache=cache,
        token=torch.zeros(rows, 1, dtype=torch.int64, device=device),
        ids=torch.full(shape, request.pad, dtype=torch.int64, device=device),
        lengths=torch.zeros(rows, dtype=torch.int64, device=device),
        finished=torch.zeros(rows, dtype=torch.bool, device=device),
        broken=torch.zeros(rows, dtype=torch.bool, device=device),
        step=torch.zeros((), dtype=torch.int64, device=device),
        keys=keys_B,
    )


def chosen(
    state: Decoding, logits_BV: Tensor, cache: Any, request: Request
) -> Decoding:
    """The state with one more token, by the logits of the last.

    Args:
      state: Before it.
      logits_BV: The logits of the last position.
      cache: That goes with them.
      request: What was asked for.

    Examples:
      >>> from zfunc.inference.sampling import Sampling
      >>> request = Request(2, Sampling(), (1,), 9)
      >>> state = begun(None, torch.arange(1), request)
      >>> state = chosen(state, torch.tensor([[0.0, 1.0]]), None, request)
      >>> state.ids, state.lengths, state.finished
      (tensor([[1, 9]]), tensor([1]), tensor([True]))
    """
    token_B, broken_B = choose(logits_BV, request.how, state.keys, state.step)
    finished_B = state.finished
    if request.eos:
        token_B = token_B.masked_fill(finished_B, request.pad)
    lengths_B = state.lengths + ~finished_B
    for end in request.eos:
        finished_B = finished_B | (token_B == end)
    return Decoding(
        cache=cache,
        token=token_B[:, None],
        ids=state.ids.index_copy(1, state.step[None], token_B[:, None]),
        lengths=lengths_B,
        finished=finished_B,
        broken=state.broken | (broken_B & ~state.finished),
        step=state.step + 1,
        keys=state.keys,
    )


def decoded(
    decoder: Decoder, request: Request, params: PyTree, state: Decoding, donate: bool
) -> Decoding:
    """The state with one more token: the model reads the last one, and one is chosen.

    Args:
      decoder: Reads it.
      request: What was asked for.
      params: Whole, or placed; these are gathered as they are used.
      state: Before it.
      donate: Whether the cache is written over.
    """
    with FastLinear():
        logits_BTV, cache = decoder.apply(
            streamed(params), state.token, state.cache, donate=donate
        )
    return chosen(state, logits_BTV[:, -1], cache, request)


def read_prompt(
    decoder: Decoder,
    params: PyTree,
    ids: Tensor,
    attention_mask: Tensor | None,
    cache: Any,
) -> tuple[Tensor, Any]:
    """The logits after the prompt, and the cache that knows it.

    Args:
      decoder: Reads it; an encoder-decoder encodes it, and reads its first token.
      params: Whole, or placed.
      ids: The prompt.
      attention_mask: None where nothing is padded.
      cache: An empty one, which is written over.
    """
    weights = streamed(params)
    if decoder.encode is not None and decoder.start is not None:
        cache = decoder.encode(weights, ids, cache, attention_mask=attention_mask)
        ids, attention_mask = first_tokens(ids, decoder.start), None
    with FastLinear():
        logits_BTV, cache = decoder.apply(
            weights, ids, cache, attention_mask=attention_mask, donate=True
        )
    return logits_BTV[:, -1], cache


def first_tokens(ids: Tensor, start: int) -> Tensor:
    """What an encoder-decoder begins each row with.

    Examples:
      >>> first_tokens(torch.tensor([[3, 4], [5, 6]]), 0)
      tensor([[0],
              [0]])
    """
    return torch.full_like(ids[:, :1], start)


def without_cache(state: Decoding) -> Decoding:
    """The state without what only the next step needs."""
    return dataclasses.replace(state, cache=None)
