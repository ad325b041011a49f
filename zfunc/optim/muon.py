# SPDX-License-Identifier: Apache-2.0
"""Muon: momentum made orthogonal for matrices, Adam for everything else."""

import math
import re
from collections.abc import Callable
from typing import Any, Final, Literal

import torch
from torch import Tensor

from zfunc.core.sharding import P, Sharded, is_sharded
from zfunc.core.tree import (
    PyTree,
    leaves_with_path,
    pytree,
    tree_structure,
    tree_unflatten,
)
from zfunc.optim.base import (
    LEAF,
    GradientTransformation,
    chain,
    check_moments,
    check_updates,
    new_count,
    zeros_wide,
)
from zfunc.optim.checks import check_count, check_number
from zfunc.optim.decay import Mask, add_decayed_weights
from zfunc.optim.orthogonal import orthogonalized_leaves
from zfunc.optim.scale_by_adam import ScaleByAdamMoments, scale_by_adam
from zfunc.optim.schedules import (
    ScaleByLearningRateMoments,
    Schedule,
    scale_by_learning_rate,
)
from zfunc.optim.whole import (
    buffer_of,
    merged,
    only,
    outline_beside,
    placed_leaves,
    shape_of,
    spec_of,
    with_buffer,
    zeros_beside,
)

NOT_HIDDEN: Final = frozenset(
    {"embed", "embedding", "embeddings", "wte", "wpe", "head"}
)
Scale = Literal["original", "match_rms_adamw"]


@pytree
class ScaleByMuonMoments:
    """What ``scale_by_muon`` remembers: the count, a momentum, Adam's mean squares.

    ``nu`` is an empty tensor for each matrix, which needs none.

    Examples:
      >>> scale_by_muon().init({"b": torch.ones(1), "w": torch.ones(2, 2)}).nu
      {'b': tensor([0.]), 'w': tensor([])}
    """

    count: Tensor
    mu: PyTree
    nu: PyTree


def hidden_matrices(path: str, leaf: Sharded | Tensor) -> bool:
    """The usual mask of Muon: what has two dims, except embeddings and the head.

    Args:
      path: Where the leaf is, as ``"layers/0/w"``. One with a word ``embed``,
        ``embedding``, ``embeddings``, ``wte``, ``wpe`` or ``head`` in it is not hidden
        (words end at ``/``, ``.`` and ``_``).
      leaf: The parameter; of a ``Sharded`` one the global shape counts.

    Returns:
      Whether the leaf is updated by Muon.

    Examples:
      >>> w = torch.ones(2, 3)
      >>> [
      ...     hidden_matrices(p, w)
      ...     for p in ("layers/0/up", "embedding", "lm_head/weight")
      ... ]
      [True, False, False]

    Differs from:
      DeepSpeed has no default: parameters carry an attribute ``use_muon``.
    """
    words = re.split(r"[/._]", path.lower())
    return len(shape_of(leaf)) == 2 and not set(words) & NOT_HIDDEN


