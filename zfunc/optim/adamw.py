# SPDX-License-Identifier: Apache-2.0
"""AdamW: Adam with the weight decay beside the moments instead of in them."""

from zfunc.optim.base import GradientTransformation, chain
from zfunc.optim.decay import Mask, add_decayed_weights
from zfunc.optim.fused import Kernels
from zfunc.optim.one_pass import adam_outline, adam_rule, one_pass
from zfunc.optim.scale_by_adam import scale_by_adam
from zfunc.optim.schedules import Schedule, scale_by_learning_rate


def adamw(
    learning_rate: float | Schedule,
    b1: float | Schedule = 0.9,
    b2: float = 0.999,
    eps: float = 1e-8,
    weight_decay: float = 0.01,
    mask: Mask | None = None,
    *,
    kernels: Kernels = "auto",
) -> GradientTransformation:
    r"""AdamW: :math:`p_{t+1} = (1 - \eta_t \lambda) p_t - \eta_t \mathrm{adam}_t(g_t)`.

    Memory: two float32 moments, 8 bytes per parameter.

    Args:
      learning_rate: :math:`\eta`, at least 0, or a schedule. It scales the decay too.
      b1: Decay of the mean, in [0, 1), or a schedule (see ``scale_by_adam``).
      b2: Decay of the mean square, in [0, 1).
      eps: Added to the denominator, at least 0.
      weight_decay: :math:`\lambda`, at least 0.
      mask: Which leaves decay, ``(path, leaf) -> bool``; all if None. The usual one is
        ``decay_matrices``.
      kernels: "auto" runs the step as one Triton kernel where the parameters are on a
        CUDA device, and of 2^20 elements or more as one pass in C++ on a CPU; "triton"
        asks for the first (where this is the end of a chain), "reference" for neither;
        the same bits.

    Returns:
      The optimizer: ``chain(scale_by_adam, add_decayed_weights,
      scale_by_learning_rate)``.

    Raises:
      TypeError: A hyper-parameter of the wrong kind; a mask that is not a function,
        or (from ``init`` and ``update``) that returns something else than a bool.
      ValueError: A hyper-parameter out of its range.

    Laws:
      ``torch.optim.AdamW`` to rounding, at every step.

    Examples:
      >>> import torch
      >>> from zfunc.optim import apply_updates, decay_matrices
      >>> tx = adamw(0.1, weight_decay=0.5, mask=decay_matrices)
      >>> params = {"bias": torch.ones(1), "w": torch.ones(1, 1)}
      >>> grads = {"bias": torch.zeros(1), "w": torch.zeros(1, 1)}
      >>> updates, moments = tx.update(grads, tx.init(params), params)
      >>> apply_updates(params, updates)
      {'bias': tensor([1.]), 'w': tensor([[0.9500]])}

    References:
      Loshchilov and Hutter, `Decoupled Weight Decay Regularization
      <https://arxiv.org/abs/1711.05101>`_, 2019.

    Differs from:
      The paper keeps the decay out of the learning rate (only a schedule multiplies
      both); torch, optax, DeepSpeed and this one multiply it by the rate. optax's
      default ``weight_decay`` is 1e-4, and its mask is a tree of bools.
    """
    parts = chain(
        scale_by_adam(b1, b2, eps),
        add_decayed_weights(weight_decay, mask),
        scale_by_learning_rate(learning_rate),
    )
    fused = one_pass(
        *("adamw", learning_rate, weight_decay, mask, kernels),
        *(adam_outline, adam_rule(b1, b2, eps, coupled=False)),
    )
    return parts._replace(fused=fused)
