# SPDX-License-Identifier: Apache-2.0
"""The decoder of a causal or sequence-to-sequence model of transformers.

The module runs as it is, under ``functional_call``; only what it takes for its cache is
ours, and that reads from a pytree and writes to another.
"""

from __future__ import annotations

import importlib
import inspect
import threading
from collections.abc import Mapping
from typing import Any, Final, NamedTuple

import torch
from torch import Tensor
from torch._subclasses import FakeTensorMode
from torch.func import functional_call

from zfunc.core.errors import PlacementError
from zfunc.core.sharding import is_sharded
from zfunc.models import gpt_decoder
from zfunc.models.decoding import Decoder, KVCache, kv_cache, reading
from zfunc.models.gpt_config import GPTConfig
from zfunc.models.hf.errors import ModelError
from zfunc.models.hf.loss import HFLoss
from zfunc.models.hf.private import Rebinding

# Tables of learned positions, by the names that the families give them.
_TABLES: Final = ("wpe", "embed_positions", "position_embeddings")
# Their configurations say is_decoder=False, and they are causal all the same.
_CAUSAL: Final = ("gpt2", "gpt_neox")
# The tasks whose logits are of the next token.
_GENERATING: Final = ("causal-lm", "seq2seq-lm")


def decoder(loss_fn: HFLoss | GPTConfig) -> Decoder:
    """The decoder of a model, for ``zf.generate``.

    Args:
      loss_fn: As ``zf.models.from_hf`` returns it, of a causal language model or of
        T5; its parameters are those that it returns with it. Or a ``GPTConfig``, whose
        parameters ``zf.models.gpt.init`` makes.

    Returns:
      A decoder whose cache holds keys and values as preallocated tensors; for T5 also
      those of the cross-attention, which are computed once.

    Raises:
      TypeError: ``loss_fn`` is something else.
      ModelError: The model does not read text from left to right, as BERT does not.

    Laws: the greedy tokens of ``zf.generate`` are those of transformers'
    ``model.generate(do_sample=False)``, with padding on the left and without.

    Examples:
      >>> from transformers import GPT2Config
      >>> from zfunc import models
      >>> sizes = {"n_embd": 32, "n_layer": 2, "n_head": 2, "vocab_size": 64}
      >>> config = GPT2Config(**sizes, bos_token_id=1, eos_token_id=1)
      >>> params, loss_fn = models.from_hf(config, task="causal-lm", dropout="off")
      >>> decoder(loss_fn).max_positions
      1024
    """
    if isinstance(loss_fn, GPTConfig):
        return gpt_decoder.decoder(loss_fn)
    if not isinstance(loss_fn, HFLoss):
        raise TypeError(
            "decoder takes what zf.models.from_hf returns with the parameters, or a "
            f"GPTConfig, got a {type(loss_fn).__name__}: type params, loss_fn = "
            "zf.models.from_hf(...)"
        )
    _check_causal(loss_fn)
    forward = _Forward(loss_fn, frozenset(_names(loss_fn.module)), threading.RLock())
    both = bool(loss_fn.config.is_encoder_decoder)
    sizes = _sizes(forward, both)

    def init_cache(
        batch_size: int,
        max_len: int,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
    ) -> KVCache:
        return kv_cache(sizes, batch_size, max_len, dtype, device)

    return Decoder(
        init_cache,
        forward.apply,
        max_positions=_max_positions(loss_fn),
        vocab_size=loss_fn.config.vocab_size,
        encode=forward.encode if both else None,
        start=_start(loss_fn.config) if both else None,
    )


