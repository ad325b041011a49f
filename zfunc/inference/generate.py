# SPDX-License-Identifier: Apache-2.0
"""``generate``: continuations of prompts, as a function of (params, ids, key)."""

from __future__ import annotations

import functools
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any, Final, NamedTuple

import torch
from torch import Tensor

from zfunc.core import collectives, random
from zfunc.core.state import TrainState
from zfunc.core.tree import PyTree, tree_leaves
from zfunc.inference.options import Request, checked_prompt, checked_request
from zfunc.inference.sampling import Sampling
from zfunc.inference.step import (
    Decoding,
    begun,
    chosen,
    decoded,
    first_tokens,
    read_prompt,
)
from zfunc.inference.streamed import check_streamable, sum_over, talking
from zfunc.models.decoding import Decoder, uncached
from zfunc.program.pure import Step, replayed, signature

# Every so many tokens the host asks whether all rows have ended.
ASK_EVERY: Final = 8
# Caches come in multiples of this, so that prompts of similar lengths share a program.
SLOTS: Final = 64
# A decoder keeps the programs of its last so many kinds of call.
PROGRAMS: Final = 8


class Generated(NamedTuple):
    """What ``generate`` returns.

    Attributes:
      ids: The prompt and its continuation, ``[B, T + n]`` for the n tokens of the
        longest row; what follows a row's end is padding. For an encoder-decoder the
        first column is the start token, in place of the prompt.
      lengths: Tokens generated for each row, its end included, ``[B]``.
      finished: Whether the row ended with ``eos``, ``[B]``.
    """

    ids: Tensor
    lengths: Tensor
    finished: Tensor


@torch.no_grad()
def generate(
    apply: Decoder | Callable[[PyTree, Tensor], Tensor],
    params: PyTree,
    ids: Tensor,
    *,
    max_new_tokens: int,
    attention_mask: Tensor | None = None,
    temperature: float = 0.0,
    top_k: int | None = None,
    top_p: float | None = None,
    eos: int | Sequence[int] | None = None,
    pad: int | None = None,
    key: int | Tensor = 0,
    jit: bool = True,
) -> Generated:
    r"""Continue prompts; a pure function of ``(params, ids, key)``.

    The prompt is read once; then each step reads one token and chooses the next,
    :math:`x_{t+1} \sim \mathrm{softmax}(f(x_{\le t}) / \tau)`, with a cache that is
    preallocated and written over in place.

    Parameters that are placed (``Sharded`` leaves) stay in pieces: each weight is
    gathered where the forward uses it and let go of after, so no rank holds the model
    (ZeRO-Inference). Each rank may have prompts of its own, or all the same. All ranks
    take the same number of steps: they stop when the last row of the last rank ends.

    Args:
      apply: A ``Decoder`` (``zf.models.decoder(...)``), or any causal
        function ``(params, ids)`` to logits ``[B, T, V]``, which is run on the whole
        text for each token.
      params: What ``apply`` takes, whole or placed over a mesh.
      ids: int64 ``[B, T]``.
      max_new_tokens: At most so many tokens per row.
      attention_mask: ``[B, T]``, 0 for padding, which is on the left. (On either side
        for an encoder-decoder.)
      temperature: 0 takes the most likely token; else divides the logits.
      top_k: Draw from the k most likely tokens only.
      top_p: Draw from the fewest tokens whose probabilities sum to p only.
      eos: The id, or ids, that end a row. None: rows do not end early.
      pad: What follows a row's end; default: the first of ``eos``.
      key: An integer, or a key per row (int64 ``[B]``). A row's tokens are a function
        of its prompt and its key; an integer gives row b ``zf.random.fold_in(key, b)``,
        so give keys where rows may change places.
      jit: Trace the decode step once, for these shapes and options, and replay it. The
        program stays with the decoder for later calls. (A plain function is not
        traced.)

    Returns:
      ``Generated(ids, lengths, finished)``.

    Raises:
      TypeError: ``apply``, ``ids`` or the mask is of another type.
      ValueError: An option out of range or without effect, padding on the right, more
        tokens than the model has positions, or logits that are not numbers.
      PlacementError: A leaf of ``params`` is sharded over two axes.
      TraceError: A decoder that cannot be traced.

    Laws: the tokens with ``jit`` and without it are the same, and those of placed
    parameters are those of whole ones; greedy tokens equal those of transformers'
    ``generate``.

    Examples:
      >>> from zfunc.models import GPTConfig, decoder, gpt
      >>> config = GPTConfig(d_model=32, n_layers=1, d_ff=64)
      >>> prompt = torch.tensor([[72, 101, 108, 108, 111]])
      >>> params = gpt.init(config)
      >>> generate(decoder(config), params, prompt, max_new_tokens=3).ids.shape
      torch.Size([1, 8])

    Differs from:
      ``model.generate`` of transformers, which reads a ``GenerationConfig`` and a
      global generator. Here nothing is read but the arguments.
    """
    decoder, traceable = _decoder_of(apply)
    if isinstance(params, TrainState):
        raise TypeError("generate: params are a TrainState: type state.params")
    how = Sampling(temperature, top_k, top_p)
    request = checked_request(decoder, max_new_tokens, how, eos, pad)
    ids, attention_mask = checked_prompt(ids, attention_mask, decoder, request)
    keys = _keys(key, ids)
    check_streamable(params)
    axes = talking(params)
    _agree(request, axes, ids.device)

    read = ids.shape[1] if decoder.encode is None else 1
    cache = decoder.init_cache(
        ids.shape[0],
        _rounded_up(read + max_new_tokens),
        dtype=_dtype(params),
        device=ids.device,
    )
    logits, cache = read_prompt(decoder, params, ids, attention_mask, cache)
    state = chosen(begun(None, keys, request), logits, cache, request)
    del cache
    step = _step(decoder, request, params, state, jit=jit and traceable)
    state = _run(step, params, state, request, axes)
    return _result(decoder, ids, state, axes)


