# SPDX-License-Identifier: Apache-2.0
"""``HFLoss``: the loss of a transformers model as a function of its parameters."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Final

import torch
from torch.func import functional_call

from zfunc.core.errors import PlacementError, StructureError
from zfunc.core.sharding import Sharded, is_sharded
from zfunc.core.state import Mean
from zfunc.models.hf.errors import ModelError
from zfunc.models.hf.heads import decoder_inputs, head_loss
from zfunc.models.hf.packing import block_masks
from zfunc.models.hf.private import Rebinding

# What a forward takes and a training batch has no use for.
_NOT_DATA: Final = frozenset(
    [
        "use_cache",
        "past_key_values",
        "return_dict",
        "output_attentions",
        "output_hidden_states",
        "output_router_logits",
        "cache_position",
        "logits_to_keep",
        "self",
        "kwargs",
    ]
)
_PACKED: Final = ("position_ids", "segment_ids")


@dataclass(frozen=True, eq=False)
class HFLoss:
    """``(params, batch) -> Mean``: what ``from_hf`` returns.

    Attributes:
      module: The model on the meta device: its code, for ``functional_call`` with
        ``weights(params)`` and ``buffers``.
      buffers: Its buffers, such as the frequencies of rotary embeddings.
      config: Its configuration.
      kind: Its task, such as ``"causal-lm"``.
      frozen: The parameters that are not trained. Plain ones are used as they are;
        placed ones go through ``zf.with_frozen(loss_fn, loss_fn.frozen)``.
      packed: Whether batches are those of ``pack``.
      names: The names of all parameters, tied ones once.
      remat: What each layer is wrapped with, or None.
      run: A copy of ``module`` whose layers are such blocks, or None.

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
      >>> loss_fn
      HFLoss(kind='causal-lm', packed=False)
      >>> loss_fn.apply(
      ...     params, input_ids=torch.ones(1, 3, dtype=torch.int64)
      ... ).logits.shape
      torch.Size([1, 3, 64])
    """

    module: torch.nn.Module = field(repr=False)
    buffers: Mapping[str, torch.Tensor] = field(repr=False)
    config: Any = field(repr=False)
    kind: str
    frozen: Mapping[str, Any] = field(repr=False)
    packed: bool = False
    names: frozenset[str] = field(default=frozenset(), repr=False)
    remat: Any = field(default=None, repr=False)
    run: Any = field(default=None, repr=False)

    def __deepcopy__(self, memo: Any) -> HFLoss:
        """Itself: nothing in it changes."""
        return self

    def __call__(self, params: Mapping[str, Any], batch: Mapping[str, Any]) -> Mean:
        """The total of the loss over what is labelled, and how much that is.

        Raises:
          ModelError: a batch without ``labels``, or with a key the model does not know.
          StructureError: parameters that are missing or that the model does not have.
          PlacementError: placed parameters that are frozen.
        """
        self._check_batch(batch)
        inputs = {key: x for key, x in batch.items() if key != "labels"}
        labels = batch["labels"]
        given = inputs.keys() & {"decoder_input_ids", "decoder_inputs_embeds"}
        if self.kind == "seq2seq-lm" and not given:
            inputs["decoder_input_ids"] = decoder_inputs(labels, self.config)
        logits = self.apply(params, **inputs).logits
        return head_loss(self.kind, logits, labels, self.config)

    def apply(self, params: Mapping[str, Any], **inputs: Any) -> Any:
        """The model's outputs, with ``.logits``, on these inputs and no labels."""
        if self.packed:
            ids = inputs.pop("segment_ids")
            inputs["attention_mask"] = block_masks(ids, self.config, _dtype_of(params))
        if "use_cache" in _forward_names(self.module):
            inputs.setdefault("use_cache", False)
        weights = self.weights(params)
        module = self.module if self.run is None else self.run
        with Rebinding(self.config.model_type):
            return functional_call(module, (weights, dict(self.buffers)), (), inputs)

    def weights(self, params: Mapping[str, Any]) -> dict[str, Any]:
        """All parameters of ``module`` by name: those given, and the frozen ones."""
        return all_weights(params, self.frozen, self.names)

    def _check_batch(self, batch: Any) -> None:
        if not isinstance(batch, Mapping):
            raise ModelError(
                "a batch is a dict of tensors as transformers names them (input_ids, "
                f"attention_mask, labels), got a {type(batch).__name__}."
            )
        if batch.get("labels") is None:
            more = {
                "causal-lm": "to train on every token pass labels=input_ids, with -100 "
                "where a token does not count",
                "seq2seq-lm": "pass the target's token ids, with -100 for padding",
                "masked-lm": "pass the original ids where tokens are masked, -100 "
                "elsewhere",
            }.get(self.kind, "pass one per sample (per token: -100 does not count)")
            raise ModelError(f"the batch has no 'labels': {more}.")
        known = _forward_names(self.module) - _NOT_DATA
        if self.packed:
            known = (known | {"segment_ids"}) - {"attention_mask"}
        unknown = [key for key in batch if key not in known]
        if unknown:
            raise ModelError(
                f"batch[{unknown[0]!r}] is not an input of "
                f"{type(self.module).__name__}{' with packed=True' * self.packed}; "
                f"it takes {', '.join(sorted(known))}."
            )
        for key, x in batch.items():
            self._check_leaf(key, x)
        missing = [key for key in _PACKED if self.packed and key not in batch]
        if missing:
            raise ModelError(
                f"packed=True and the batch has no {missing[0]!r}: make it with "
                "zf.models.pack(sequences, length)."
            )

    def _check_leaf(self, key: str, x: Any) -> None:
        """What would end in a message of torch that names no part of the batch."""
        if x is None:
            return
        if not isinstance(x, torch.Tensor):
            raise ModelError(
                f"batch[{key!r}] is a {type(x).__name__}, expected a tensor: make it "
                "with torch.as_tensor, or tokenize with return_tensors='pt'."
            )
        if key == "input_ids" and x.ndim < 2:
            raise ModelError(
                f"batch['input_ids'] has the shape {tuple(x.shape)}, expected "
                "[samples, tokens]: one sample is ids[None]."
            )
        ids = key == "labels" and self.kind != "sequence-classification"
        if (ids and x.dtype != torch.int64) or (
            key == "input_ids" and x.dtype not in (torch.int64, torch.int32)
        ):
            raise ModelError(
                f"batch[{key!r}] is {x.dtype}, expected torch.int64: type .long()."
            )


