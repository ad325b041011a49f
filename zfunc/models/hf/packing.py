# SPDX-License-Identifier: Apache-2.0
"""Sequence packing: documents in one row that do not see each other."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, Final

import torch

from zfunc.models.hf.errors import ModelError
from zfunc.models.hf.heads import IGNORED

# Where positions and masks are all that one token knows of another.
PACKABLE: Final = frozenset(
    [
        "llama",
        "mistral",
        "falcon",
        "opt",
        "gpt_neox",
        "qwen2",
        "qwen3",
        "gemma",
        "gpt2",
        "mixtral",
    ]
)


def pack(
    sequences: Iterable[Sequence[int] | torch.Tensor],
    length: int,
    *,
    pad_id: int = 0,
    rows: int | None = None,
) -> dict[str, torch.Tensor]:
    """Documents laid end to end into rows of ``length``, each in the first row it fits.

    Args:
      sequences: Token ids, each document at most ``length`` long.
      length: Tokens per row.
      pad_id: What fills the ends of rows.
      rows: The number of rows, so that ranks and steps have equally many; those that
        no document is in are padding. Default: as many as it takes.

    Returns:
      A batch for ``from_hf(..., packed=True)``: ``input_ids``; ``labels``, -100 at the
      first token of each document and in the padding; ``position_ids``, from 0 in each
      document; ``segment_ids``, 1, 2, ... within a row and 0 in the padding. Each is an
      int64 tensor ``[rows, length]``.

    Raises:
      ModelError: a document that is empty or longer than ``length``, or more of them
        than fit into ``rows``.

    Laws: the loss of the packed batch is that of its documents one by one.

    Examples:
      >>> batch = pack([[5, 6, 7], [8, 9], [4]], 4)
      >>> batch["input_ids"]
      tensor([[5, 6, 7, 4],
              [8, 9, 0, 0]])
      >>> batch["labels"]
      tensor([[-100,    6,    7, -100],
              [-100,    9, -100, -100]])
      >>> batch["segment_ids"]
      tensor([[1, 1, 1, 2],
              [1, 1, 0, 0]])

    References:
      Krell et al., `Efficient sequence packing without cross-contamination
      <https://arxiv.org/abs/2107.02027>`_, 2021.
    """
    if isinstance(length, bool) or not isinstance(length, int) or length < 1:
        raise ModelError(f"pack: length is a number of tokens >= 1, got {length!r}.")
    if rows is not None and (type(rows) is not int or rows < 1):
        raise ModelError(f"pack: rows is a number of rows >= 1, got {rows!r}.")
    filled: list[list[list[int]]] = []
    free: list[int] = []
    for i, sequence in enumerate(sequences):
        ids = [int(token) for token in sequence]
        if not 1 <= len(ids) <= length:
            raise ModelError(
                f"pack: sequence {i} has {len(ids)} tokens and a row {length}: cut it "
                "into pieces, drop it, or give longer rows."
            )
        where = next((r for r, room in enumerate(free) if room >= len(ids)), len(free))
        if where == len(filled):
            filled.append([])
            free.append(length)
        filled[where].append(ids)
        free[where] -= len(ids)
    if not filled:
        raise ModelError("pack: there are no sequences.")
    if rows is not None and len(filled) > rows:
        raise ModelError(
            f"pack: the sequences take {len(filled)} rows of {length} tokens, and rows "
            f"is {rows}: give fewer of them, or rows={len(filled)}."
        )
    filled += [[] for _ in range((rows or 0) - len(filled))]
    columns = [_row(row, length, pad_id) for row in filled]
    return {key: torch.stack([row[key] for row in columns]) for key in columns[0]}


def _row(row: list[list[int]], length: int, pad_id: int) -> dict[str, torch.Tensor]:
    def filled(parts: list[list[int]], rest: list[int]) -> torch.Tensor:
        return torch.tensor([token for part in parts for token in part] + rest)

    room = length - sum(map(len, row))
    return {
        "input_ids": filled(row, [pad_id] * room),
        "labels": filled([[IGNORED, *ids[1:]] for ids in row], [IGNORED] * room),
        "position_ids": filled([list(range(len(ids))) for ids in row], [0] * room),
        "segment_ids": filled(
            [[i + 1] * len(ids) for i, ids in enumerate(row)], [0] * room
        ),
    }


def check_packable(kind: str, config: Any) -> None:
    """Raise where documents in one row cannot be kept apart."""
    alibi = config.model_type == "bloom" or getattr(config, "alibi", False)
    if kind == "causal-lm" and alibi:
        why = "its ALiBi counts positions over the whole row"
    elif kind != "causal-lm":
        why = f"its task is {kind}, and packing is for causal-lm"
    elif config.model_type not in PACKABLE:
        why = f"it was tried with {', '.join(sorted(PACKABLE))} only"
    else:
        return
    raise ModelError(
        f"packed=True is not supported for {config.model_type}: {why}. Pad instead: "
        "one document per row, with attention_mask."
    )


def block_masks(ids: torch.Tensor, config: Any, dtype: torch.dtype) -> Any:
    """Which tokens see which: those before them in their document, as ``[B, 1, T, T]``.

    True means seen (for eager attention, added to scores: 0 and the least number). A
    dict by kind of layer where the model has several.
    """
    place = torch.arange(ids.shape[1], device=ids.device)
    past = place[:, None] >= place[None, :]
    full = (ids[:, None, :, None] == ids[:, None, None, :]) & past
    window = getattr(config, "sliding_window", None)
    near = full if window is None else full & (place[:, None] - place[None, :] < window)
    kinds = getattr(config, "layer_types", None)
    if kinds is not None:
        masks = {"full_attention": full, "sliding_attention": near}
        return {kind: _as_scores(masks[kind], config, dtype) for kind in set(kinds)}
    return _as_scores(near, config, dtype)


def _as_scores(mask: torch.Tensor, config: Any, dtype: torch.dtype) -> torch.Tensor:
    if config._attn_implementation != "eager":
        return mask
    least = torch.finfo(dtype).min
    return torch.where(mask, 0.0, least).to(dtype)
