# SPDX-License-Identifier: Apache-2.0
"""What the planner raises."""

from zfunc.core.errors import ZfuncError


class PlanError(ZfuncError, ValueError):
    """A plan that cannot be made as asked; the message says what to type instead.

    Example:
      >>> raise PlanError("--model huge: there is none of that name")
      Traceback (most recent call last):
      zfunc.plan.errors.PlanError: --model huge: there is none of that name
    """
