# SPDX-License-Identifier: Apache-2.0
"""``generate``: continuations of prompts, as a function of (params, ids, key)."""

from __future__ import annotations

import functools
import threading
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any, Final, NamedTuple

import torch
from torch import Tensor

from zfunc.core import random
from zfunc.core.state import TrainState
from zfunc.core.tree import PyTree, tree_leaves
from zfunc.inference.options import (
    Request,
    check_unpadded,
    checked_prompt,
    checked_request,
)
from zfunc.inference.ranks import agreed, rows_of_all
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
from zfunc.program.jit import ambient
from zfunc.program.pure import Step, replayed, signature

# Every so many tokens the host asks whether all rows have ended.
ASK_EVERY: Final = 8
# Caches come in multiples of this, so that prompts of similar lengths share a program.
SLOTS: Final = 64
# A decoder keeps the programs of its last so many kinds of call.
PROGRAMS: Final = 8
# torch traces in one thread at a time.
_TRACING: Final = threading.Lock()


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
    check_streamable(params)
    axes = talking(params)
    request, problem = None, None
    try:
        how = Sampling(temperature, top_k, top_p)
        request = checked_request(decoder, max_new_tokens, how, eos, pad)
        ids, attention_mask = checked_prompt(ids, attention_mask, decoder, request)
        if not traceable:
            check_unpadded(attention_mask)
        keys = _keys(key, ids)
    except (TypeError, ValueError) as error:
        problem = error  # told to the other ranks before it is raised
    request = agreed(request, problem, axes)

    cache = _empty_cache(decoder, params, ids, request)
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
        if not -(2**63) <= key < 2**63:
            raise ValueError(f"generate: got key={key}, expected one of 64 bits")
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


def _empty_cache(
    decoder: Decoder, params: PyTree, ids: Tensor, request: Request
) -> Any:
    read = ids.shape[1] if decoder.encode is None else 1
    slots = _rounded_up(read + request.max_new_tokens)
    return decoder.init_cache(
        ids.shape[0], slots, dtype=_dtype(params), device=ids.device
    )


def _step(
    decoder: Decoder, request: Request, params: PyTree, state: Decoding, *, jit: bool
) -> Step:
    """The decode step: as it is, or traced for these shapes."""
    if not jit or request.max_new_tokens == 1:  # then there is none
        return functools.partial(decoded, decoder, request, donate=True)
    settings = (*ambient(), torch.backends.mkldnn.enabled)
    made_for = (request, settings, signature(params), signature(state))
    with _TRACING:
        return _program(decoder, request, params, state, made_for)


def _program(
    decoder: Decoder, request: Request, params: PyTree, state: Decoding, made_for: Any
) -> Step:
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
    mine = torch.stack([state.lengths.max(), state.broken.any().long()])
    longest, broken = rows_of_all(mine, axes).amax(0).tolist()
    if broken:
        rows = state.broken.nonzero()[:, 0].tolist()
        where = f"rows {rows}" if rows else "another rank"
        raise ValueError(
            f"generate: the logits of {where} are not numbers (nan): the "
            "parameters are not a trained model's, or overflow in their dtype"
        )
    if decoder.start is not None:
        ids = first_tokens(ids, decoder.start)
    text = torch.cat([ids, state.ids[:, :longest]], dim=1)
    return Generated(text, state.lengths, state.finished)
