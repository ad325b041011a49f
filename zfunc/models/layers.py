# SPDX-License-Identifier: Apache-2.0
"""Norms and rotary positions: pure functions, in fp32 or wider inside.

On a CUDA device each is one kernel of ``zfunc.kernels``.

Shape suffixes: B batch, T time, D model, H heads, K head dim.
"""

from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from zfunc.kernels.cross_entropy import cross_entropy
from zfunc.kernels.layer_norm import layer_norm as fused_layer_norm
from zfunc.kernels.library import runs_triton
from zfunc.kernels.rms_norm import rms_norm as fused_rms_norm
from zfunc.kernels.rope import rope

Kernels = Literal["auto", "triton", "reference"]


def widen(dtype: torch.dtype) -> torch.dtype:
    """The dtype for statistics, angles and losses: fp32, or fp64 if given fp64.

    Args:
      dtype: A floating dtype.

    Returns:
      The wider of ``dtype`` and ``torch.float32``.

    Examples:
      >>> widen(torch.bfloat16), widen(torch.float64)
      (torch.float32, torch.float64)
    """
    return torch.promote_types(dtype, torch.float32)


def embed(tokens: Tensor, table_VD: Tensor) -> Tensor:
    """Rows of a table, with a gradient that adds up in fp32 or wider.

    Args:
      tokens: Row numbers, any shape.
      table_VD: The table, ``[V, D]``.

    Returns:
      ``tokens.shape + [D]``, in the dtype of the table.

    Examples:
      >>> table = torch.ones(4, 1, dtype=torch.bfloat16)
      >>> often = torch.zeros(1000, dtype=torch.int64)
      >>> torch.func.grad(lambda t: embed(often, t).sum())(table)[0]
      tensor([1000.], dtype=torch.bfloat16)

    Differs from:
      ``F.embedding`` adds up in bf16 on a CPU and stops at 256 there: 256 + 1 is 256.
    """
    wide = F.embedding(tokens, table_VD.to(widen(table_VD.dtype)))
    return wide.to(table_VD.dtype)


def rms_norm(
    x: Tensor, scale_D: Tensor, eps: float, *, kernels: Kernels = "auto"
) -> Tensor:
    r"""Root-mean-square norm, :math:`x / \sqrt{\mathrm{mean}(x^2) + eps} \cdot s`.

    Args:
      x: ``[..., D]``, any floating dtype.
      scale_D: The scale s, ``[D]``.
      eps: Added to the mean square.
      kernels: "auto" is a fused kernel on CUDA, torch's calls elsewhere.

    Returns:
      ``[..., D]`` in the dtype of ``x``; computed in ``widen(x.dtype)``.

    Examples:
      >>> rms_norm(torch.tensor([3.0, -3.0]), torch.ones(2), eps=0.0)
      tensor([ 1., -1.])

    References:
      Zhang and Sennrich, `RMSNorm <https://arxiv.org/abs/1910.07467>`_, 2019.

    Differs from:
      Hugging Face's Llama rounds to the dtype of ``x`` before it multiplies by the
      scale; here the result is rounded once.
    """
    y: Tensor = fused_rms_norm(x, scale_D, eps, kernel=kernels)
    return y


def layer_norm(
    x: Tensor, scale_D: Tensor, eps: float, *, kernels: Kernels = "auto"
) -> Tensor:
    """Layer norm without a bias: ``rms_norm`` of the centred input.

    Args:
      x: ``[..., D]``, any floating dtype.
      scale_D: The scale, ``[D]``.
      eps: Added to the variance.
      kernels: As in ``rms_norm``.

    Returns:
      ``[..., D]`` in the dtype of ``x``; computed in ``widen(x.dtype)``.

    Examples:
      >>> layer_norm(torch.tensor([1.0, 3.0]), torch.ones(2), eps=0.0)
      tensor([-1.,  1.])

    References:
      Ba et al., `Layer Normalization <https://arxiv.org/abs/1607.06450>`_, 2016.
    """
    y: Tensor = fused_layer_norm(x, scale_D, None, eps, kernel=kernels)
    return y


