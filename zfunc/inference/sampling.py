# SPDX-License-Identifier: Apache-2.0
"""The next token from its logits; randomness is a key per row and a step number.

Shape suffixes: B batch, V vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from zfunc.core import random


@dataclass(frozen=True)
class Sampling:
    """How a token is chosen: ``temperature=0`` takes the most likely one.

    Args:
      temperature: Divides the logits.
      top_k: Only the k most likely tokens can be drawn; None: all.
      top_p: Only the fewest most likely tokens whose probabilities sum to at least
        this can be drawn; None: all.

    Examples:
      >>> Sampling(temperature=0.7, top_k=50)
      Sampling(temperature=0.7, top_k=50, top_p=None)
    """

    temperature: float = 0.0
    top_k: int | None = None
    top_p: float | None = None


def keep_top_k(logits_BV: Tensor, k: int) -> Tensor:
    """Logits with -inf for all but the k largest of each row, and their equals.

    Args:
      logits_BV: Any floating dtype.
      k: At least 1; more than V keeps all.

    Examples:
      >>> keep_top_k(torch.tensor([[1.0, 3.0, 2.0]]), 2)
      tensor([[-inf, 3., 2.]])
    """
    least_B1 = logits_BV.topk(min(k, logits_BV.shape[-1]), dim=-1).values[:, -1:]
    return logits_BV.masked_fill(logits_BV < least_B1, -torch.inf)


def keep_top_p(logits_BV: Tensor, p: float) -> Tensor:
    r"""Logits with -inf outside of the nucleus.

    The nucleus of a row is the fewest most likely tokens whose probabilities sum to at
    least p; it has at least one.

    Args:
      logits_BV: Any floating dtype.
      p: In (0, 1].

    Examples:
      >>> keep_top_p(torch.tensor([[0.5, 0.3, 0.2]]).log(), 0.6).isinf()
      tensor([[False, False,  True]])

    References:
      Holtzman et al., `The curious case of neural text degeneration
      <https://arxiv.org/abs/1904.09751>`_, 2019, section 3.1.
    """
    rising_BV, order_BV = logits_BV.sort(dim=-1)
    # The mass of a token and all that are less likely; what is within the last 1 - p
    # is not needed to reach p.
    tail_BV = rising_BV.softmax(-1).cumsum(-1)
    dropped_BV = (tail_BV <= 1 - p) & (
        torch.arange(tail_BV.shape[-1], device=tail_BV.device) < tail_BV.shape[-1] - 1
    )
    back_BV = torch.zeros_like(dropped_BV).scatter(-1, order_BV, dropped_BV)
    return logits_BV.masked_fill(back_BV, -torch.inf)


def filtered(logits_BV: Tensor, how: Sampling) -> Tensor:
    """The logits that tokens are drawn by: temperature, then top-k, then top-p.

    Args:
      logits_BV: In float32 or wider.
      how: With a temperature above 0.

    Examples:
      >>> filtered(torch.tensor([[1.0, 2.0]]), Sampling(0.5))
      tensor([[2., 4.]])
    """
    scores_BV = logits_BV / how.temperature
    if how.top_k is not None:
        scores_BV = keep_top_k(scores_BV, how.top_k)
    if how.top_p is not None:
        scores_BV = keep_top_p(scores_BV, how.top_p)
    return scores_BV


def choose(
    logits_BV: Tensor, how: Sampling, keys_B: Tensor, step: Tensor
) -> tuple[Tensor, Tensor]:
    r"""The next token of each row.

    Drawn by inverting the distribution: the first v with
    :math:`\sum_{w \le v} p_w > u`, where u is a hash of the row's key and the step. So
    a row's draws depend on its own logits and key, not on the rows beside it.

    Args:
      logits_BV: Any floating dtype; read in float32 or wider.
      how: Greedy at temperature 0, where keys are not read.
      keys_B: One random key per row.
      step: The number of the token, 0-d.

    Returns:
      ``(token int64 [B], broken bool [B])``; broken: the row's logits have a NaN.

    Examples:
      >>> logits = torch.tensor([[0.0, 2.0, 1.0]])
      >>> choose(logits, Sampling(), torch.tensor([0]), torch.tensor(0))
      (tensor([1]), tensor([False]))
    """
    logits_BV = logits_BV.to(torch.promote_types(logits_BV.dtype, torch.float32))
    if how.temperature == 0:
        token_B1 = logits_BV.argmax(-1, keepdim=True)
        return token_B1[:, 0], logits_BV.gather(-1, token_B1)[:, 0].isnan()
    scores_BV = filtered(logits_BV, how)
    reached_BV = scores_BV.to(torch.float64).softmax(-1).cumsum(-1)
    high, low = random.uniform(random.fold_in(keys_B, step), (2,)).double().unbind(-1)
    total_B1 = reached_BV[:, -1:]
    goal_B1 = (high + low * 2.0**-24)[:, None] * total_B1
    token_B1 = torch.searchsorted(reached_BV, goal_B1, right=True)
    last = logits_BV.shape[-1] - 1  # past it only where there is a NaN
    return token_B1[:, 0].clamp(max=last), total_B1[:, 0].isnan()
