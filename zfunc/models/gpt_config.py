# SPDX-License-Identifier: Apache-2.0
"""The shape of a decoder-only transformer, as a frozen value that checks itself."""

from dataclasses import dataclass
from types import MappingProxyType
from typing import Final, Literal, get_args

from zfunc.models.layers import Kernels

_POSITIVE = (
    *("vocab_size", "d_model", "n_layers", "n_heads", "n_kv_heads", "d_ff"),
    *("rope_theta", "max_seq_len", "norm_eps"),
)

_CHOICES: Final = MappingProxyType(
    {
        "norm": ("rms", "layer"),
        "mlp": ("swiglu", "gelu"),
        "kernels": get_args(Kernels),
    }
)


@dataclass(frozen=True, kw_only=True)
class GPTConfig:
    """The shape of a decoder-only transformer; it validates itself.

    The defaults are a small byte-level model. Llama is ``norm="rms"``,
    ``mlp="swiglu"``; GPT-2's block is ``norm="layer"``, ``mlp="gelu"`` (here with
    rotary positions, and without biases).

    Args:
      vocab_size: Number of token ids, V.
      d_model: Width of the residual stream, D.
      n_layers: Number of blocks.
      n_heads: Query heads, H. The head dim K is ``d_model / n_heads`` and even.
      n_kv_heads: Key/value heads, G, dividing ``n_heads``: equal to it for
        multi-head, 1 for multi-query, between for grouped-query attention.
      d_ff: Hidden width of the MLP.
      norm: ``"rms"`` (no centring) or ``"layer"``; scale only, statistics in fp32.
      mlp: ``"swiglu"``, ``down(silu(gate x) * up x)``, or ``"gelu"``,
        ``down(gelu(up x))`` with the exact (erf) GELU.
      tie_embeddings: Whether the output head is the embedding matrix.
      rope_theta: Base of the rotary wavelengths.
      max_seq_len: Longest context in tokens.
      dropout: Rate in ``[0, 1)``, on the embedding and on both residual branches.
      norm_eps: Added to the variance.
      kernels: ``"auto"`` runs norms, rotations, the gated unit and the loss as fused
        kernels on a CUDA device; ``"reference"`` as torch's calls everywhere;
        ``"triton"`` insists on the kernels. No part of the model: any of them may
        train or evaluate the same parameters, within roundings.

    Raises:
      ValueError: A field is out of range, or two fields do not divide.

    Examples:
      >>> GPTConfig(d_model=64, n_heads=4, n_kv_heads=2).head_dim
      16
      >>> GPTConfig(d_model=64, n_heads=5, n_kv_heads=5)
      Traceback (most recent call last):
      ...
      ValueError: GPTConfig: d_model=64 is not a multiple of n_heads=5; ...
    """

    vocab_size: int = 256
    d_model: int = 256
    n_layers: int = 4
    n_heads: int = 4
    n_kv_heads: int = 4
    d_ff: int = 768
    norm: Literal["rms", "layer"] = "rms"
    mlp: Literal["swiglu", "gelu"] = "swiglu"
    tie_embeddings: bool = True
    rope_theta: float = 10_000.0
    max_seq_len: int = 512
    dropout: float = 0.0
    norm_eps: float = 1e-5
    kernels: Kernels = "auto"

    def __post_init__(self) -> None:
        """Check every field; the first one that is wrong is the error."""
        for name in _POSITIVE:
            _require(
                getattr(self, name) > 0,
                f"{name}={getattr(self, name)!r}, expected a positive number",
            )
        _require(
            self.d_model % self.n_heads == 0,
            f"d_model={self.d_model} is not a multiple of n_heads={self.n_heads}; "
            f"type d_model={_round_up(self.d_model, 2 * self.n_heads)}",
        )
        _require(
            self.head_dim % 2 == 0,
            f"head dim d_model/n_heads={self.head_dim} is odd, expected an even "
            "number (rotary positions turn pairs); "
            f"type d_model={_round_up(self.d_model, 2 * self.n_heads)}",
        )
        _require(
            self.n_heads % self.n_kv_heads == 0,
            f"n_heads={self.n_heads} is not a multiple of n_kv_heads="
            f"{self.n_kv_heads}; type n_kv_heads={self.n_heads} (multi-head) or a "
            "divisor of it (grouped-query)",
        )
        for name, choices in _CHOICES.items():
            _require(
                getattr(self, name) in choices,
                f"{name}={getattr(self, name)!r}, expected one of {choices}",
            )
        _require(
            0.0 <= self.dropout < 1.0,
            f"dropout={self.dropout!r}, expected a rate in [0, 1); type dropout=0.0 "
            "to turn it off",
        )

    @property
    def head_dim(self) -> int:
        """Width of one attention head, ``d_model / n_heads``."""
        return self.d_model // self.n_heads


def _round_up(value: int, multiple: int) -> int:
    return -(-value // multiple) * multiple


def _require(condition: bool, problem: str) -> None:
    if not condition:
        raise ValueError(f"GPTConfig: {problem}")
