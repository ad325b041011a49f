# SPDX-License-Identifier: Apache-2.0
"""``zfunc bench step`` on real ranks: every contender does the same training."""

import csv
import json
import subprocess
import sys

import pytest

from zfunc.bench import choose

pytestmark = pytest.mark.distributed

COMMAND = (sys.executable, "-m", "zfunc.cli", "bench", "step", "--model=tiny")
STEPS = 4


def bench(out, *words):
    """The result of a benchmark that must succeed, and what it printed."""
    options = ("--rounds=1", f"--steps={STEPS}", "--warmup=1", f"--json={out}")
    done = subprocess.run(
        [*COMMAND, *options, *words], capture_output=True, text=True, timeout=280
    )
    assert done.returncode == 0, done.stderr
    return json.loads(out.read_text()), done.stdout


def test_sharded_contenders_have_the_same_losses(tmp_path):
    """Of DeepSpeed too, where it is installed; of what is compiled, one."""
    names = [contender.name for contender in choose(None, 2).contenders]
    names = [n for n in names if not n.endswith("inductor") or n == "zfunc-3-inductor"]
    table, who = tmp_path / "a.csv", f"--contenders={','.join(names)}"
    found, output = bench(tmp_path / "a.json", who, f"--csv={table}")
    assert [contender["name"] for contender in found["contenders"]] == names
    assert found["loss_difference"]["largest"] <= 1e-5
    for contender in found["contenders"]:
        assert len(contender["losses"]) == STEPS
        assert [len(steps_s) for steps_s in contender["rounds_s"]] == [STEPS]
        peak_bytes = contender["live_peak_bytes"]  # of what can be counted
        assert peak_bytes is None or peak_bytes > 4 * found["num_params"] // 2
    assert found["peak_rss_bytes"] > 0
    assert f"{found['contenders'][0]['losses'][0]:.6f}" in output
    with table.open(newline="") as file:
        assert len(list(csv.DictReader(file))) == 2 * STEPS * len(names)


def test_single_process_contenders_have_the_same_losses(tmp_path):
    """Without inductor, which compiles for a minute."""
    found, _ = bench(tmp_path / "a.json", "--nproc=1", "--contenders=zfunc-aten,eager")
    assert found["loss_difference"]["largest"] <= 1e-5
    assert [(row["name"], row["peer"]) for row in found["ratios"]] == [
        ("zfunc-aten", "eager")
    ]
