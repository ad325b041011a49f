# SPDX-License-Identifier: Apache-2.0
"""What ``generate`` is asked for, checked before anything is computed."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, Final, NamedTuple

import torch
from torch import Tensor

from zfunc.inference.sampling import Sampling
from zfunc.models.decoding import Decoder

# Logits of 1e8 over it are still numbers in float32.
LEAST_TEMPERATURE: Final = 1e-30


class Request(NamedTuple):
    """Everything about a generation that is not a tensor; part of what is traced."""

    max_new_tokens: int
    how: Sampling
    eos: tuple[int, ...]
    pad: int


def checked_request(
    decoder: Decoder,
    max_new_tokens: Any,
    how: Sampling,
    eos: Any,
    pad: Any,
) -> Request:
    """The request, if each option can be used and none would be ignored.

    Args:
      decoder: Gives the vocabulary.
      max_new_tokens: A positive integer.
      how: Temperature and filters.
      eos: None, an id or several.
      pad: None or an id.

    Raises:
      ValueError: An option is out of range, or has no effect.

    Examples:
      >>> from zfunc.models.decoding import uncached
      >>> one = uncached(lambda params, ids: ids)
      >>> checked_request(one, 8, Sampling(), [2, 3], None)
      Request(max_new_tokens=8, how=Sampling(...), eos=(2, 3), pad=2)
    """
    _require(
        _is_int(max_new_tokens) and max_new_tokens >= 1,
        f"got max_new_tokens={max_new_tokens!r}, expected a positive integer",
    )
    _check_sampling(how)
    ends = _ids(eos, "eos", decoder.vocab_size)
    _require(
        pad is None or bool(ends),
        f"got pad={pad!r} without eos: pad is what follows a row's end. Pass eos=..., "
        "or leave pad out",
    )
    padding = _ids(pad, "pad", decoder.vocab_size)
    _require(len(padding) <= 1, f"got pad={pad!r}, expected one id")
    return Request(max_new_tokens, how, ends, (*padding, *ends, 0)[0])


def _check_sampling(how: Sampling) -> None:
    temperature, top_k, top_p = how.temperature, how.top_k, how.top_p
    _require(
        _is_number(temperature) and math.isfinite(temperature) and temperature >= 0,
        f"got temperature={temperature!r}, expected a number from 0 (the most likely "
        "token) on",
    )
    _require(
        temperature == 0 or temperature >= LEAST_TEMPERATURE,
        f"got temperature={temperature!r}, by which logits in float32 cannot be "
        "divided: type 0 for the most likely token",
    )
    _require(
        top_k is None or (_is_int(top_k) and top_k >= 1),
        f"got top_k={top_k!r}, expected a positive integer, or None for all tokens",
    )
    _require(
        top_p is None or (_is_number(top_p) and 0 < top_p <= 1),
        f"got top_p={top_p!r}, expected a probability in (0, 1], or None for all",
    )
    for name, value in (("top_k", top_k), ("top_p", top_p)):
        _require(
            value is None or temperature > 0,
            f"got {name}={value!r} with temperature=0, which takes the most likely "
            f"token: pass temperature=1.0 to draw, or leave {name} out",
        )


def checked_prompt(
    ids: Any, attention_mask: Any, decoder: Decoder, request: Request
) -> tuple[Tensor, Tensor | None]:
    """The prompt as int64, and its mask if anything is padded.

    Args:
      ids: The prompt.
      attention_mask: None, or 0 for padding.
      decoder: Gives the vocabulary and the number of positions.
      request: Gives the number of new tokens.

    Raises:
      TypeError: ``ids`` or the mask is no tensor.
      ValueError: Shapes, dtypes or values that are not those of a prompt, or more
        tokens than the model has positions.
    """
    _check_ids(ids, decoder)
    longest = ids.shape[1] if decoder.encode is None else 1
    if attention_mask is not None:
        _check_mask(attention_mask, ids, left=decoder.encode is None)
        if decoder.encode is None:
            longest = int(attention_mask.sum(1).max())
        if bool((attention_mask != 0).all()):
            attention_mask = None
    limit = decoder.max_positions
    wanted = longest + request.max_new_tokens
    _require(
        limit is None or wanted <= limit,
        f"got a prompt of {longest} tokens and max_new_tokens="
        f"{request.max_new_tokens}, {wanted} positions, and the model has {limit}: "
        + (
            f"type max_new_tokens={limit - longest}"
            if limit is not None and limit > longest
            else "crop the prompt"
        ),
    )
    return ids.to(torch.int64), attention_mask


def check_unpadded(attention_mask: Tensor | None) -> None:
    """Raise for padding, of which a plain function is not told.

    Args:
      attention_mask: As ``checked_prompt`` returns it.

    Raises:
      ValueError: There is padding.

    Examples:
      >>> check_unpadded(None)
    """
    _require(
        attention_mask is None,
        "got an attention_mask with padding for a plain function of (params, ids), "
        "which is not told of it: generate rows of one length together, or pass a "
        "Decoder",
    )


def _check_ids(ids: Any, decoder: Decoder) -> None:
    if not isinstance(ids, Tensor):
        raise TypeError(
            f"generate: ids are a {type(ids).__name__}, expected a tensor: type "
            "torch.tensor([[...]])"
        )
    _require(
        ids.ndim == 2 and ids.dtype in (torch.int32, torch.int64) and ids.numel() > 0,
        f"ids are {ids.dtype} {tuple(ids.shape)}, expected int64 [B, T] with at least "
        "one token per row; use ids.long(), and ids[None] for a single prompt",
    )
    low, high = int(ids.min()), int(ids.max())
    size = decoder.vocab_size
    _require(
        low >= 0 and (size is None or high < size),
        f"ids are from {low} to {high}, expected 0 to "
        f"{'' if size is None else size - 1}: the tokenizer is of another model",
    )


def _check_mask(mask: Any, ids: Tensor, *, left: bool) -> None:
    if not isinstance(mask, Tensor):
        raise TypeError(
            f"generate: attention_mask is a {type(mask).__name__}, expected a tensor"
        )
    _require(
        mask.shape == ids.shape,
        f"attention_mask has shape {tuple(mask.shape)}, expected that of ids, "
        f"{tuple(ids.shape)}",
    )
    kept = mask != 0
    _require(
        bool(((mask == 0) | (mask == 1)).all()),
        "attention_mask has values other than 0 and 1",
    )
    _require(bool(kept.any(1).all()), "attention_mask has a row without a token")
    if left:
        rising = bool((kept[:, 1:] >= kept[:, :-1]).all())
        _require(
            rising,
            "attention_mask has padding after a token: a prompt is padded on the left, "
            "so that what is generated follows it. With a tokenizer of transformers: "
            'tokenizer.padding_side = "left"',
        )


def _ids(value: Any, name: str, size: int | None) -> tuple[int, ...]:
    """None, an id or several as a tuple."""
    if value is None:
        return ()
    several = isinstance(value, Sequence) and not isinstance(value, str)
    ids = tuple(value) if several else (value,)
    for one in ids:
        _require(
            _is_int(one) and one >= 0 and (size is None or one < size),
            f"got {name}={value!r}, expected ids from 0 to "
            f"{'the size of the vocabulary' if size is None else size - 1}",
        )
    _require(len(ids) > 0, f"got {name}={value!r}, expected an id, or None")
    return ids


def _is_int(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _require(condition: bool, problem: str) -> None:
    if not condition:
        raise ValueError(f"generate: {problem}")
