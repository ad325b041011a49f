# SPDX-License-Identifier: Apache-2.0
"""What is measured on a CPU: the paths there that are not eager torch."""

from __future__ import annotations

from collections.abc import Iterator

from zfunc.bench.kernel_case import Case


def cpu_cases() -> Iterator[Case]:
    """Every case of a CPU."""
    yield from ()
