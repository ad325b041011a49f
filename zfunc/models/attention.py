# SPDX-License-Identifier: Apache-2.0
"""Causal attention that is exact under ``torch.func.vjp`` and ``torch.func.vmap``.

Shape suffixes: B batch, H query heads, G key/value heads, T time, K head dim.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

_aten = torch.ops.aten


def causal_attention(q_BHTK: Tensor, k_BGTK: Tensor, v_BGTK: Tensor) -> Tensor:
    r"""Grouped-query causal attention, ``softmax(q k^T / sqrt(K) + causal) v``.

    Query head ``h`` reads key/value head ``h // (H / G)``. Memory is linear in T:
    this is ``scaled_dot_product_attention(is_causal=True)`` on every device.

    Args:
      q_BHTK: Queries ``[B, H, T, K]``, any floating dtype.
      k_BGTK: Keys ``[B, G, T, K]`` with G dividing H, dtype of ``q_BHTK``.
      v_BGTK: Values ``[B, G, T, K]``, dtype of ``q_BHTK``.

    Returns:
      ``[B, H, T, K]`` in the dtype of ``q_BHTK``.

    Raises:
      ValueError: The shapes are not the ones above, or T is 0.
      RuntimeError: Second derivatives on CPU (the fused kernel has none).

    Examples:
      >>> q, k = torch.randn(2, 4, 3, 8), torch.randn(2, 2, 3, 8)
      >>> causal_attention(q, k, k).shape
      torch.Size([2, 4, 3, 8])
      >>> torch.equal(causal_attention(q, k, k)[:, 0, 0], k[:, 0, 0])
      True

    Differs from:
      ``F.scaled_dot_product_attention`` has no vmap rule for its CPU kernel in torch
      2.13: it warns and runs a Python-side loop. Here the mapped axis is folded into
      the batch, so one kernel call serves all of it, and the result is bitwise the
      one of a loop. Other devices have the rule already and take the stock function.
    """
    _check_shapes(q_BHTK.shape, k_BGTK.shape, v_BGTK.shape)
    if q_BHTK.device.type == "cpu":
        out_BHTK: Tensor = _CpuAttention.apply(q_BHTK, k_BGTK, v_BGTK)[0]  # type: ignore[no-untyped-call]
        return out_BHTK
    grouped = q_BHTK.shape[1] != k_BGTK.shape[1]
    return F.scaled_dot_product_attention(
        q_BHTK, k_BGTK, v_BGTK, is_causal=True, enable_gqa=grouped
    )


def _check_shapes(q: torch.Size, k: torch.Size, v: torch.Size) -> None:
    """The kernel itself checks nothing and reads out of bounds."""
    fits = len(q) == 4 and k == v and (k[:1] + k[2:]) == (q[:1] + q[2:])
    if not fits or q[2] == 0 or k[1] == 0 or q[1] % k[1]:
        raise ValueError(
            f"causal_attention: got q {tuple(q)}, k {tuple(k)}, v {tuple(v)}, expected "
            "q [B, H, T, K] and k, v [B, G, T, K] with G dividing H and T > 0; "
            "transpose(1, 2) swaps heads and time"
        )


def _rows(*tensors: Tensor) -> list[Tensor]:
    """Make the last dim dense: the kernel reads it so, without looking at strides."""
    return [x if x.stride(-1) == 1 else x.contiguous() for x in tensors]


def _fold(
    batch_size: int, in_dims: tuple[int | None, ...], tensors: tuple[Tensor, ...]
) -> list[Tensor]:
    """Move each mapped dim to the front and merge it with the batch dim."""
    return [
        (
            tensor.expand(batch_size, *tensor.shape)
            if in_dim is None
            else tensor.movedim(in_dim, 0)
        ).flatten(0, 1)
        for tensor, in_dim in zip(tensors, in_dims, strict=True)
    ]


class _CpuAttention(torch.autograd.Function):
    """The kernel that the stock function picks on CPU, with a vmap rule."""

    @staticmethod
    def forward(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        out, logsumexp = _aten._scaled_dot_product_flash_attention_for_cpu(
            *_rows(q, k, v), 0.0, True
        )
        return out, logsumexp

    @staticmethod
    def setup_context(
        ctx: Any, inputs: tuple[Tensor, ...], output: tuple[Tensor, Tensor]
    ) -> None:
        ctx.set_materialize_grads(False)
        ctx.mark_non_differentiable(output[1])
        ctx.save_for_backward(*inputs, *output)

    @staticmethod
    def backward(ctx: Any, grad_out: Tensor | None, _: None) -> Any:
        if grad_out is None:
            return None, None, None
        return _CpuAttentionPullback.apply(grad_out, *ctx.saved_tensors)  # type: ignore[no-untyped-call]

    @staticmethod
    def vmap(info: Any, in_dims: Any, *tensors: Tensor) -> Any:
        folded = _fold(info.batch_size, in_dims, tensors)
        outputs = _CpuAttention.apply(*folded)  # type: ignore[no-untyped-call]
        return tuple(x.unflatten(0, (info.batch_size, -1)) for x in outputs), (0, 0)


class _CpuAttentionPullback(torch.autograd.Function):
    """The transpose of ``_CpuAttention``, with the same vmap rule."""

    @staticmethod
    def forward(*tensors: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        *rows, logsumexp = tensors
        dq, dk, dv = _aten._scaled_dot_product_flash_attention_for_cpu_backward(
            *_rows(*rows), logsumexp, 0.0, True
        )
        return dq, dk, dv

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        pass

    @staticmethod
    def backward(ctx: Any, *_: Tensor) -> Any:
        raise RuntimeError(
            "causal_attention has no second derivative on CPU: got a backward pass "
            "through its pullback, expected first derivatives only. Write the "
            "attention out (softmax(q @ k.mT) @ v) for a Hessian."
        )

    @staticmethod
    def vmap(info: Any, in_dims: Any, *tensors: Tensor) -> Any:
        folded = _fold(info.batch_size, in_dims, tensors)
        outputs = _CpuAttentionPullback.apply(*folded)  # type: ignore[no-untyped-call]
        return tuple(x.unflatten(0, (info.batch_size, -1)) for x in outputs), (0, 0, 0)
