# SPDX-License-Identifier: Apache-2.0
"""A decoder-only transformer as functions of a parameter pytree.

The model of how to write a model here: a frozen config, ``init(config) -> params``,
``apply(params, tokens, config) -> logits`` and ``loss(params, batch) -> Mean``. No
class holds a weight, nothing is mutated, nothing knows where a parameter lives.

Shape suffixes: B batch, T time, D model, H query heads, G key/value heads, K head
dim, V vocabulary. Weight matrices are ``[out, in]`` as in ``torch.nn.Linear``.
"""

import functools
import math
from collections.abc import Callable, Mapping

import torch
import torch.nn.functional as F
from torch import Tensor

from zfunc.core import random
from zfunc.core.state import Mean
from zfunc.core.tree import tree_leaves
from zfunc.models import gpt_block
from zfunc.models.gpt_block import Params, dropout, norm
from zfunc.models.gpt_config import GPTConfig as GPTConfig
from zfunc.models.layers import embed, rope_tables, token_losses

Block = Callable[[Params, Tensor, Tensor, Tensor, Tensor | None], Tensor]


def init(
    config: GPTConfig, seed: int = 0, dtype: torch.dtype = torch.float32
) -> Params:
    r"""Random parameters, a pure function of ``(config, seed)``.

    Matrices are drawn from :math:`N(0, 0.02^2)`, those that write to the residual
    stream (``attn/o``, ``mlp/down``) from :math:`N(0, 0.02^2 / 2L)` for L layers;
    norm scales are 1. Drawn in fp32 on the CPU and rounded to ``dtype``, so a seed
    means the same model in every dtype.

    Args:
      config: Shape of the model.
      seed: Any integer that ``torch.Generator.manual_seed`` takes.
      dtype: Storage dtype of every leaf.

    Returns:
      ``{"embedding": [V, D], "layers": [layer, ...], "final_norm": [D]}``, and
      ``"head": [V, D]`` if the embeddings are not tied. A layer is ``{"attn_norm":
      [D], "attn": {"q": [HK, D], "k": [GK, D], "v": [GK, D], "o": [D, HK]},
      "mlp_norm": [D], "mlp": {"gate", "up": [d_ff, D], "down": [D, d_ff]}}``
      (no ``gate`` with ``mlp="gelu"``).

    Examples:
      >>> params = init(GPTConfig(n_layers=2), seed=1)
      >>> len(params["layers"]), params["layers"][0]["attn"]["q"].shape
      (2, torch.Size([256, 256]))

      Shapes only, nothing allocated:

      >>> with torch.device("meta"):
      ...     huge = init(GPTConfig(d_model=8192, n_heads=64, n_kv_heads=8))
      >>> huge["embedding"].device
      device(type='meta')
    """
    generator = torch.Generator("cpu").manual_seed(seed)
    width, kv_width = config.d_model, config.n_kv_heads * config.head_dim
    residual_std = 0.02 / math.sqrt(2 * config.n_layers)

    def normal(*shape: int, std: float = 0.02) -> Tensor:
        return torch.randn(shape, generator=generator).mul(std).to(dtype)

    def layer() -> Params:
        attn = {
            "q": normal(width, width),
            "k": normal(kv_width, width),
            "v": normal(kv_width, width),
            "o": normal(width, width, std=residual_std),
        }
        gate = {"gate": normal(config.d_ff, width)} if config.mlp == "swiglu" else {}
        mlp = gate | {
            "up": normal(config.d_ff, width),
            "down": normal(width, config.d_ff, std=residual_std),
        }
        return {
            "attn_norm": torch.ones(width, dtype=dtype),
            "attn": attn,
            "mlp_norm": torch.ones(width, dtype=dtype),
            "mlp": mlp,
        }

    params = {
        "embedding": normal(config.vocab_size, width),
        "layers": [layer() for _ in range(config.n_layers)],
        "final_norm": torch.ones(width, dtype=dtype),
    }
    head = {} if config.tie_embeddings else {"head": normal(config.vocab_size, width)}
    return params | head