def scale_by_muon(
    momentum: float = 0.95,
    *,
    nesterov: bool = True,
    num_steps: int = 5,
    scale: Scale = "original",
    dtype: torch.dtype | None = None,
    b1: float = 0.9,
    b2: float = 0.95,
    eps: float = 1e-10,
    mask: Mask | None = None,
) -> GradientTransformation:
    r"""Replace the updates of matrices by their orthogonalized momentum.

    From :math:`\mu_0 = 0`, for a matrix of R rows and C columns:

    .. math::
      \mu_t &= \beta \mu_{t-1} + (1 - \beta) u_t \\
      u'_t &= s(R, C) \, \mathrm{orthogonalized}(
              \beta \mu_t + (1 - \beta) u_t \text{ if nesterov, else } \mu_t)

    with :math:`s = \sqrt{\max(1, R/C)}` ("original") or
    :math:`0.2 \sqrt{\max(R, C)}` ("match_rms_adamw": the size of Adam's updates).
    Leaves that the mask does not pick go through ``scale_by_adam``.

    Cost: equal matrices (of one shape and placement, L of them on n ranks) are dealt
    out whole: by one all-to-all each rank gets :math:`\lceil L/n \rceil` of them,
    orthogonalizes these, and sends the pieces back by another. If n divides L a rank
    sends :math:`2 L R C (n - 1) / n^2` numbers, and no matrix is orthogonalized twice.
    A leaf that is replicated is orthogonalized on every rank.

    Args:
      momentum: :math:`\beta` in [0, 1).
      nesterov: Look ahead along the new momentum.
      num_steps: Newton-Schulz iterations, at least 1.
      scale: The convention of :math:`s`.
      dtype: Of the iterations; None is that of the momentum, float32 at least.
      b1: Adam's decay of the mean, in [0, 1).
      b2: Adam's decay of the mean square, in [0, 1).
      eps: Added to Adam's denominator, at least 0.
      mask: Which leaves are matrices, ``(path, leaf) -> bool``; ``hidden_matrices`` if
        None. Of more than two dims, the last two are those of matrices in a stack.

    Returns:
      A transformation with ``ScaleByMuonMoments``, in float32 at least: a buffer like
      the parameters, and a second one for what is not a matrix.

    Raises:
      TypeError: An option of the wrong kind; a mask that returns (in ``init`` and
        ``update``) something else than a bool.
      ValueError: An option out of its range; (from ``update``) a mask that picks a
        leaf of fewer than two dims.
      StructureError: (from ``update``) the moments of something else.

    Laws:
      The update of a matrix does not depend on its placement, to rounding.

    Examples:
      >>> tx, p = scale_by_muon(), {"w": torch.zeros(2, 2)}
      >>> u = {"w": torch.tensor([[0.0, 8.0], [2.0, 0.0]])}
      >>> tx.update(u, tx.init(p), p)[0]["w"].round(decimals=2)
      tensor([[0.0000, 0.7400],
              [0.7400, 0.0000]])

    References:
      Jordan et al., `Muon <https://kellerjordan.github.io/posts/muon/>`_, 2024; Liu et
      al., `Muon is scalable for LLM training <https://arxiv.org/abs/2502.16982>`_,
      2025, for the second scale.

    Differs from:
      ``torch.optim.Muon`` takes matrices only and always iterates in bfloat16.
    """
    beta = check_number(
        "scale_by_muon: momentum", momentum, high=1.0, instead="momentum=0.95"
    )
    check_count("scale_by_muon: num_steps", num_steps, low=1, instead="num_steps=5")
    _check_options(nesterov, scale, dtype, mask)
    adam, picker = scale_by_adam(b1, b2, eps), mask or hidden_matrices

    def init(params: PyTree) -> PyTree:
        picks = _picks(picker, params)
        nu = _mean_squares(params, picks, zeros_beside)
        return ScaleByMuonMoments(new_count(params), zeros_wide(params), nu)

    def update(
        updates: PyTree, moments: PyTree, params: PyTree
    ) -> tuple[PyTree, PyTree]:
        check_updates(params, updates)
        picks = _picks(picker, params)
        _check_dims(params, picks)
        nu = _mean_squares(params, picks, outline_beside)
        check_moments("scale_by_muon", ScaleByMuonMoments(LEAF, updates, nu), moments)
        rest = [not pick for pick in picks]
        before = ScaleByAdamMoments(
            moments.count, only(moments.mu, rest), only(moments.nu, rest)
        )
        others, after = adam.update(only(updates, rest), before, only(params, rest))
        grads = placed_leaves(only(updates, picks))
        mu = _averaged(beta, placed_leaves(only(moments.mu, picks)), grads)
        ahead = _averaged(beta, mu, grads) if nesterov else mu
        matrices = [
            with_buffer(leaf, _factor(scale, shape_of(leaf)) * y)
            for leaf, y in zip(
                ahead, orthogonalized_leaves(ahead, num_steps, dtype), strict=True
            )
        ]
        nothing = placed_leaves(only(moments.nu, picks))
        new = ScaleByMuonMoments(
            moments.count + 1,
            merged(updates, picks, mu, placed_leaves(after.mu)),
            merged(updates, picks, nothing, placed_leaves(after.nu)),
        )
        return merged(updates, picks, matrices, placed_leaves(others)), new

    return GradientTransformation(init, update)


