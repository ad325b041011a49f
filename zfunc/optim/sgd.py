# SPDX-License-Identifier: Apache-2.0
"""Gradient descent with momentum."""

from zfunc.core.tree import PyTree
from zfunc.optim.base import LEAF, GradientTransformation, chain, identity
from zfunc.optim.decay import add_decayed_weights
from zfunc.optim.fused import Kernels
from zfunc.optim.one_pass import one_pass, sgd_rule
from zfunc.optim.schedule_values import check_factor
from zfunc.optim.schedules import Schedule, scale_by_learning_rate
from zfunc.optim.trace import TraceMoments, check_trace, trace


def sgd(
    learning_rate: float | Schedule,
    momentum: float | Schedule = 0.0,
    nesterov: bool = False,
    weight_decay: float = 0.0,
    dampening: float = 0.0,
    *,
    kernels: Kernels = "auto",
) -> GradientTransformation:
    r"""Gradient descent: :math:`p_{t+1} = p_t - \eta_t \, b_t(g_t + \lambda p_t)`.

    :math:`b_t` is ``trace``, or nothing without momentum. The weight decay is coupled:
    it goes through the momentum, as the gradient of
    :math:`\tfrac{\lambda}{2} \|p\|^2` would.

    Args:
      learning_rate: :math:`\eta`, at least 0, or a schedule.
      momentum: :math:`\mu`, at least 0, or a schedule; the number 0 keeps no buffer.
      nesterov: Nesterov's variant; needs momentum.
      weight_decay: :math:`\lambda`, at least 0.
      dampening: See ``trace``.
      kernels: "auto" runs the step as one Triton kernel where the parameters are on a
        CUDA device, "triton" asks for it (if this is the end of a chain), "reference"
        never does; the same bits.

    Returns:
      The optimizer: ``chain(add_decayed_weights, trace, scale_by_learning_rate)``.

    Raises:
      TypeError: A hyper-parameter of the wrong kind.
      ValueError: One out of its range (see ``trace``).

    Laws:
      ``torch.optim.SGD`` to rounding, at every step.

    Examples:
      >>> import torch
      >>> from zfunc.optim import apply_updates
      >>> tx, p = sgd(0.1, momentum=0.9), torch.ones(1)
      >>> updates, moments = tx.update(torch.ones(1), tx.init(p), p)
      >>> apply_updates(p, updates)
      tensor([0.9000])

    References:
      Sutskever et al., `On the importance of initialization and momentum
      <https://proceedings.mlr.press/v28/sutskever13.html>`_, 2013.

    Differs from:
      ``torch.optim.SGD`` accepts a dampening without momentum and ignores it; here
      it is an error.
    """
    momentum = check_factor("sgd: momentum", momentum, instead="momentum=0.9")
    damp = check_trace(momentum, nesterov, dampening)
    parts = chain(
        add_decayed_weights(weight_decay),
        trace(momentum, nesterov=nesterov, dampening=damp) if momentum else identity(),
        scale_by_learning_rate(learning_rate),
    )

    def outline(updates: PyTree) -> PyTree:
        return TraceMoments(LEAF, updates) if momentum else ()

    fused = one_pass(
        *("sgd", learning_rate, weight_decay, None, kernels),
        *(outline, sgd_rule(momentum, damp, nesterov=nesterov)),
    )
    return parts._replace(fused=fused)
