# SPDX-License-Identifier: Apache-2.0
"""LoRA as a reparametrisation of a loss: two small factors are trained per layer."""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Mapping
from typing import Any

import torch
from torch.nn import functional as F

from zfunc.core import random
from zfunc.core.sharding import Sharded, is_sharded, place, replicate
from zfunc.models.hf.blocks import with_blocks
from zfunc.models.hf.errors import ModelError
from zfunc.models.hf.loss import HFLoss
from zfunc.models.hf.private import on_meta
from zfunc.models.hf.trainable import Chosen, chooser

_A, _B = "lora_A", "lora_B"


def lora(
    params: Mapping[str, Any],
    loss_fn: HFLoss,
    *,
    rank: int,
    alpha: float | None = None,
    targets: Chosen,
    key: int = 0,
) -> tuple[dict[str, Any], HFLoss]:
    r"""Train :math:`W + \frac{\alpha}{r} B A` through A and B alone.

    A is drawn from :math:`U(-1/\sqrt{d}, 1/\sqrt{d})` for d inputs and B is 0, so the
    first loss is that of ``params``. The product is never formed: a layer computes
    :math:`W x + \frac{\alpha}{r} B (A x)`, in ``remat`` blocks too.

    Args:
      params: The parameters of ``loss_fn``, plain or placed; they are frozen.
      loss_fn: As ``from_hf`` made it.
      rank: Rows of A and columns of B.
      alpha: The scale's numerator; ``rank`` (a scale of 1) if None.
      targets: Patterns of parameter names (``["*.q_proj.weight"]``), or a predicate.
      key: Seed of A.

    Returns:
      ``(lora_params, loss_fn)``: ``NAME.lora_A`` ``[rank, inputs]`` and
      ``NAME.lora_B`` ``[outputs, rank]`` for each layer NAME, placed as ``params`` are;
      and the loss of these. Placed frozen parameters go through
      ``zf.with_frozen(loss_fn, loss_fn.frozen)``.

    Raises:
      ModelError: no target, or one that is not the weight of a linear layer.

    Examples:
      >>> from transformers import LlamaConfig
      >>> from zfunc.models import from_hf
      >>> config = LlamaConfig(
      ...     vocab_size=64,
      ...     hidden_size=16,
      ...     intermediate_size=32,
      ...     num_hidden_layers=1,
      ...     num_attention_heads=2,
      ...     bos_token_id=1,
      ...     eos_token_id=2,
      ... )
      >>> params, loss_fn = from_hf(config, task="causal-lm")
      >>> factors, adapted = lora(params, loss_fn, rank=2, targets=["*.q_proj.weight"])
      >>> factors["model.layers.0.self_attn.q_proj.lora_A"].shape
      torch.Size([2, 16])

    Laws: ``loss_fn(merge_lora(p, lora_loss), b) == lora_loss(p, b)``.

    References:
      Hu et al., `LoRA <https://arxiv.org/abs/2106.09685>`_, 2021.

    Differs from PEFT: no wrapped modules and no dropout; the factors are a dict of
    their own, with the same names and shapes.
    """
    _check_rank(rank, alpha)
    weights = {**loss_fn.frozen, **params}
    is_target = chooser(targets, sorted(weights), "targets")
    names = [name for name in weights if is_target(name)]
    if not names:
        raise ModelError("lora: targets chooses no parameter.")
    scale = (rank if alpha is None else alpha) / rank
    module = _adapted(loss_fn.module, names, rank, scale)
    factors: dict[str, Any] = {}
    for i, name in enumerate(names):
        owner = name.rpartition(".")[0]
        a, b = _factors(module.get_submodule(owner), key, i)
        factors[f"{owner}.{_A}"] = _like(weights[name], a)
        factors[f"{owner}.{_B}"] = _like(weights[name], b)
    adapted = dataclasses.replace(
        loss_fn,
        module=module,
        frozen=weights,
        names=loss_fn.names | factors.keys(),
        run=None,
    )
    if loss_fn.remat is not None:
        run = with_blocks(module, loss_fn.remat, loss_fn.config.model_type)
        adapted = dataclasses.replace(adapted, run=run)
    return factors, adapted


