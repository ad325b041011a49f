# SPDX-License-Identifier: Apache-2.0
"""Write the golden files of the programs anew, after a change that is meant:

python -m tests.unit.program.regenerate && git diff tests/golden
"""

from pathlib import Path

from tests.unit.program.programs import zero3

GOLDEN = Path(__file__).resolve().parents[2] / "golden" / "program_zero3.txt"


def main():
    GOLDEN.parent.mkdir(exist_ok=True)
    GOLDEN.write_text(zero3().as_text(), encoding="utf-8")


if __name__ == "__main__":
    main()