def apply(
    params: Params,
    tokens: Tensor,
    config: GPTConfig,
    *,
    keys: Tensor | None = None,
    remat: Callable[[Block], Block] | None = None,
) -> Tensor:
    r"""Next-token logits.

    For each block, :math:`x \leftarrow x + \mathrm{attn}(\mathrm{norm}(x))` and
    :math:`x \leftarrow x + \mathrm{mlp}(\mathrm{norm}(x))`; then a final norm and
    the head. Matrix products run in the dtype of the parameters, the norm's
    statistics and the rotation of queries and keys in fp32 (or wider).

    Args:
      params: As made by ``init``, in any floating dtype.
      tokens: Integer ids ``[B, T]``, each below ``vocab_size``, T at most
        ``max_seq_len``.
      config: The config that made ``params``.
      keys: One random key per sample ``[B]``. Dropout is on if and only if keys are
        given and ``config.dropout > 0``.
      remat: Transforms the block so that its backward recomputes it (``zf.remat``).
        The block is closed: everything it reads is an argument.

    Returns:
      Logits ``[B, T, V]`` in the dtype of the parameters.

    Raises:
      ValueError: ``tokens`` or ``keys`` have a wrong shape or dtype, T exceeds
        ``max_seq_len``, or ``params`` have another number of layers.

    Examples:
      >>> config = GPTConfig(d_model=32, n_layers=2, d_ff=64)
      >>> tokens = torch.tensor([[72, 101, 108, 108, 111]])
      >>> apply(init(config), tokens, config).shape
      torch.Size([1, 5, 256])

    Differs from:
      GPT-2 and nanoGPT also drop attention probabilities; the fused kernels here do
      not.
    """
    _check(params, tokens, config, keys)
    if config.dropout == 0.0:
        keys = None
    x_BTD = dropout(keys, 0, embed(tokens, params["embedding"]), config)
    cos_TK, sin_TK = rope_tables(
        tokens.shape[1], config.head_dim, config.rope_theta, x_BTD
    )
    block: Block = functools.partial(gpt_block.block, config=config)
    block = block if remat is None else remat(block)
    for index, layer in enumerate(params["layers"]):
        layer_keys = None if keys is None else random.fold_in(keys, index + 1)
        x_BTD = block(layer, x_BTD, cos_TK, sin_TK, layer_keys)
    x_BTD = norm(x_BTD, params["final_norm"], config)
    return F.linear(x_BTD, params["embedding" if config.tie_embeddings else "head"])


def loss(
    params: Params,
    batch: Mapping[str, Tensor],
    keys: Tensor | None = None,
    *,
    config: GPTConfig,
    remat: Callable[[Block], Block] | None = None,
) -> Mean:
    r"""Next-token cross-entropy in nats, as an exact weighted mean.

    .. math:: \mathrm{total} = -\sum_{b,t} m_{b,t+1} \log p(x_{b,t+1} | x_{b,\le t}),
       \qquad \mathrm{weight} = \sum_{b,t} m_{b,t+1}

    Args:
      params: As made by ``init``.
      batch: ``{"tokens": int64 [B, T + 1]}`` and optionally ``"mask"``, bool or
        floating, of the same shape: which tokens count *as targets*. The mask of the
        first column is never read (nothing predicts it). Without a mask every
        target counts once.
      keys: One random key per sample ``[B]``, for dropout.
      config: The config that made ``params``; close over it with
        ``functools.partial(loss, config=config)``.
      remat: As in ``apply``.

    Returns:
      ``Mean(total, weight)``, both 0-d fp32 (fp64 for fp64 parameters): totals and
      weights add over microbatches and ranks, so unequal token counts do not bias.

    Raises:
      ValueError: As ``apply``, or the mask's shape is not the tokens'.

    Examples:
      >>> config = GPTConfig(d_model=32, n_layers=1, d_ff=64)
      >>> batch = {"tokens": torch.arange(12).reshape(2, 6)}
      >>> mean = loss(init(config), batch, config=config)
      >>> mean.weight.item(), abs(mean.value().item() - math.log(256)) < 0.1
      (10.0, True)
    """
    tokens_BS = batch["tokens"]
    logits_BTV = apply(params, tokens_BS[:, :-1], config, keys=keys, remat=remat)
    target_N = tokens_BS[:, 1:].flatten().long()
    nll_N = token_losses(logits_BTV.flatten(0, 1), target_N, kernels=config.kernels)
    mask_BS = batch.get("mask")
    if mask_BS is None:
        return Mean(nll_N.sum(), torch.ones_like(nll_N).sum())
    _require(
        mask_BS.shape == tokens_BS.shape,
        "loss",
        f'batch["mask"] has shape {tuple(mask_BS.shape)}, expected that of '
        f'batch["tokens"], {tuple(tokens_BS.shape)}; mask[:, t] says whether '
        "tokens[:, t] counts as a target",
    )
    weight_N = mask_BS[:, 1:].flatten().to(nll_N.dtype)
    return Mean((nll_N * weight_N).sum(), weight_N.sum())


def num_params(config: GPTConfig) -> int:
    """Number of parameters (elements), a tied embedding counted once.

    Args:
      config: Shape of the model.

    Returns:
      The element count of ``init(config)``; nothing is allocated.

    Examples:
      >>> num_params(GPTConfig())
      3475712
    """
    return sum(leaf.numel() for leaf in _abstract_leaves(config))


