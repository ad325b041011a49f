# SPDX-License-Identifier: Apache-2.0
"""Lion: the sign of an interpolated momentum."""

from zfunc.optim.base import GradientTransformation, chain
from zfunc.optim.decay import Mask, add_decayed_weights
from zfunc.optim.fused import Kernels
from zfunc.optim.one_pass import lion_rule, one_pass
from zfunc.optim.scale_by_lion import ScaleByLionMoments, scale_by_lion
from zfunc.optim.schedules import Schedule, scale_by_learning_rate


def lion(
    learning_rate: float | Schedule,
    b1: float = 0.9,
    b2: float = 0.999,
    weight_decay: float = 0.0,
    mask: Mask | None = None,
    *,
    kernels: Kernels = "auto",
) -> GradientTransformation:
    r"""Lion: :math:`p_{t+1} = (1 - \eta_t \lambda) p_t - \eta_t \mathrm{lion}_t(g_t)`.

    Memory: one float32 moment, 4 bytes per parameter. Every element moves by the
    whole learning rate, so a rate of a third to a tenth of AdamW's is usual, with a
    weight decay that is larger by as much.

    Args:
      learning_rate: :math:`\eta`, at least 0, or a schedule. It scales the decay too.
      b1: What the momentum weighs in the update, in [0, 1).
      b2: Decay of the momentum, in [0, 1).
      weight_decay: :math:`\lambda`, at least 0.
      mask: Which leaves decay, ``(path, leaf) -> bool``; all if None. The usual one is
        ``decay_matrices``.
      kernels: "auto" runs the step as one Triton kernel where the parameters are on a
        CUDA device, "triton" asks for it (if this is the end of a chain), "reference"
        never does; the same bits.

    Returns:
      The optimizer: ``chain(scale_by_lion, add_decayed_weights,
      scale_by_learning_rate)``.

    Raises:
      TypeError: A hyper-parameter of the wrong kind; a mask that is not a function,
        or (from ``init`` and ``update``) that returns something else than a bool.
      ValueError: A hyper-parameter out of its range.

    Laws:
      Algorithm 2 of the paper to rounding, at every step.

    Examples:
      >>> import torch
      >>> from zfunc.optim import apply_updates
      >>> tx, p = lion(0.1), torch.ones(2)
      >>> updates, moments = tx.update(torch.tensor([5.0, -0.01]), tx.init(p), p)
      >>> apply_updates(p, updates)
      tensor([0.9000, 1.1000])

    References:
      Chen et al., `Symbolic Discovery of Optimization Algorithms
      <https://arxiv.org/abs/2302.06675>`_, 2023.

    Differs from:
      The paper and optax take ``b2=0.99``; the default here is that of DeepSpeed's
      ``FusedLion``. optax decays by 1e-3 by default.
    """
    parts = chain(
        scale_by_lion(b1, b2),
        add_decayed_weights(weight_decay, mask),
        scale_by_learning_rate(learning_rate),
    )
    fused = one_pass(
        *("lion", learning_rate, weight_decay, mask, kernels),
        *(ScaleByLionMoments, lion_rule(b1, b2)),
    )
    return parts._replace(fused=fused)
