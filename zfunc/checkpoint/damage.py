# SPDX-License-Identifier: Apache-2.0
"""Errors that say what kind of thing is wrong with a checkpoint."""

from __future__ import annotations

from zfunc.core.errors import CheckpointError


class DamagedError(CheckpointError):
    """Files that are not those that were saved: another step may be whole.

    Example:
      >>> issubclass(DamagedError, CheckpointError)
      True
    """


class OtherSchemaError(CheckpointError):
    """A manifest of a version that this zfunc does not read: not damage.

    Example:
      >>> issubclass(OtherSchemaError, CheckpointError)
      True
    """