def flops_per_token(config: GPTConfig, seq_len: int | None = None) -> int:
    r"""Floating-point operations per token of one forward and backward pass.

    :math:`6 N + 12 L D T`: N counts the weights used in matrix products (so the head
    but not the embedding lookup nor the norms), and the second term is attention's
    two products over T keys, without the causal discount (the PaLM convention). The
    forward alone is a third. Recomputation is not counted.

    Args:
      config: Shape of the model.
      seq_len: Context T in tokens, ``config.max_seq_len`` by default.

    Returns:
      Operations per token, a multiply-add being two.

    Examples:
      >>> flops_per_token(GPTConfig(), seq_len=512)
      27131904

    References:
      Chowdhery et al., `PaLM <https://arxiv.org/abs/2204.02311>`_, 2022, appendix B.
    """
    length = config.max_seq_len if seq_len is None else seq_len
    lookup = 0 if config.tie_embeddings else config.vocab_size * config.d_model
    matrices = sum(x.numel() for x in _abstract_leaves(config) if x.ndim == 2) - lookup
    return 6 * matrices + 12 * config.n_layers * config.d_model * length


@torch.no_grad()
def sample(
    params: Params,
    prompt_tokens: Tensor,
    config: GPTConfig,
    num_tokens: int,
    temperature: float = 1.0,
    seed: int = 0,
) -> Tensor:
    """Continue a prompt; a pure function of its arguments.

    Each step runs the whole context, cropped to its last ``max_seq_len`` tokens:
    quadratic work, for looking at a model and not for serving it.

    Args:
      params: As made by ``init``.
      prompt_tokens: Integer ids ``[B, T]`` with T at least 1.
      config: The config that made ``params``.
      num_tokens: How many tokens to add to each row.
      temperature: Divides the logits; 0 takes the most likely token.
      seed: Seed of the draws.

    Returns:
      ``[B, T + num_tokens]``: the prompt and its continuation.

    Raises:
      ValueError: An empty prompt, or a negative ``num_tokens`` or ``temperature``.

    Examples:
      >>> config = GPTConfig(d_model=32, n_layers=1, d_ff=64)
      >>> prompt = torch.tensor([[1, 2, 3]])
      >>> sample(init(config), prompt, config, num_tokens=2).shape
      torch.Size([1, 5])
    """
    for name, value in (("num_tokens", num_tokens), ("temperature", temperature)):
        _require(value >= 0, "sample", f"{name}={value}, expected 0 or more")
    generator = torch.Generator(prompt_tokens.device).manual_seed(seed)
    tokens = prompt_tokens
    for _ in range(num_tokens):
        logits = apply(params, tokens[:, -config.max_seq_len :], config)[:, -1].float()
        if temperature == 0:
            chosen = logits.argmax(-1, keepdim=True)
        else:
            probabilities = torch.softmax(logits / temperature, -1)
            chosen = torch.multinomial(probabilities, 1, generator=generator)
        tokens = torch.cat([tokens, chosen.to(tokens.dtype)], dim=1)
    return tokens


def _abstract_leaves(config: GPTConfig) -> list[Tensor]:
    with torch.device("meta"):
        return tree_leaves(init(config))


def _require(condition: bool, where: str, problem: str) -> None:
    if not condition:
        raise ValueError(f"gpt.{where}: {problem}")


def _check(
    params: Params, tokens: Tensor, config: GPTConfig, keys: Tensor | None
) -> None:
    """Static checks only (shapes and dtypes), so that tracing sees none of them."""
    _require(
        tokens.ndim == 2 and tokens.dtype in (torch.int32, torch.int64),
        "apply",
        f"tokens are {tokens.dtype} {tuple(tokens.shape)}, expected int64 [B, T]; "
        "use tokens.long(), and tokens[None] for a single sequence",
    )
    _require(
        1 <= tokens.shape[1] <= config.max_seq_len,
        "apply",
        f"got {tokens.shape[1]} tokens per sequence, expected 1 to max_seq_len="
        f"{config.max_seq_len}; crop with tokens[:, -{config.max_seq_len}:] or raise "
        "GPTConfig(max_seq_len=...)",
    )
    _require(
        len(params["layers"]) == config.n_layers,
        "apply",
        f"params have {len(params['layers'])} layers, expected n_layers="
        f"{config.n_layers}; pass the config that made them to init",
    )
    _require(
        keys is None or keys.shape == tokens.shape[:1],
        "apply",
        f"keys have shape {None if keys is None else tuple(keys.shape)}, expected "
        f"one key per sample, [{tokens.shape[0]}]",
    )
