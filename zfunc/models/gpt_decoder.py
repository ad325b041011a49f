# SPDX-License-Identifier: Apache-2.0
"""The decoder of ``zfunc.models.gpt``: the same model, read token by token.

Shape suffixes: B batch, T new tokens, S slots, D model, H query heads, G key/value
heads, K head dim.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from zfunc.models.decoding import Decoder, KVCache, Reading, kv_cache, reading
from zfunc.models.gpt_block import heads, mlp, norm
from zfunc.models.gpt_config import GPTConfig
from zfunc.models.layers import rope_frequencies, rotate

Params = dict[str, Any]


def decoder(config: GPTConfig) -> Decoder:
    """The decoder of a GPT: its ``apply`` gives the logits of ``gpt.apply``.

    Args:
      config: The config that made the parameters.

    Returns:
      A decoder of parameters as ``gpt.init`` makes them. Dropout is off.

    Laws: logits equal those of ``gpt.apply`` on the whole text, to rounding.

    Examples:
      >>> from zfunc.models import gpt
      >>> config = GPTConfig(d_model=32, n_layers=2, d_ff=64, n_kv_heads=2)
      >>> params, ids = gpt.init(config), torch.tensor([[72, 101, 108, 108, 111]])
      >>> one = decoder(config)
      >>> logits, _ = one.apply(params, ids, one.init_cache(1, 8), all_logits=True)
      >>> bool(torch.allclose(logits, gpt.apply(params, ids, config), atol=1e-5))
      True
    """

    def init_cache(
        batch_size: int,
        max_len: int,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
    ) -> KVCache:
        sizes = [(config.n_kv_heads, config.head_dim)] * config.n_layers
        return kv_cache(sizes, batch_size, max_len, dtype, device)

    def apply(
        params: Params,
        ids: Tensor,
        cache: KVCache,
        *,
        attention_mask: Tensor | None = None,
        all_logits: bool = False,
        donate: bool = False,
    ) -> tuple[Tensor, KVCache]:
        where = reading(ids, cache, attention_mask, donate)
        x_BTD = F.embedding(ids, params["embedding"])
        angles = _angles(where.positions, config, x_BTD)
        mask = where.causal()
        keys, values = [], []
        for i, layer in enumerate(params["layers"]):
            h_BTD = norm(x_BTD, layer["attn_norm"], config)
            past = cache.keys[i], cache.values[i]
            y_BTD, k, v = _attention(
                layer["attn"], h_BTD, past, where, mask, angles, config
            )
            x_BTD = x_BTD + y_BTD
            h_BTD = norm(x_BTD, layer["mlp_norm"], config)
            x_BTD = x_BTD + mlp(layer["mlp"], h_BTD, config)
            keys.append(k)
            values.append(v)
        x_BTD = x_BTD if all_logits else x_BTD[:, -1:]
        x_BTD = norm(x_BTD, params["final_norm"], config)
        head = params["embedding" if config.tie_embeddings else "head"]
        length = cache.length + ids.shape[1]
        new = KVCache(tuple(keys), tuple(values), where.mask, length, {})
        return F.linear(x_BTD, head), new

    return Decoder(
        init_cache,
        apply,
        max_positions=config.max_seq_len,
        vocab_size=config.vocab_size,
    )


def _angles(
    positions_BT: Tensor, config: GPTConfig, like: Tensor
) -> tuple[Tensor, Tensor]:
    """Cosines and sines of the rotary angles at these positions, ``[B, 1, T, K/2]``."""
    frequency_K = rope_frequencies(config.head_dim, config.rope_theta, like)
    angle = positions_BT.to(frequency_K.dtype)[:, None, :, None] * frequency_K
    return angle.cos(), angle.sin()


def _attention(
    weights: Params,
    x_BTD: Tensor,
    past: tuple[Tensor, Tensor],
    where: Reading,
    mask: Tensor,
    angles: tuple[Tensor, Tensor],
    config: GPTConfig,
) -> tuple[Tensor, Tensor, Tensor]:
    """The block's attention, and its keys and values with the new ones."""
    q_BHTK = rotate(heads(x_BTD, weights["q"], config), *angles, kernels=config.kernels)
    k_BGTK = rotate(heads(x_BTD, weights["k"], config), *angles, kernels=config.kernels)
    k_BGSK = where.put(past[0], k_BGTK)
    v_BGSK = where.put(past[1], heads(x_BTD, weights["v"], config))
    y_BHTK = F.scaled_dot_product_attention(
        q_BHTK,
        k_BGSK.to(q_BHTK.dtype),
        v_BGSK.to(q_BHTK.dtype),
        attn_mask=mask,
        enable_gqa=config.n_kv_heads != config.n_heads,
    )
    y_ND = y_BHTK.transpose(1, 2).reshape(-1, weights["o"].shape[1])
    y_BTD = F.linear(y_ND, weights["o"]).view_as(x_BTD)
    return y_BTD, k_BGSK, v_BGSK
