# SPDX-License-Identifier: Apache-2.0
"""Passes: functions from a program to a program that computes the same bits."""

from __future__ import annotations

from typing import Final

from zfunc.program.passes.batch_updates import batch_updates as batch_updates
from zfunc.program.passes.bucket import bucket as bucket
from zfunc.program.passes.cast_before_gather import (
    cast_before_gather as cast_before_gather,
)
from zfunc.program.passes.collective_form import collective_form as collective_form
from zfunc.program.passes.keep_gathered import keep_gathered as keep_gathered
from zfunc.program.passes.keep_small import keep_small as keep_small
from zfunc.program.passes.prefetch import prefetch as prefetch
from zfunc.program.passes.regather import regather as regather
from zfunc.program.passes.scatter_early import scatter_early as scatter_early
from zfunc.program.passes.simplify import simplify as simplify
from zfunc.program.passes.sink import sink as sink
from zfunc.program.program import Pass

DEFAULT: Final[tuple[Pass, ...]] = (
    simplify,
    cast_before_gather,
    sink,
    regather,
    keep_small(),
    scatter_early,
    bucket(),
    prefetch(),
    collective_form,
    simplify,
    batch_updates(),
)
ALL: Final[tuple[Pass, ...]] = tuple(dict.fromkeys(DEFAULT))
