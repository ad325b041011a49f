# SPDX-License-Identifier: Apache-2.0
"""The Llama of transformers, layer by layer, so that ``zf.remat`` can wrap a layer."""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch.func import functional_call

from zfunc.core.state import Mean
from zfunc.core.tree import PyTree
from zfunc.models.gpt_config import GPTConfig
from zfunc.plan.errors import PlanError


def llama(config: GPTConfig, remat: Any) -> tuple[PyTree, Callable[..., Any]]:
    """Parameters on the meta device, and the loss of the modules on them.

    Args:
      config: The shape.
      remat: None, or what each decoder layer is transformed with.

    Raises:
      PlanError: transformers is not installed.
    """
    if importlib.util.find_spec("transformers") is None:
        raise PlanError(
            "this model comes from transformers: pip install 'transformers>=5', or "
            "type --model llama-7b for the same shape without it"
        )
    modules: Any = importlib.import_module("transformers.models.llama.modeling_llama")
    shape = _shape(config)
    rotary = modules.LlamaRotaryEmbedding(shape)  # its buffers are values: not on meta
    with torch.device("meta"):
        layers = [modules.LlamaDecoderLayer(shape, i) for i in range(config.n_layers)]
        norm = modules.LlamaRMSNorm(config.d_model, config.norm_eps)
        table = torch.empty(config.vocab_size, config.d_model)
        params = {
            "embedding": table,
            "layers": [dict(layer.named_parameters()) for layer in layers],
            "norm": dict(norm.named_parameters()),
            "head": torch.empty_like(table),
        }

    def block(weights: PyTree, x: Any, cos: Any, sin: Any) -> Any:
        extra = {"position_embeddings": (cos, sin)}
        out = functional_call(layers[0], weights, (x,), extra)
        return out[0] if isinstance(out, tuple) else out

    run = block if remat is None else remat(block)

    def loss(params: PyTree, ids: torch.Tensor) -> Mean:
        x = F.embedding(ids, params["embedding"])
        cos, sin = rotary(x, torch.arange(ids.shape[1])[None])
        for weights in params["layers"]:
            x = run(weights, x, cos, sin)
        x = functional_call(norm, params["norm"], (x,))
        logits = F.linear(x[:, :-1], params["head"]).flatten(0, 1).float()
        nll = F.cross_entropy(logits, ids[:, 1:].flatten(), reduction="none")
        return Mean(nll.sum(), torch.ones_like(nll).sum())

    return params, loss


def batch(samples: int, seq_len: int) -> PyTree:
    """Token ids, which are the targets too."""
    return torch.zeros(samples, seq_len, dtype=torch.int64)


def _shape(config: GPTConfig) -> Any:
    transformers: Any = importlib.import_module("transformers")
    shape = transformers.LlamaConfig(
        hidden_size=config.d_model,
        intermediate_size=config.d_ff,
        num_hidden_layers=config.n_layers,
        num_attention_heads=config.n_heads,
        num_key_value_heads=config.n_kv_heads,
        vocab_size=config.vocab_size,
        max_position_embeddings=config.max_seq_len,
        use_cache=False,
    )
    shape._attn_implementation = "sdpa"
    return shape
