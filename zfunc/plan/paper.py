# SPDX-License-Identifier: Apache-2.0
r"""The table of model states of the ZeRO paper, beside that of traced programs.

Mixed-precision Adam takes 16 bytes per parameter: 2 for weights and 2 for gradients in
16 bits, 12 for a float32 copy and two moments. On N ranks the paper's stages need
:math:`16 \Psi`, :math:`4 \Psi + 12 \Psi / N`, :math:`2 \Psi + 14 \Psi / N` and
:math:`16 \Psi / N` bytes.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from fractions import Fraction
from typing import Final

from zfunc.plan.planner import Stage, plan
from zfunc.plan.request import Precision, Request
from zfunc.plan.tracing import Zero

# The paper's stage 1 reduces gradients after the backward. Stage 3 is there twice: its
# fourth byte per parameter is a 16-bit piece of the weights in the paper, which zfunc
# does not keep, and half of a float32 gradient here.
_ROWS: Final[tuple[tuple[str, Zero, Precision, bool], ...]] = (
    ("baseline", 0, "bf16", False),
    ("Pos", 1, "bf16", True),
    ("Pos+g", 2, "bf16", False),
    ("Pos+g+p", 3, "bf16", False),
    ("Pos+g+p", 3, "fp32", False),
)


@dataclass(frozen=True)
class PaperRow:
    """A stage as in the ZeRO paper and as traced.

    Args:
      name: The paper's name of the stage.
      reduce: What gradient reductions send here.
      late: Whether they come after the backward.
      paper_bytes: The paper's model states, for this number of parameters.
      stage: The traced program.
    """

    name: str
    reduce: Precision
    late: bool
    paper_bytes: Fraction
    stage: Stage


def paper_bytes(zero: Zero, num_params: int, ranks: int) -> Fraction:
    """Model states of a stage by the formulas of the ZeRO paper, in bytes.

    Example:
      >>> [round(float(paper_bytes(z, 7_500_000_000, 64)) / 1e9, 2) for z in range(4)]
      [120.0, 31.41, 16.64, 1.88]

    References:
      Rajbhandari et al., `ZeRO <https://arxiv.org/abs/1910.02054>`_, 2020, figure 1.
    """
    whole, divided = ((16, 0), (4, 12), (2, 14), (0, 16))[zero]
    return num_params * (whole + Fraction(divided, ranks))


def paper_rows(request: Request) -> Iterator[PaperRow]:
    """The rows of the table, for one microbatch in bf16, one after the other."""
    one = replace(request, precision="bf16", microbatches=1)
    for name, zero, reduce, late in _ROWS:
        stage = plan(replace(one, reduce=reduce), zero, late=late)
        formula = paper_bytes(zero, stage.num_params, request.ranks)
        yield PaperRow(name, reduce, late, formula, stage)
