# SPDX-License-Identifier: Apache-2.0
"""What can be wrong with a benchmark."""

from __future__ import annotations

from zfunc.core.errors import ZfuncError


class BenchError(ZfuncError):
    """What was asked for cannot be measured; the message says what to type instead."""


class LossesDifferError(ZfuncError):
    """Contenders did not compute the same training, so their times say nothing."""
