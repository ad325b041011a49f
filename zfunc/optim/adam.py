# SPDX-License-Identifier: Apache-2.0
"""Adam."""

from zfunc.optim.base import GradientTransformation, chain
from zfunc.optim.decay import add_decayed_weights
from zfunc.optim.fused import Kernels
from zfunc.optim.one_pass import adam_outline, adam_rule, one_pass
from zfunc.optim.scale_by_adam import scale_by_adam
from zfunc.optim.schedules import Schedule, scale_by_learning_rate


def adam(
    learning_rate: float | Schedule,
    b1: float | Schedule = 0.9,
    b2: float = 0.999,
    eps: float = 1e-8,
    weight_decay: float = 0.0,
    *,
    kernels: Kernels = "auto",
) -> GradientTransformation:
    r"""Adam: :math:`p_{t+1} = p_t - \eta_t \, \mathrm{adam}_t(g_t + \lambda p_t)`.

    The weight decay is coupled: it goes through the moments, as the gradient of
    :math:`\tfrac{\lambda}{2} \|p\|^2` would. ``adamw`` is the decoupled one.

    Args:
      learning_rate: :math:`\eta`, at least 0, or a schedule.
      b1: Decay of the mean, in [0, 1), or a schedule (see ``scale_by_adam``).
      b2: Decay of the mean square, in [0, 1).
      eps: Added to the denominator, at least 0.
      weight_decay: :math:`\lambda`, at least 0.
      kernels: "auto" runs the step as one Triton kernel where the parameters are on a
        CUDA device, and of 2^20 elements or more as one pass in C++ on a CPU; "triton"
        asks for the first (where this is the end of a chain), "reference" for neither;
        the same bits.

    Returns:
      The optimizer: ``chain(add_decayed_weights, scale_by_adam,
      scale_by_learning_rate)``.

    Raises:
      TypeError: A hyper-parameter of the wrong kind.
      ValueError: One out of its range.

    Laws:
      ``torch.optim.Adam`` to rounding, at every step.

    Examples:
      >>> import torch
      >>> from zfunc.optim import apply_updates
      >>> tx, p = adam(0.1), torch.ones(2)
      >>> updates, moments = tx.update(torch.tensor([5.0, -5.0]), tx.init(p), p)
      >>> apply_updates(p, updates)
      tensor([0.9000, 1.1000])

    References:
      Kingma and Ba, `Adam <https://arxiv.org/abs/1412.6980>`_, 2015.

    Differs from:
      DeepSpeed's ``Adam`` decouples the weight decay (its ``adam_w_mode`` is on by
      default); that is ``adamw`` here. No ``amsgrad`` and no ``maximize``.
    """
    parts = chain(
        add_decayed_weights(weight_decay),
        scale_by_adam(b1, b2, eps),
        scale_by_learning_rate(learning_rate),
    )
    fused = one_pass(
        *("adam", learning_rate, weight_decay, None, kernels),
        *(adam_outline, adam_rule(b1, b2, eps, coupled=True)),
    )
    return parts._replace(fused=fused)