class _Forward(NamedTuple):
    """The module as functions of parameters and cache."""

    loss_fn: HFLoss
    names: frozenset[str]
    lock: Any

    def call(self, params: Mapping[str, Any], **inputs: Any) -> Any:
        """The module's outputs."""
        loss = self.loss_fn
        known = {k: x for k, x in inputs.items() if k in self.names}
        _check_frozen(loss, params)
        weights = loss.weights(params)
        # functional_call sets the module's parameters: one thread at a time.
        with self.lock, Rebinding(loss.config.model_type):
            return functional_call(
                loss.module, (weights, dict(loss.buffers)), (), known
            )

    def apply(
        self,
        params: Mapping[str, Any],
        ids: Tensor,
        cache: KVCache,
        *,
        attention_mask: Tensor | None = None,
        all_logits: bool = False,
        donate: bool = False,
    ) -> tuple[Tensor, KVCache]:
        """``Decoder.apply``."""
        where = reading(ids, cache, attention_mask, donate)
        seen, layers = _slots().view_of(cache, where)
        mask = where.mask.to(torch.int64)
        inputs = {
            "past_key_values": seen,
            "use_cache": True,
            "return_dict": True,
            "logits_to_keep": 0 if all_logits else 1,
        }
        if "encoded" in cache.extra:
            inputs |= {
                "decoder_input_ids": ids,
                "decoder_attention_mask": mask,
                "encoder_outputs": (cache.extra["encoded"],),
                "attention_mask": cache.extra["encoded_mask"],
            }
        else:
            inputs |= {
                "input_ids": ids,
                "attention_mask": mask,
                "position_ids": where.positions,
            }
        logits = self.call(params, **inputs).logits
        new = KVCache(
            tuple(layer.written[-1][0] for layer in layers),
            tuple(layer.written[-1][1] for layer in layers),
            where.mask,
            cache.length + ids.shape[1],
            cache.extra,
        )
        return logits if all_logits else logits[:, -1:], new

    def encode(
        self,
        params: Mapping[str, Any],
        ids: Tensor,
        cache: KVCache,
        *,
        attention_mask: Tensor | None = None,
    ) -> KVCache:
        """``Decoder.encode``: the encoder, and the keys that each layer makes of it."""
        mask = torch.ones_like(ids) if attention_mask is None else attention_mask
        both = self.read(params, ids, mask.to(torch.int64))
        kept = both.past_key_values.cross_attention_cache.layers
        extra = {
            "encoded": both.encoder_last_hidden_state,
            "encoded_mask": mask.to(torch.int64),
            "cross_keys": tuple(layer.keys for layer in kept),
            "cross_values": tuple(layer.values for layer in kept),
        }
        return KVCache(cache.keys, cache.values, cache.mask, cache.length, extra)

    def read(self, params: Mapping[str, Any], ids: Tensor, mask: Tensor) -> Any:
        """The outputs on a first token, with caches of transformers' own."""
        caches: Any = importlib.import_module("transformers.cache_utils")
        seen = caches.DynamicCache()
        inputs = {"input_ids": ids, "attention_mask": mask}
        if self.loss_fn.config.is_encoder_decoder:
            seen = caches.EncoderDecoderCache(seen, caches.DynamicCache())
            first = torch.full_like(ids[:, :1], _start(self.loss_fn.config))
            inputs["decoder_input_ids"] = first
        return self.call(
            params, **inputs, past_key_values=seen, use_cache=True, return_dict=True
        )


def _slots() -> Any:
    return importlib.import_module("zfunc.models.hf.slots")


def _sizes(forward: _Forward, both: bool) -> list[tuple[int, int]]:
    """(heads, head dim) of each layer's keys: those of a forward on shapes alone."""
    loss = forward.loss_fn
    with FakeTensorMode(allow_non_fake_inputs=True), torch.no_grad():
        weights = {
            name: torch.empty(p.shape, dtype=p.dtype)
            for name, p in loss.module.named_parameters()
        }
        ids = torch.zeros(1, 1, dtype=torch.int64)
        seen = forward.read(weights, ids, torch.ones_like(ids)).past_key_values
    layers = (seen.self_attention_cache if both else seen).layers
    found = [(x.keys.shape, x.values.shape) for x in layers]
    name = type(loss.module).__name__
    if not found or any(k != v for k, v in found):
        raise ModelError(
            f"decoder: {name} keeps {found or 'nothing'} of what it has read, expected "
            "keys and values of one shape per layer: it cannot generate here."
        )
    return [(shape[1], shape[3]) for shape, _ in found]


def _check_causal(loss_fn: HFLoss) -> None:
    config, name = loss_fn.config, type(loss_fn.module).__name__
    if loss_fn.kind not in _GENERATING or not {"past_key_values", "use_cache"} <= set(
        _names(loss_fn.module)
    ):
        raise ModelError(
            f"decoder: {name} does not generate text: load a causal language model "
            '(zf.models.from_hf(..., task="causal-lm")).'
        )
    known = config.is_encoder_decoder or config.model_type in _CAUSAL
    # Most families that are always causal do not have the field.
    if getattr(config, "is_decoder", None) is False and not known:
        raise ModelError(
            f"decoder: {name} with is_decoder=False sees what comes after a token: "
            "set config.is_decoder=True for a model that was trained so. (A masked "
            "language model such as BERT does not continue text.)"
        )
    if getattr(config, "_attn_implementation", None) not in ("sdpa", "eager", None):
        raise ModelError(
            f"decoder: {name} has _attn_implementation="
            f"{config._attn_implementation!r}, expected 'sdpa' or 'eager'."
        )


def _check_frozen(loss_fn: HFLoss, params: Mapping[str, Any]) -> None:
    for name, leaf in loss_fn.frozen.items():
        if is_sharded(leaf) and name not in params:
            raise PlacementError(
                f"decoder: frozen[{name!r}] is in pieces, {leaf.sharding.spec}, which "
                "are gathered of parameters only: generate with {**loss_fn.frozen, "
                "**params} as the params."
            )


def _names(module: torch.nn.Module) -> list[str]:
    return list(inspect.signature(module.forward).parameters)


def _max_positions(loss_fn: HFLoss) -> int | None:
    """How many positions the model has learned; None where they are computed."""
    tables = [
        part
        for name, part in loss_fn.module.named_modules()
        if name.rpartition(".")[2] in _TABLES and isinstance(part, torch.nn.Embedding)
    ]
    return int(loss_fn.config.max_position_embeddings) if tables else None


def _start(config: Any) -> int:
    start = getattr(config, "decoder_start_token_id", None)
    if start is None:
        raise ModelError(
            "decoder: config.decoder_start_token_id is None: set it to the token that "
            "the decoder begins with (for T5 that of padding, 0)."
        )
    return int(start)
