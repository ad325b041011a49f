# SPDX-License-Identifier: Apache-2.0
"""The losses of transformers' heads as exact sums: a total and the weight it has."""

from __future__ import annotations

from types import MappingProxyType
from typing import Any, Final, Literal

import torch
from torch.nn import functional as F

from zfunc.core.state import Mean
from zfunc.models.hf.errors import ModelError
from zfunc.models.layers import token_losses

IGNORED: Final = -100

Kind = Literal[
    "causal-lm",
    "masked-lm",
    "seq2seq-lm",
    "sequence-classification",
    "token-classification",
]
TASKS: Final = MappingProxyType(
    {
        "causal-lm": "AutoModelForCausalLM",
        "masked-lm": "AutoModelForMaskedLM",
        "seq2seq-lm": "AutoModelForSeq2SeqLM",
        "sequence-classification": "AutoModelForSequenceClassification",
        "token-classification": "AutoModelForTokenClassification",
    }
)
_ENDINGS: Final = MappingProxyType(
    {
        "ForCausalLM": "causal-lm",
        "LMHeadModel": "causal-lm",
        "ForMaskedLM": "masked-lm",
        "ForConditionalGeneration": "seq2seq-lm",
        "ForSequenceClassification": "sequence-classification",
        "ForTokenClassification": "token-classification",
    }
)
# The first token is that of the target's end, or the inputs are not from the labels.
_OWN_SHIFT: Final = frozenset(["mbart", "plbart", "fsmt"])


def kind_of(name: str) -> str | None:
    """The task of a class of transformers, from its name; None if it is another.

    Example:
      >>> kind_of("LlamaForCausalLM"), kind_of("LlamaModel")
      ('causal-lm', None)
    """
    return next((kind for end, kind in _ENDINGS.items() if name.endswith(end)), None)


def decoder_inputs(labels: torch.Tensor, config: Any) -> torch.Tensor:
    """The labels one place to the right, as transformers makes them, but not in place.

    Raises:
      ModelError: the config does not say what a target begins with, or the family
        has another rule.
    """
    if config.model_type in _OWN_SHIFT:
        raise ModelError(
            f"{config.model_type} makes the decoder's inputs from the labels in a way "
            "of its own: pass batch['decoder_input_ids']."
        )
    start = getattr(config, "decoder_start_token_id", None)
    pad = getattr(config, "pad_token_id", None)
    if start is None or pad is None:
        raise ModelError(
            "the decoder's inputs are made from the labels, and the config has "
            f"decoder_start_token_id={start} and pad_token_id={pad}: set both, or "
            "pass batch['decoder_input_ids']."
        )
    first = torch.full_like(labels[:, :1], start)
    shifted = torch.cat([first, labels[:, :-1]], dim=1)
    return torch.where(shifted == IGNORED, pad, shifted)


def head_loss(
    kind: str, logits: torch.Tensor, labels: torch.Tensor, config: Any
) -> Mean:
    r"""The loss of a head: :math:`\sum_i \ell_i` and the number of the i.

    Its quotient on one batch is the loss that transformers returns. Labels of -100 do
    not count.

    Raises:
      ModelError: labels of tokens that are not one per token.
    """
    if kind == "sequence-classification":
        return _classification(logits, labels, config)
    if labels.shape != logits.shape[:-1]:
        raise ModelError(
            f"labels have shape {tuple(labels.shape)} and the model's output "
            f"{tuple(logits.shape)}: give one label per token, "
            f"{tuple(logits.shape[:-1])}, -100 where none counts."
        )
    if kind == "causal-lm":
        labels = F.pad(labels[..., 1:], (0, 1), value=IGNORED)
    return _cross_entropy(logits, labels)


def _cross_entropy(logits: torch.Tensor, labels: torch.Tensor) -> Mean:
    flat = labels.reshape(-1)
    losses = token_losses(logits.reshape(-1, logits.shape[-1]), flat)
    return Mean(losses.sum(), (flat != IGNORED).sum())


def _classification(logits: torch.Tensor, labels: torch.Tensor, config: Any) -> Mean:
    """One label, several or numbers per sample, told apart as in transformers."""
    kind, classes = config.problem_type, logits.shape[-1]
    whole = not labels.is_floating_point()
    if kind == "regression" or (kind is None and classes == 1):
        errors = logits.reshape(labels.shape) - labels.to(logits.dtype)
        per_sample = errors.float().square().reshape(labels.shape[0], -1).mean(-1)
    elif kind == "single_label_classification" or (kind is None and whole):
        return _cross_entropy(logits, labels)
    else:
        each = F.binary_cross_entropy_with_logits(
            logits.float(), labels.float(), reduction="none"
        )
        per_sample = each.mean(-1)
    weight = torch.full((), len(per_sample), device=logits.device)
    return Mean(per_sample.sum(), weight)
