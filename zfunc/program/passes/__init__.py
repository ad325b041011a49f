# SPDX-License-Identifier: Apache-2.0
"""Passes: functions from a program to a program that computes the same."""

from __future__ import annotations

from typing import Final

from zfunc.program.program import Pass

DEFAULT: Final[tuple[Pass, ...]] = ()
