# SPDX-License-Identifier: Apache-2.0
"""The error of a model that cannot be made into a function of its parameters."""

from zfunc.core.errors import ZfuncError


class ModelError(ZfuncError, ValueError):
    """A model, a checkpoint directory or a batch that ``zf.models`` cannot use.

    Example:
      >>> raise ModelError("batch has no 'labels'")
      Traceback (most recent call last):
      zfunc.models.hf.errors.ModelError: batch has no 'labels'
    """