def _check_options(nesterov: Any, scale: Any, dtype: Any, mask: Any) -> None:
    if not isinstance(nesterov, bool):
        raise TypeError(
            f"scale_by_muon: nesterov is a {type(nesterov).__name__}, expected True or "
            "False"
        )
    if scale not in ("original", "match_rms_adamw"):
        raise ValueError(
            f"scale_by_muon: scale is {scale!r}, expected 'original' or "
            "'match_rms_adamw'"
        )
    floating = isinstance(dtype, torch.dtype) and dtype.is_floating_point
    if dtype is not None and not floating:
        raise TypeError(
            f"scale_by_muon: dtype is {dtype!r}, expected None or a floating dtype; "
            "type for example dtype=torch.bfloat16"
        )
    if mask is not None and not callable(mask):
        raise TypeError(
            f"scale_by_muon: mask is a {type(mask).__name__}, expected a function "
            "(path, leaf) -> bool; type for example mask=hidden_matrices"
        )


def _picks(mask: Mask, params: PyTree) -> list[bool]:
    """The mask's answer for each leaf."""
    picks = []
    for path, leaf in leaves_with_path(params, is_sharded):
        pick = mask(path, leaf)
        if not isinstance(pick, bool):
            raise TypeError(
                f"scale_by_muon: mask({path!r}, leaf) returned a "
                f"{type(pick).__name__}, expected True or False; type for example "
                "lambda path, leaf: path.endswith('up')"
            )
        picks.append(pick)
    return picks


def _check_dims(params: PyTree, picks: list[bool]) -> None:
    for (path, leaf), pick in zip(
        leaves_with_path(params, is_sharded), picks, strict=True
    ):
        if pick and len(shape_of(leaf)) < 2:
            raise ValueError(
                f"scale_by_muon: mask({path!r}, leaf) is True for a leaf of shape "
                f"{shape_of(leaf)}, expected two dims or more; type for example "
                "mask=hidden_matrices"
            )


def _mean_squares(
    params: PyTree, picks: list[bool], make: Callable[..., Any]
) -> PyTree:
    """Adam's second moments at the start, and nothing in the place of matrices."""
    leaves = [
        make(p, P(), (0,)) if pick else make(p, P(*spec_of(p)), shape_of(p))
        for p, pick in zip(placed_leaves(params), picks, strict=True)
    ]
    return tree_unflatten(tree_structure(params, is_sharded), leaves)


def _averaged(beta: float, means: list[Any], updates: list[Any]) -> list[Any]:
    """One more step of each running mean."""
    averaged = []
    for mean, u in zip(means, updates, strict=True):
        m = buffer_of(mean)
        averaged.append(
            with_buffer(mean, beta * m + (1 - beta) * buffer_of(u).to(m.dtype))
        )
    return averaged


def _factor(scale: Scale, shape: tuple[int, ...]) -> float:
    rows, columns = shape[-2:]
    if scale == "match_rms_adamw":
        return 0.2 * math.sqrt(max(rows, columns))
    return math.sqrt(max(1.0, rows / max(columns, 1)))


