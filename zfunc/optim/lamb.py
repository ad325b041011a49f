# SPDX-License-Identifier: Apache-2.0
"""LAMB: Adam whose step in each leaf is in proportion to the leaf."""

import torch
from torch import Tensor

from zfunc.core.tree import (
    PyTree,
    tree_leaves,
    tree_map,
    tree_structure,
    tree_unflatten,
)
from zfunc.kernels.square_root import square_root
from zfunc.optim.base import (
    LEAF,
    GradientTransformation,
    UpdateFn,
    chain,
    check_moments,
    check_updates,
    stateless,
    widen,
)
from zfunc.optim.checks import check_number
from zfunc.optim.decay import Mask, add_decayed_weights
from zfunc.optim.fused import Kernels
from zfunc.optim.one_pass import adam_outline, one_pass
from zfunc.optim.one_pass_lamb import lamb_rule
from zfunc.optim.scale_by_adam import ScaleByAdamMoments, scale_by_adam
from zfunc.optim.schedules import Schedule, scale_by_learning_rate
from zfunc.optim.whole import placed_leaves, square_sum, sum_over_ranks


def scale_by_trust_ratio(
    max_coeff: float = 10.0, min_coeff: float = 0.01
) -> GradientTransformation:
    r"""Scale the update of each leaf by the norm of the leaf over that of the update.

    .. math::
      u' = \phi \, u, \quad
      \phi = \mathrm{clip}(\|p\| / \|u\|, \text{min\_coeff}, \text{max\_coeff})

    and :math:`\phi = 1` where either norm is 0. The norms are those of the whole leaf
    over all ranks. They cost one ``psum`` of two numbers per leaf over each axis that
    shards leaves, one message for all leaves, and no host sync.

    Args:
      max_coeff: The largest ratio, above 0.
      min_coeff: The smallest, at least 0 and at most ``max_coeff``.

    Returns:
      A transformation without moments.

    Raises:
      TypeError: A bound that is not a number.
      ValueError: A bound out of its range.
      StructureError: (from ``update``) updates that are not like the parameters.

    Laws:
      The ratios do not depend on the placement, to rounding. Padding stays zero.

    Examples:
      >>> tx, p = scale_by_trust_ratio(), torch.tensor([3.0, 4.0])
      >>> tx.update(torch.tensor([0.0, 2.0]), tx.init(p), p)[0]
      tensor([0., 5.])

    References:
      You et al., `Large Batch Optimization for Deep Learning
      <https://arxiv.org/abs/1904.00962>`_, 2020, algorithm 2.

    Differs from:
      The paper bounds :math:`\|p\|` by an unnamed function; bounds on the ratio are
      DeepSpeed's. optax's ``scale_by_trust_ratio`` has a lower bound on the norms.
    """
    high = check_number(
        "scale_by_trust_ratio: max_coeff",
        max_coeff,
        above_low=True,
        instead="max_coeff=10.0",
    )
    low = check_number(
        "scale_by_trust_ratio: min_coeff", min_coeff, instead="min_coeff=0.01"
    )
    if low > high:
        raise ValueError(
            f"scale_by_trust_ratio: min_coeff is {min_coeff!r} and max_coeff is "
            f"{max_coeff!r}, expected min_coeff <= max_coeff; type for example "
            "max_coeff=10.0, min_coeff=0.01"
        )

    def scale(updates: PyTree, params: PyTree) -> PyTree:
        check_updates(params, updates)
        norms = _norms([*placed_leaves(params), *placed_leaves(updates)])
        count = len(norms) // 2
        scaled = []
        for u, p_norm, u_norm in zip(
            tree_leaves(updates), norms[:count], norms[count:], strict=True
        ):
            wide, bounded = widen(u), (p_norm / u_norm).clamp(low, high)
            ratio = torch.where((p_norm == 0) | (u_norm == 0), 1.0, bounded)
            scaled.append(wide * ratio.to(wide.dtype))
        return tree_unflatten(tree_structure(updates), scaled)

    return stateless("scale_by_trust_ratio", scale, leafwise=False)


def _norms(leaves: list[object]) -> list[Tensor]:
    """The norm of each leaf over all ranks."""
    return [x.sqrt() for x in sum_over_ranks([square_sum(leaf) for leaf in leaves])]


