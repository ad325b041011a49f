# SPDX-License-Identifier: Apache-2.0
"""``zfunc bench kernels``: what it refuses, runs and writes."""

import pytest
import torch
from typer.testing import CliRunner

from zfunc.bench.kernel_case import OURS, Case, Way
from zfunc.cli import bench_kernels as module
from zfunc.cli.app import app
from zfunc.kernels.compile_only import Resources, Row

USED = Resources(32, 0, 0, 0, 2, 0, 4, 90)


@pytest.fixture
def small(monkeypatch):
    """Two cases and two configurations; nothing is compiled."""

    def ways(device):
        x = torch.ones(100, device=device)
        return {OURS: Way(torch.sin, (x,)), "eager": Way(torch.sin, (x,))}

    names = ("swiglu/forward/float32", "adamw/float32")
    cases = [Case(name, 800, ways, bound=0.0) for name in names]
    rows = [Row("swiglu/forward/fp32", USED, ()), Row("adamw/fp32", USED, ())]

    def report(prefixes, architectures):
        report.asked.append((prefixes, architectures))
        return [row for row in rows if row.name.startswith(prefixes or ("",))]

    report.asked, report.rows, report.cases = [], rows, cases
    monkeypatch.setattr(module, "layer_cases", lambda sizes: ())
    monkeypatch.setattr(module, "cpu_cases", lambda: cases)
    monkeypatch.setattr(module.gate, "report", report)
    monkeypatch.setattr(module.gate, "shipped", lambda: rows)
    monkeypatch.setattr(module, "ROOF_NUMEL", 1 << 10)
    return report


def bench(*words):
    words = ["bench", "kernels", "--rounds=1", "--calls=1", *map(str, words)]
    return CliRunner().invoke(app, words)


def test_both_parts_are_said_and_written(small, tmp_path):
    done = bench("--out", tmp_path)
    assert done.exit_code == 0, done.output
    assert {path.name for path in tmp_path.iterdir()} == {
        "kernels.csv",
        "kernels.png",
        "kernels_compile_only.csv",
        "kernels_compile_only.md",
    }
    assert "adamw/float32" in done.output
    page = (tmp_path / "kernels_compile_only.md").read_text("utf-8")
    assert "| `swiglu/forward/fp32` | 32 | 0 | 0 | 0 | 2 | 0 | 4 | 16 | 100% |" in page
    assert small.asked == [((), (80, 90, 100))]
    assert torch.get_num_threads() == 1


def test_a_prefix_chooses_cases_and_configurations(small):
    done = bench("--only=adamw")
    assert done.exit_code == 0
    assert "swiglu" not in done.output
    assert small.asked == [(("adamw",), (80, 90, 100))]


def test_either_part_alone(small):
    done = bench("--compile-only")
    assert "`adamw/fp32`" in done.output
    assert "adamw/float32" not in done.output
    done = bench("--no-compile-only")
    assert "adamw/float32" in done.output
    assert len(small.asked) == 1


def test_all_mistakes_are_told_at_once(small, tmp_path):
    done = bench("--only=nothing", "--out", tmp_path / "no")
    assert done.exit_code == 2
    assert done.stderr == (
        "error: 2 options cannot be used:\n"
        "  --only nothing: nothing that is measured here begins so\n"
        f"  --out {tmp_path}/no: there is no such directory: make it\n"
    )


def test_a_violation_ends_it_with_1(small):
    small.rows[1] = Row("adamw/fp32", USED, ("stack is 8 B, expected 0",))
    done = bench()
    assert done.exit_code == 1
    assert "adamw/fp32 on sm_90: stack is 8 B, expected 0" in done.stdout


def test_results_that_differ_end_it_with_1(small):
    x = torch.ones(3)
    ways = {OURS: Way(torch.sin, (x,)), "eager": Way(torch.cos, (x,))}
    small.cases[0] = Case("swiglu/wrong", 8, lambda device: ways, bound=1e-3)
    done = bench("--no-compile-only")
    assert done.exit_code == 1
    assert done.stderr.splitlines()[-1].startswith("error: swiglu/wrong: results are")
    assert "adamw/float32" in done.stdout  # the others are still measured
    small.cases.pop()
    assert bench("--no-compile-only").exit_code == 1  # with nothing to print or draw


def test_a_run_that_is_ended_has_written_what_it_measured(small, tmp_path):
    def ended(device):
        raise KeyboardInterrupt

    small.cases[1] = small.cases[1]._replace(ways=ended)
    assert bench("--no-compile-only", "--out", tmp_path).exit_code != 0
    written = (tmp_path / "kernels.csv").read_text("utf-8")
    assert written.count("swiglu/forward/float32,") == 2


def test_the_names_are_those_of_what_ships():
    assert "swiglu/forward/bf16" in module.compiled_names("swiglu")
    assert module.compiled_names("no such") == ()