def _decoder_of(apply: Any) -> tuple[Decoder, bool]:
    if isinstance(apply, Decoder):
        return apply, True
    if hasattr(apply, "generate") or hasattr(apply, "frozen"):
        raise TypeError(
            f"generate: apply is a {type(apply).__name__}: type params, loss_fn = "
            "zf.models.from_hf(model) and zf.generate(zf.models.decoder(loss_fn), ...)"
        )
    if not callable(apply):
        raise TypeError(
            f"generate: apply is a {type(apply).__name__}, expected a Decoder or a "
            "function (params, ids) to logits [B, T, V]"
        )
    return uncached(apply), False


def _keys(key: Any, ids: Tensor) -> Tensor:
    rows = ids.shape[0]
    if isinstance(key, int) and not isinstance(key, bool):
        key = torch.tensor(key, dtype=torch.int64)
    if not isinstance(key, Tensor) or key.dtype != torch.int64:
        what = key.dtype if isinstance(key, Tensor) else type(key).__name__
        raise TypeError(
            f"generate: key is of {what}, expected an int, or int64 keys [{rows}]"
        )
    if key.ndim == 0:
        return random.fold_in(key.to(ids.device), torch.arange(rows, device=ids.device))
    if key.shape != (rows,):
        raise ValueError(
            f"generate: key has shape {tuple(key.shape)}, expected one key per row, "
            f"[{rows}], or a single integer"
        )
    return key.to(ids.device).clone()


def _dtype(params: PyTree) -> torch.dtype:
    """That of most of the parameters."""
    sizes: Counter[torch.dtype] = Counter()
    for leaf in tree_leaves(params):
        if isinstance(leaf, Tensor) and leaf.is_floating_point():
            sizes[leaf.dtype] += leaf.numel()
    return sizes.most_common(1)[0][0] if sizes else torch.get_default_dtype()


def _rounded_up(slots: int) -> int:
    return -(-slots // SLOTS) * SLOTS


def _agree(request: Request, axes: Any, device: torch.device) -> None:
    """Ranks that gather from each other must take the same steps, or they hang."""
    mine = torch.tensor([request.max_new_tokens, len(request.eos)], device=device)
    for mesh, axis in axes:
        rows = collectives.all_gather(mine[None], axis, mesh)
        if bool((rows != mine).any()):
            raise ValueError(
                f"generate: the ranks of axis {axis!r} have max_new_tokens "
                f"{rows[:, 0].tolist()} and {rows[:, 1].tolist()} ends, expected the "
                "same on every rank: they gather the parameters together"
            )


def _step(
    decoder: Decoder, request: Request, params: PyTree, state: Decoding, *, jit: bool
) -> Step:
    """The decode step: as it is, or traced for these shapes."""
    if not jit:
        return functools.partial(decoded, decoder, request, donate=True)
    ambient = torch.get_default_dtype(), torch.is_autocast_enabled("cpu")
    made_for = (request, ambient, signature(params), signature(state))
    program = decoder.programs.pop(made_for, None)
    if program is None:
        pure = functools.partial(decoded, decoder, request, donate=False)
        program = replayed(pure, params, state)
    decoder.programs[made_for] = program  # now the latest
    while len(decoder.programs) > PROGRAMS:
        decoder.programs.pop(next(iter(decoder.programs)))
    return program  # type: ignore[no-any-return]


def _run(
    step: Step, params: PyTree, state: Decoding, request: Request, axes: Any
) -> Decoding:
    """All steps after the first token, or until every row of every rank has ended."""
    for done in range(1, request.max_new_tokens):
        if request.eos and done % ASK_EVERY == 1 and _all_ended(state, axes):
            break
        state = step(params, state)
    return state


def _all_ended(state: Decoding, axes: Any) -> bool:
    running = (~state.finished).sum().to(torch.float32)
    return float(sum_over(running, axes)) == 0


def _result(decoder: Decoder, ids: Tensor, state: Decoding, axes: Any) -> Generated:
    if bool(state.broken.any()):
        rows = state.broken.nonzero()[:, 0].tolist()
        raise ValueError(
            f"generate: the logits of rows {rows} are not numbers (nan): the "
            "parameters are not a trained model's, or overflow in their dtype"
        )
    longest = state.lengths.max()[None]
    for mesh, axis in axes:
        longest = collectives.all_gather(longest, axis, mesh).max()[None]
    if decoder.start is not None:
        ids = first_tokens(ids, decoder.start)
    text = torch.cat([ids, state.ids[:, : int(longest)]], dim=1)
    return Generated(text, state.lengths, state.finished)