def merge_lora(params: Mapping[str, Any], loss_fn: HFLoss) -> dict[str, Any]:
    r"""The parameters of the model with :math:`W + \frac{\alpha}{r} B A` for W.

    Args:
      params: The factors, as ``lora`` made them and training changed them.
      loss_fn: The loss that came with them.

    Returns:
      All parameters of the model by name, for the loss that ``lora`` was given.

    Raises:
      ModelError: a loss that is not from ``lora``.

    Examples:
      >>> from transformers import LlamaConfig
      >>> from zfunc.models import from_hf
      >>> config = LlamaConfig(
      ...     vocab_size=64,
      ...     hidden_size=16,
      ...     intermediate_size=32,
      ...     num_hidden_layers=1,
      ...     num_attention_heads=2,
      ...     bos_token_id=1,
      ...     eos_token_id=2,
      ... )
      >>> params, loss_fn = from_hf(config, task="causal-lm")
      >>> factors, adapted = lora(params, loss_fn, rank=2, targets=["*.q_proj.weight"])
      >>> merged = merge_lora(factors, adapted)
      >>> all(torch.equal(merged[name], params[name]) for name in params)
      True
    """
    weights = {**loss_fn.frozen, **params}
    merged = {n: x for n, x in weights.items() if n.rpartition(".")[2] not in (_A, _B)}
    if len(merged) == len(weights):
        raise ModelError(
            "merge_lora: this loss has no factors: zf.models.lora makes one"
        )
    for path in [n.removesuffix(f".{_A}") for n in weights if n.endswith(f".{_A}")]:
        part = loss_fn.module.get_submodule(path)
        a, b = replicate((weights[f"{path}.{_A}"], weights[f"{path}.{_B}"]))
        delta = part.lora_scale * (b @ a)
        delta = delta.T if _is_transposed(part) else delta
        name = f"{path}.weight"
        merged[name] = _sum(merged[name], delta)
    return merged


def _check_rank(rank: int, alpha: float | None) -> None:
    if isinstance(rank, bool) or not isinstance(rank, int) or rank < 1:
        raise ModelError(f"lora: rank is an int >= 1, got {rank!r}.")
    if alpha is not None and not (
        isinstance(alpha, int | float) and math.isfinite(alpha) and alpha > 0
    ):
        raise ModelError(f"lora: alpha is a number > 0 or None, got {alpha!r}.")


def _adapted(
    module: torch.nn.Module, names: list[str], rank: int, scale: float
) -> torch.nn.Module:
    """A copy whose target layers have factors, and add what they give."""
    copied: Any = on_meta(module)
    holders: dict[int, list[str]] = {}
    for name, p in copied.named_parameters(remove_duplicate=False):
        holders.setdefault(id(p), []).append(name)
    for name in names:
        owner, _, attribute = name.rpartition(".")
        part = copied.get_submodule(owner)
        kind, tied = type(part).__name__, holders[id(copied.get_parameter(name))]
        linear = type(part) is torch.nn.Linear or kind in ("Conv1D", "FalconLinear")
        if not linear or attribute != "weight" or len(tied) > 1 or hasattr(part, _A):
            why = f"shared with {tied[-1]}" if len(tied) > 1 else f"of a {kind}"
            raise ModelError(
                f"lora: {name} is {why}: targets are weights of linear layers that are "
                "used in one place and have no factors yet."
            )
        outputs, inputs = part.weight.shape
        if _is_transposed(part):
            outputs, inputs = inputs, outputs
        with torch.device("meta"):
            part.lora_A = torch.nn.Parameter(torch.empty(rank, inputs))
            part.lora_B = torch.nn.Parameter(torch.empty(outputs, rank))
        part.lora_scale = scale
        part.forward = functools.partial(_forward, part)
    return copied  # type: ignore[no-any-return]


def _forward(part: Any, x: torch.Tensor) -> torch.Tensor:
    """The layer's own formula, plus that of the factors."""
    low = F.linear(F.linear(x, part.lora_A), part.lora_B) * part.lora_scale
    return type(part).forward(part, x) + low  # type: ignore[no-any-return]


def _is_transposed(part: torch.nn.Module) -> bool:
    """GPT-2's linear layer, whose weight is ``[inputs, outputs]``."""
    return type(part).__name__ == "Conv1D"


def _factors(part: Any, key: int, i: int) -> tuple[torch.Tensor, torch.Tensor]:
    shape, seed = tuple(part.lora_A.shape), random.fold_in(torch.tensor(key), i)
    a = (2 * random.uniform(seed, shape) - 1) / math.sqrt(shape[1])
    return a, torch.zeros(tuple(part.lora_B.shape))


def _like(leaf: Any, full: torch.Tensor) -> Any:
    """``full`` in the dtype and on the mesh of another leaf."""
    if not is_sharded(leaf):
        return full.to(leaf.device, leaf.dtype)
    piece = place(full.to(leaf.buffer.device, leaf.buffer.dtype), leaf.sharding)
    return Sharded(piece.buffer.clone(), piece.sharding, piece.global_shape)


def _sum(leaf: Any, delta: torch.Tensor) -> Any:
    if not is_sharded(leaf):
        return leaf + delta.to(leaf.dtype)
    piece = place(delta.to(leaf.buffer.dtype), leaf.sharding)
    return Sharded(leaf.buffer + piece.buffer, leaf.sharding, leaf.global_shape)
