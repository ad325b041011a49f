# SPDX-License-Identifier: Apache-2.0
"""What can be wrong with a script that uses the bridge."""

from __future__ import annotations

from zfunc.core.errors import ZfuncError


class CompatError(ZfuncError):
    """A call of the bridge that it cannot do right; the message says what to do.

    Example:
      >>> raise CompatError("engine.step() without a backward")
      Traceback (most recent call last):
      zfunc.compat.errors.CompatError: engine.step() without a backward
    """


class DifferentError(ZfuncError):
    """DeepSpeed and the bridge did not compute the same training.

    Example:
      >>> raise DifferentError("1 of 64 cases differ")
      Traceback (most recent call last):
      zfunc.compat.errors.DifferentError: 1 of 64 cases differ
    """
