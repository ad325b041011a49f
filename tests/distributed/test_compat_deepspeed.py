# SPDX-License-Identifier: Apache-2.0
"""DeepSpeed itself beside the bridge: a part of what `zfunc bench deepspeed` does."""

import subprocess
import sys

import pytest

from zfunc.compat import bridge, comparison
from zfunc.compat.comparison import CASES, Case, Compared, Run, chosen

COMMAND = (sys.executable, "-m", "zfunc.cli", "bench", "deepspeed")


def bench(*words):
    return subprocess.run(
        [*COMMAND, *words], capture_output=True, text=True, timeout=280, check=False
    )


@pytest.mark.distributed
def test_losses_and_rates_are_those_of_deepspeed():
    """Every stage in both precisions, clipped, with 4 microbatches and OneCycle."""
    done = bench("--steps=6", "--only=clip0.5,accumulate4,OneCycle")
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.count(" equal ") == 8
    assert "fp32: 4 cases of 6 steps" in done.stdout


@pytest.mark.distributed
def test_words_that_no_case_has():
    done = bench("--only=zero4")
    assert done.returncode == 2
    assert "no case has all of ['zero4']; words are OneCycle" in done.stderr


def test_the_cases_are_those_of_the_issue():
    assert len(CASES) == 64 == len({case.name for case in CASES})
    assert len(chosen("bf16")) == 32


def wrong(change):
    """The bridge with a configuration that says something else."""

    def initialize(config, **arguments):
        changed = {**config, **change}
        return bridge.initialize(config=changed, **arguments)

    return initialize


def losses(change, steps):
    case = Case(2, "fp32", 0.5, 1, "OneCycle")
    return comparison.train(wrong(change), case, steps)


MUTANTS = {
    "no clipping": {"gradient_clipping": 0.0},
    "no decay": {
        "optimizer": {"type": "AdamW", "params": {"lr": 5e-3, "weight_decay": 0.0}}
    },
    "no schedule": {"scheduler": {"type": "WarmupLR", "params": {}}},
}


@pytest.mark.distributed
@pytest.mark.parametrize("name", MUTANTS)
def test_what_differs_is_more_than_the_bound(ranks, name):
    right = ranks(2).run(losses, {}, 10)[0]
    changed = ranks(2).run(losses, MUTANTS[name], 10)[0]
    same_rates = right.rates == changed.rates
    apart = comparison._apart(right, changed)
    assert not Compared(CASES[0], apart, 1e-4, 0.5, same_rates).is_equal
    assert same_rates == (name != "no schedule")
    assert apart > 1e-4


def test_equal_means_all_of_it():
    right = Compared(CASES[0], 1e-5, 1e-4, 0.5, True)
    assert right.is_equal
    assert not right._replace(difference=2e-4).is_equal
    assert not right._replace(same_rates=False).is_equal
    assert not right._replace(fall=0.0).is_equal
    assert not right._replace(difference=float("nan")).is_equal
    one, nan = Run((1.0, 2.0), ()), Run((1.0, float("nan")), ())
    assert comparison._apart(one, Run((1.5, 2.0), ())) == 0.5
    assert not right._replace(difference=comparison._apart(one, nan)).is_equal