def all_weights(
    params: Mapping[str, Any], frozen: Mapping[str, Any], names: frozenset[str]
) -> dict[str, Any]:
    """The union of trained and frozen parameters.

    Raises:
      StructureError: names that are missing or that are none of ``names``.
      PlacementError: leaves that are in pieces.
    """
    weights = {**frozen, **params}
    missing = sorted(names - weights.keys())
    unknown = sorted(weights.keys() - names)
    if missing or unknown:
        lines = [f"  missing: {name}" for name in missing[:8]]
        lines += [f"  not of this model: {name}" for name in unknown[:8]]
        raise StructureError(
            "params are not the parameters of this loss:\n"
            + "\n".join(lines)
            + "\nPass the dict that was returned with it."
        )
    for name, leaf in weights.items():
        if is_sharded(leaf):
            raise _placed(name, leaf, name in frozen)
    return weights


def _placed(name: str, leaf: Sharded, frozen: bool) -> PlacementError:
    if frozen:
        return PlacementError(
            f"frozen[{name!r}] is in pieces, {leaf.sharding.spec}: give the step "
            "zf.with_frozen(loss_fn, loss_fn.frozen) instead of loss_fn."
        )
    return PlacementError(
        f"params[{name!r}] is in pieces, {leaf.sharding.spec}: the loss of placed "
        "parameters is computed by a step, zf.train_step(loss_fn, tx, "
        "zf.partition(zero=...)), or on zf.unshard(state).params."
    )


def _forward_names(module: torch.nn.Module) -> frozenset[str]:
    get = getattr(module, "get_base_model", None)  # an adapter passes on what it gets
    inner = module if get is None else get()
    return frozenset(inspect.signature(inner.forward).parameters)


def _dtype_of(params: Mapping[str, Any]) -> torch.dtype:
    return next(iter(params.values())).dtype  # type: ignore[no-any-return]
