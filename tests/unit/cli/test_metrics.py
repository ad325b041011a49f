# SPDX-License-Identifier: Apache-2.0
"""metrics.csv: every step once, to the bit, whatever happened in between."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from zfunc.cli.metrics import MetricsFile, Row, format_rows, read_rows

HEADER = "step,loss,grad_norm,lr,tokens,tokens_per_s,elapsed_s,peak_rss_mb,skipped"


def row(step, loss=1.5):
    return Row(step, loss, 0.25, 1e-3, 64 * step, 100.0, float(step), 300.0, 0)


def written(path, rows, start=0):
    metrics = MetricsFile(path, start)
    for each in rows:
        metrics.append(each)
    metrics.sync()
    metrics.close()
    return metrics


def test_rows_are_readable_while_the_file_is_open(tmp_path):
    path = tmp_path / "m.csv"
    metrics = MetricsFile(path, 0)
    metrics.append(row(1))
    assert path.read_text() == f"{HEADER}\n1,1.5,0.25,0.001,64,100.0,1.0,300.0,0\n"
    metrics.close()


@given(st.floats(allow_nan=False))
def test_numbers_read_back_as_the_same_bits(tmp_path_factory, loss):
    path = tmp_path_factory.getbasetemp() / "bits.csv"
    path.write_text(format_rows([row(1, loss)], header=True))
    assert read_rows(path) == [row(1, loss)]


def test_rows_after_the_step_that_goes_on_are_dropped(tmp_path):
    path = tmp_path / "m.csv"
    written(path, [row(i) for i in range(1, 8)])
    again = written(path, [row(i, loss=2.5) for i in range(5, 9)], start=4)
    assert again.elapsed_s == 4.0
    assert [r.step for r in read_rows(path)] == list(range(1, 9))
    assert [r.loss for r in read_rows(path)] == [1.5] * 4 + [2.5] * 4


@pytest.mark.parametrize("tail", ["8,1.", "8,1.5,0.25,0.001,512,100.0,8.0", "\0\0"])
def test_a_line_that_was_cut_off_is_dropped(tmp_path, tail):
    path = tmp_path / "m.csv"
    written(path, [row(i) for i in range(1, 8)])
    with path.open("a") as file:
        file.write(tail)
    written(path, [row(8)], start=7)
    assert read_rows(path) == [row(i) for i in range(1, 9)]


def test_a_fresh_start_begins_the_file(tmp_path):
    path = tmp_path / "m.csv"
    written(path, [row(1), row(2)])
    assert written(path, []).elapsed_s == 0.0
    assert path.read_text() == f"{HEADER}\n"


def test_no_file_is_no_rows(tmp_path):
    assert read_rows(tmp_path / "none.csv") == []


def test_rows_without_the_last_column_are_kept(tmp_path):
    """Of runs that were begun before there was one."""
    path = tmp_path / "m.csv"
    header = HEADER.removesuffix(",skipped")
    path.write_text(f"{header}\n1,1.5,0.25,0.001,64,100.0,1.0,300.0\n")
    assert read_rows(path) == [row(1)]