def rope_tables(
    num_positions: int, head_dim: int, theta: float, like: Tensor
) -> tuple[Tensor, Tensor]:
    r"""Cosines and sines of the rotary angles :math:`t \cdot \theta^{-2i/K}`.

    Args:
      num_positions: Positions t run from 0 to ``num_positions - 1``.
      head_dim: K, even.
      theta: Base of the wavelengths.
      like: Gives the device, and the dtype ``widen(like.dtype)``.

    Returns:
      ``(cos, sin)``, each ``[num_positions, K / 2]``.

    Examples:
      >>> cos, sin = rope_tables(3, 4, 10_000.0, torch.zeros(()))
      >>> cos.shape, cos[0], sin[0]
      (torch.Size([3, 2]), tensor([1., 1.]), tensor([0., 0.]))

    References:
      Su et al., `RoFormer <https://arxiv.org/abs/2104.09864>`_, 2021, section 3.4.
    """
    frequency_K = rope_frequencies(head_dim, theta, like)
    options: Any = {"dtype": frequency_K.dtype, "device": like.device}
    angle_TK = torch.arange(num_positions, **options)[:, None] * frequency_K
    return angle_TK.cos(), angle_TK.sin()


def rope_frequencies(head_dim: int, theta: float, like: Tensor) -> Tensor:
    r"""Rotary angles per position, :math:`\theta^{-2i/K}`: ``[K / 2]``.

    Args:
      head_dim: K, even.
      theta: Base of the wavelengths.
      like: Gives the device, and the dtype ``widen(like.dtype)``.

    Examples:
      >>> rope_frequencies(4, 10_000.0, torch.zeros(()))
      tensor([1.0000, 0.0100])
    """
    options: Any = {"dtype": widen(like.dtype), "device": like.device}
    exponent_K = torch.arange(0, head_dim, 2, **options) / head_dim
    return 1.0 / theta**exponent_K


def rotate(
    x_BHTK: Tensor, cos_TK: Tensor, sin_TK: Tensor, *, kernels: Kernels = "auto"
) -> Tensor:
    """Turn each pair of coordinates ``(i, i + K / 2)`` by its angle.

    Args:
      x_BHTK: Queries or keys ``[..., T, K]``.
      cos_TK: Cosines ``[T, K / 2]``, from ``rope_tables``.
      sin_TK: Sines ``[T, K / 2]``.
      kernels: As in ``rms_norm``.

    Returns:
      ``[..., T, K]`` in the dtype of ``x_BHTK``; computed in that of the tables.

    Examples:
      >>> x = torch.tensor([[1.0, 0.0]])
      >>> rotate(x, torch.zeros(1, 1), torch.ones(1, 1))  # by a right angle
      tensor([[0., 1.]])

    Differs from:
      The paper pairs neighbours ``(2i, 2i + 1)``; this is the layout of Llama's
      weights on Hugging Face. Their Llama turns in the dtype of ``x_BHTK``; fp32
      matters for long contexts in bf16.
    """
    turned: Tensor = rope(x_BHTK, cos_TK, sin_TK, kernel=kernels)
    return turned


def token_losses(
    logits_NV: Tensor, targets_N: Tensor, *, kernels: Kernels = "auto"
) -> Tensor:
    r"""Cross-entropy of each token in nats, :math:`-\log p(\text{target})`.

    Args:
      logits_NV: ``[N, V]``, any floating dtype.
      targets_N: Labels in [0, V), ``[N]``; -100 has loss 0.
      kernels: As in ``rms_norm``. A kernel reads the logits as they are, and no copy of
        them in fp32 is made.

    Returns:
      ``[N]``, in ``widen(logits_NV.dtype)``.

    Examples:
      >>> token_losses(torch.zeros(2, 4), torch.tensor([1, -100]))
      tensor([1.3863, 0.0000])
    """
    if runs_triton("token_losses", kernels, logits_NV, targets_N):
        losses: Tensor = cross_entropy(logits_NV, targets_N, kernel="triton")
        return losses
    wide_NV = logits_NV.to(widen(logits_NV.dtype))
    return F.cross_entropy(wide_NV, targets_N, reduction="none")
