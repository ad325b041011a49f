# SPDX-License-Identifier: Apache-2.0
"""The block of ``gpt``: attention and an MLP, each behind a norm.

Shape suffixes: B batch, T time, D model, H query heads, G key/value heads, K head dim.
"""

from typing import Any

import torch.nn.functional as F
from torch import Tensor

from zfunc.core import random
from zfunc.kernels.bias_dropout_residual import bias_dropout_residual
from zfunc.kernels.layer_norm import layer_norm as fused_layer_norm
from zfunc.kernels.rms_norm import rms_norm as fused_rms_norm
from zfunc.kernels.swiglu import swiglu
from zfunc.models.attention import causal_attention
from zfunc.models.gpt_config import GPTConfig
from zfunc.models.layers import layer_norm, rms_norm, rotate

Params = dict[str, Any]


def block(
    layer: Params,
    x_BTD: Tensor,
    cos_TK: Tensor,
    sin_TK: Tensor,
    keys: Tensor | None,
    *,
    config: GPTConfig,
) -> Tensor:
    """One block: ``x + attention(norm(x))``, then ``x + mlp(norm(x))``."""
    h_BTD = norm(x_BTD, layer["attn_norm"], config)
    h_BTD = _attention(layer["attn"], h_BTD, cos_TK, sin_TK, config)
    if keys is None:
        h_BTD, x_BTD = _add_norm(x_BTD, h_BTD, layer["mlp_norm"], config)
    else:
        x_BTD = _add_dropout(keys, 0, h_BTD, x_BTD, config)
        h_BTD = norm(x_BTD, layer["mlp_norm"], config)
    return _add_dropout(keys, 1, mlp(layer["mlp"], h_BTD, config), x_BTD, config)


def _attention(
    weights: Params, x_BTD: Tensor, cos_TK: Tensor, sin_TK: Tensor, config: GPTConfig
) -> Tensor:
    q_BHTK = heads(x_BTD, weights["q"], config)
    k_BGTK = heads(x_BTD, weights["k"], config)
    q_BHTK = rotate(q_BHTK, cos_TK, sin_TK, kernels=config.kernels)
    k_BGTK = rotate(k_BGTK, cos_TK, sin_TK, kernels=config.kernels)
    y_BHTK = causal_attention(q_BHTK, k_BGTK, heads(x_BTD, weights["v"], config))
    return F.linear(y_BHTK.transpose(1, 2).flatten(2), weights["o"])


def heads(x_BTD: Tensor, weight: Tensor, config: GPTConfig) -> Tensor:
    """A projection, one head per row of the second dim: ``[B, H, T, K]``, a view."""
    y_BTHK: Tensor = F.linear(x_BTD, weight).unflatten(-1, (-1, config.head_dim))
    return y_BTHK.transpose(1, 2)


def mlp(weights: Params, x_BTD: Tensor, config: GPTConfig) -> Tensor:
    """The MLP of one block."""
    up = F.linear(x_BTD, weights["up"])
    if config.mlp == "swiglu":
        gate = F.linear(x_BTD, weights["gate"])
        return F.linear(swiglu(gate, up, kernel=config.kernels), weights["down"])
    return F.linear(F.gelu(up), weights["down"])


def norm(x_BTD: Tensor, scale_D: Tensor, config: GPTConfig) -> Tensor:
    """The norm that the config names."""
    function = rms_norm if config.norm == "rms" else layer_norm
    return function(x_BTD, scale_D, config.norm_eps, kernels=config.kernels)


def _add_norm(
    x_BTD: Tensor, h_BTD: Tensor, scale_D: Tensor, config: GPTConfig
) -> tuple[Tensor, Tensor]:
    """The norm of ``x + h``, and ``x + h``, in one pass over them."""
    options: Any = {"residual": h_BTD, "kernel": config.kernels}
    pair: tuple[Tensor, Tensor]
    if config.norm == "rms":
        pair = fused_rms_norm(x_BTD, scale_D, config.norm_eps, **options)
    else:
        pair = fused_layer_norm(x_BTD, scale_D, None, config.norm_eps, **options)
    return pair


def _add_dropout(
    keys: Tensor | None, site: int, h: Tensor, x: Tensor, config: GPTConfig
) -> Tensor:
    """``x + dropout(h)``, in one pass over them."""
    if keys is None:
        return x + h
    options: Any = {"rate": config.dropout, "kernel": config.kernels}
    key = random.fold_in(keys, site)
    y: Tensor = bias_dropout_residual(h, None, x, key, **options)
    return y


def dropout(keys: Tensor | None, site: int, x: Tensor, config: GPTConfig) -> Tensor:
    """Dropout where keys are given; ``site`` tells the places of one block apart."""
    if keys is None:
        return x
    return random.dropout(random.fold_in(keys, site), x, config.dropout)