def muon(
    learning_rate: float | Schedule = 0.02,
    momentum: float = 0.95,
    weight_decay: float = 0.0,
    *,
    nesterov: bool = True,
    num_steps: int = 5,
    scale: Scale = "original",
    dtype: torch.dtype | None = None,
    adam_learning_rate: float | Schedule = 3e-4,
    b1: float = 0.9,
    b2: float = 0.95,
    eps: float = 1e-10,
    mask: Mask | None = None,
    decay_mask: Mask | None = None,
) -> GradientTransformation:
    r"""Muon for matrices, AdamW with a learning rate of its own for the rest.

    :math:`p_{t+1} = (1 - \eta_t \lambda) p_t - \eta_t u'_t`, with :math:`u'_t` from
    ``scale_by_muon``. Memory: 4 bytes per element of a matrix, 8 of anything else.

    Args:
      learning_rate: :math:`\eta` of matrices, at least 0, or a schedule.
      momentum: Decay of the momentum of matrices, in [0, 1).
      weight_decay: :math:`\lambda`, at least 0.
      nesterov: Look ahead along the new momentum.
      num_steps: Newton-Schulz iterations, at least 1.
      scale: "original", or "match_rms_adamw" for matrices that move as under AdamW;
        then ``learning_rate`` is of the size of AdamW's.
      dtype: Of the iterations; ``torch.bfloat16`` is the usual choice on GPUs.
      adam_learning_rate: :math:`\eta` of the rest, at least 0, or a schedule.
      b1: Adam's decay of the mean, in [0, 1).
      b2: Adam's decay of the mean square, in [0, 1).
      eps: Added to Adam's denominator, at least 0.
      mask: Which leaves are matrices, see ``scale_by_muon``.
      decay_mask: Which leaves decay, ``(path, leaf) -> bool``; all if None.

    Returns:
      The optimizer: ``chain(scale_by_muon, add_decayed_weights)`` and the two rates.

    Raises:
      TypeError: A hyper-parameter of the wrong kind.
      ValueError: One out of its range.

    Laws:
      ``torch.optim.Muon`` with float64 iterations, to rounding, at every step; the
      same on any mesh.

    Examples:
      >>> from zfunc.optim import apply_updates
      >>> tx, p = muon(0.1), {"w": torch.zeros(2, 2)}
      >>> g = {"w": torch.tensor([[0.0, -5.0], [-5.0, 0.0]])}
      >>> updates, moments = tx.update(g, tx.init(p), p)
      >>> apply_updates(p, updates)["w"].round(decimals=2)
      tensor([[0.0000, 0.1100],
              [0.1100, 0.0000]])

    References:
      Jordan et al., `Muon <https://kellerjordan.github.io/posts/muon/>`_, 2024.

    Differs from:
      DeepSpeed marks the parameters and iterates in bfloat16 on the rank that owns
      each; here a mask picks them. ``torch.optim.Muon`` leaves the rest to a second
      optimizer, its rate is 1e-3 and its ``weight_decay`` 0.1 by default.
    """
    direction = scale_by_muon(
        momentum,
        nesterov=nesterov,
        num_steps=num_steps,
        scale=scale,
        dtype=dtype,
        b1=b1,
        b2=b2,
        eps=eps,
        mask=mask,
    )
    return chain(
        direction,
        add_decayed_weights(weight_decay, decay_mask),
        _two_rates(learning_rate, adam_learning_rate, mask or hidden_matrices),
    )


def _two_rates(
    learning_rate: float | Schedule, rest_rate: float | Schedule, mask: Mask
) -> GradientTransformation:
    """``scale_by_learning_rate`` with one rate for what the mask picks."""
    parts = scale_by_learning_rate(learning_rate), scale_by_learning_rate(rest_rate)

    def update(
        updates: PyTree, moments: PyTree, params: PyTree
    ) -> tuple[PyTree, PyTree]:
        check_moments("muon", ScaleByLearningRateMoments(LEAF), moments)
        picks = _picks(mask, params)
        made = []
        for part, some in zip(parts, (picks, [not p for p in picks]), strict=True):
            scaled, after = part.update(only(updates, some), moments, params)
            made.append(placed_leaves(scaled))
        return merged(updates, picks, *made), after

    return GradientTransformation(parts[0].init, update, leafwise=True)
