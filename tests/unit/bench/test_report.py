# SPDX-License-Identifier: Apache-2.0
"""The table, the JSON, the CSV and the plot of one result."""

import csv
import io
import json

import pytest
from rich.console import Console

from zfunc.bench import (
    LossDifference,
    Measured,
    Ratio,
    Result,
    plot_result,
    print_result,
    write_csv,
    write_json,
)

NAMES = ("zfunc-3", "fsdp2", "deepspeed-3", "zfunc-0", "zfunc-1", "zfunc-2", "ddp")


def result(*names, apart=2e-7, left_out=(), peak=3_500_000):
    measured = tuple(
        Measured(name, (6.25, 6.125), ((0.010, 0.030), (0.040, 0.040)), peak)
        for name in names or NAMES[:2]
    )
    about = {
        "model": {"name": "m", "layers": 2, "hidden": 32, "batch": 8, "seq_len": 64},
        "num_params": 1234567,
        "ranks": 2,
        "threads": 1,
        "rounds": 2,
        "steps": 2,
        "device": "cpu",
    }
    return Result(
        about,
        measured,
        (Ratio("zfunc-3", "fsdp2", 0.512, 0.5, 0.53),),
        LossDifference(apart, 2, "fsdp2", "zfunc-3"),
        512_000_000,
        left_out,
    )


def printed(found, width=100):
    out = io.StringIO()
    print_result(Console(file=out, width=width), found)
    return out.getvalue()


def test_the_table_says_what_was_measured():
    text = printed(result())
    assert "m: 1,234,567 parameters in 2 layers of 32, batch 8 x 64 per rank" in text
    assert "2 ranks x 1 thread on cpu, 2 interleaved rounds of 2 steps" in text
    (row,) = (line for line in text.splitlines() if line.startswith(" fsdp2"))
    assert row.split() == ["fsdp2", "30.0", "20.0", "to", "40.0", "3.5"]
    assert "zfunc-3 / fsdp2" in text
    assert "0.51  0.50 to 0.53" in text
    assert "6.250000" in text
    assert "peak RSS: 512 MB" in text
    assert "n/a" not in text
    assert "left out" not in text


def test_differing_losses_are_shouted():
    assert "2.0e-07, at step 2 between fsdp2 and zfunc-3" in printed(result())
    assert "NOT" not in printed(result())
    assert "NOT the same training" in printed(result(apart=2e-5))


def test_what_could_not_be_counted_and_who_was_left_out():
    text = printed(result(peak=None, left_out=("deepspeed-1",)), width=200)
    assert "n/a: inductor's code makes its buffers" in text
    assert 'not installed: deepspeed-1: pip install "zfunc-torch[bench]"' in text


@pytest.mark.parametrize("width", [30, 60, 80, 100])
def test_no_loss_is_cut_off_by_a_narrow_terminal(width):
    text = printed(result(*NAMES), width)
    assert text.count("6.250000") == text.count("6.125000") == len(NAMES)


def test_json_holds_all_that_was_measured(tmp_path):
    path = tmp_path / "a.json"
    write_json(path, result(left_out=("deepspeed-1",)))
    found = json.loads(path.read_text())
    assert found["ranks"] == 2
    assert found["model"]["name"] == "m"
    first = found["contenders"][0]
    assert first["name"] == "zfunc-3"
    assert first["median_s"] == pytest.approx(0.030)
    assert first["rounds_s"] == [[0.010, 0.030], [0.040, 0.040]]
    assert first["losses"] == [6.25, 6.125]
    assert first["live_peak_bytes"] == 3_500_000
    assert found["ratios"][0]["ratio"] == 0.512
    assert found["loss_difference"]["largest"] == 2e-7
    assert found["loss_difference"]["tolerance"] == 1e-5
    assert found["left_out"] == ["deepspeed-1"]


def test_csv_has_a_row_for_each_number(tmp_path):
    path = tmp_path / "a.csv"
    write_csv(path, result())
    with path.open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 2 * (2 + 4)
    assert {row["what"] for row in rows} == {"loss", "step_s"}
    times = [row for row in rows if row["what"] == "step_s"]
    assert [float(row["value"]) for row in times[:4]] == [0.010, 0.030, 0.040, 0.040]
    assert [(row["round"], row["step"]) for row in times[:3]] == [
        ("1", "1"),
        ("1", "2"),
        ("2", "1"),
    ]


def test_the_plot_is_a_png(tmp_path):
    path = tmp_path / "a.png"
    plot_result(path, result())
    assert path.read_bytes().startswith(b"\x89PNG")