def lamb(
    learning_rate: float | Schedule,
    b1: float = 0.9,
    b2: float = 0.999,
    eps: float = 1e-8,
    weight_decay: float = 0.0,
    mask: Mask | None = None,
    *,
    bias_correction: bool = True,
    max_coeff: float = 10.0,
    min_coeff: float = 0.01,
    kernels: Kernels = "auto",
) -> GradientTransformation:
    r"""LAMB: :math:`p_{t+1} = p_t - \eta_t \phi (\mathrm{adam}_t(g_t) + \lambda p_t)`.

    :math:`\phi` is the trust ratio of each leaf, see ``scale_by_trust_ratio``. Memory:
    two float32 moments, 8 bytes per parameter. Wire: two numbers per leaf.

    Args:
      learning_rate: :math:`\eta`, at least 0, or a schedule.
      b1: Decay of the mean, in [0, 1).
      b2: Decay of the mean square, in [0, 1).
      eps: Added to the denominator, at least 0.
      weight_decay: :math:`\lambda`, at least 0; inside of the trust ratio.
      mask: Which leaves decay, ``(path, leaf) -> bool``; all if None.
      bias_correction: Whether Adam's two means are corrected for their start at 0.
      max_coeff: The largest trust ratio, above 0.
      min_coeff: The smallest, at least 0 and at most ``max_coeff``.
      kernels: "auto" runs the step as two passes of Triton kernels where the parameters
        are on a CUDA device, "triton" insists on it, "reference" never does; the same
        up to roundings of the norms.

    Returns:
      The optimizer: ``chain(scale_by_adam, add_decayed_weights,
      scale_by_trust_ratio, scale_by_learning_rate)``.

    Raises:
      TypeError: A hyper-parameter of the wrong kind.
      ValueError: One out of its range.

    Laws:
      The formula of the paper in float64, at every step; the same on any mesh.

    Examples:
      >>> from zfunc.optim import apply_updates
      >>> tx, p = lamb(0.1), torch.tensor([3.0, 4.0])
      >>> updates, moments = tx.update(torch.tensor([7.0, 0.0]), tx.init(p), p)
      >>> apply_updates(p, updates)  # Adam's update is [1, 0]: the step is 0.1 * 5
      tensor([2.5000, 4.0000])

    References:
      You et al., `Large Batch Optimization for Deep Learning
      <https://arxiv.org/abs/1904.00962>`_, 2020, algorithm 2.

    Differs from:
      DeepSpeed's ``FusedLamb`` multiplies the bias corrections into the learning rate,
      so that they scale ``eps`` and the decay too; here they are in the moments, as in
      the paper. Its ``max_grad_norm`` is ``clip_by_global_norm`` here.
    """
    if not isinstance(bias_correction, bool):
        raise TypeError(
            f"lamb: bias_correction is a {type(bias_correction).__name__}, expected "
            "True or False"
        )
    b1 = check_number("lamb: b1", b1, high=1.0, instead="b1=0.9")
    adam = scale_by_adam(b1, b2, eps)
    if not bias_correction:
        adam = adam._replace(update=_uncorrected(b1, float(b2), float(eps)))
    parts = chain(
        adam,
        add_decayed_weights(weight_decay, mask),
        scale_by_trust_ratio(max_coeff, min_coeff),
        scale_by_learning_rate(learning_rate),
    )
    rule = lamb_rule(
        *(float(b1), float(b2), float(eps)),
        bias_correction=bias_correction,
        max_coeff=max_coeff,
        min_coeff=min_coeff,
    )
    fused = one_pass(
        *("lamb", learning_rate, weight_decay, mask, kernels, adam_outline, rule)
    )
    # Not in halves: what a donated step computes is what a pure one does.
    return parts._replace(fused=fused, halves=())


def _uncorrected(b1: float, b2: float, eps: float) -> UpdateFn:
    """The update of ``scale_by_adam`` with the means as they are."""

    def update(
        updates: PyTree, moments: PyTree, params: PyTree
    ) -> tuple[PyTree, PyTree]:
        expected = ScaleByAdamMoments(LEAF, updates, updates)
        check_moments("lamb", expected, moments)
        mu = tree_map(
            lambda m, u: b1 * m + (1 - b1) * u.to(m.dtype), moments.mu, updates
        )
        nu = tree_map(
            lambda n, u: b2 * n + (1 - b2) * u.to(n.dtype).square(), moments.nu, updates
        )

        def scaled(m: Tensor, n: Tensor) -> Tensor:
            ratio = m / (square_root(n) + eps)
            return ratio if eps else torch.where(m == 0, m, ratio)

        after = ScaleByAdamMoments(moments.count + 1, mu, nu)
        return tree_map(scaled, mu, nu), after

    return update
