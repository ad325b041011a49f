# SPDX-License-Identifier: Apache-2.0
"""The driver of ``zfunc bench kernels``: every case at tiny sizes, and its verdicts."""

import csv
import io

import pytest
import torch
from rich.console import Console

from zfunc.bench import kernel_case, kernel_clock, kernels_report
from zfunc.bench.kernel_case import OURS, Bar, Case, Way
from zfunc.bench.kernel_clock import CpuClock, roof
from zfunc.bench.kernels import (
    Found,
    Measured,
    Plan,
    ResultsDifferError,
    measure,
    run_kernels,
)
from zfunc.bench.kernels_cpu import cpu_cases
from zfunc.bench.kernels_layers import FULL, HOST, SWIGLU, TINY, layer_cases
from zfunc.bench.kernels_optimizers import optimizer_cases

CPU = torch.device("cpu")
QUICK = Plan(rounds=2, calls=1, roof_numel=1 << 10)


def case(ways, **options):
    return Case("made/up", 1000, lambda device: ways, **options)


def named(name, *seconds, **known):
    numbers = {"host_s": None, "launches": None, "workspace_bytes": None} | known
    return Measured(name, seconds, **numbers)


def every_case():
    yield from layer_cases(TINY)
    yield from optimizer_cases(TINY.num_params)
    yield from cpu_cases(TINY._replace(tokens=17))


@pytest.mark.parametrize("one", list(every_case()), ids=lambda one: one.name)
def test_a_case_runs_and_its_results_agree(one):
    """Triton's interpreter beside eager torch, by the code that a GPU will run."""
    found = measure(one, CpuClock(), Plan(1, 1), roof=1e9)
    ours, *others = found.measured
    assert ours.name == OURS
    assert others
    assert all(way.median_s > 0 for way in found.measured)
    assert ours.workspace_bytes is not None
    bars = {bar.peer for bar in one.bars if bar.peer}
    known = {way.name for way in found.measured} | dict(found.skipped).keys()
    assert bars <= known


def test_a_full_case_is_far_larger_than_the_caches():
    for one in (*layer_cases(FULL), *optimizer_cases(FULL.num_params), *cpu_cases()):
        assert one.bytes > 256e6 or HOST in one.name, one.name


def test_bytes_are_those_that_have_to_move():
    """In bfloat16, as the issue and the page on kernels count them."""
    bytes_ = {}
    for one in layer_cases(FULL):
        function, kind, *_ = one.name.split("/")
        bytes_.setdefault(f"{function}/{kind}", set()).add(one.bytes / FULL.numel)
    expected = {
        "rms_norm": (4, 6),
        "rms_norm-residual": (8, 8),
        "layer_norm": (4, 6),
        "layer_norm-residual": (8, 8),
        "softmax": (4, 6),
        "softmax-causal": (3, 4),
        "swiglu": (6, 10),
        "geglu": (6, 10),
        "bias_gelu": (4, 6),
        "bias_dropout_residual": (6, 4),
        "rope": (4, 4),
    }
    for name, (forward, backward) in expected.items():
        assert bytes_[f"{name}/forward"] == {forward}, name
        assert bytes_[f"{name}/backward"] == {backward}, name
    params = FULL.num_params
    (adamw, *_), (lamb, *_) = (
        [one.bytes / params for one in optimizer_cases(params) if name in one.name]
        for name in ("adamw", "lamb")
    )
    assert (adamw, lamb) == (28, 40)


def test_the_clock_of_a_gpu_calls_what_there_is(monkeypatch):
    """With a stand-in for the device: names, and what is a difference of what."""

    class Event:
        def __init__(self, enable_timing):
            assert enable_timing

        def record(self):
            self.at_ms = next(ticks)

        def synchronize(self):
            pass

        def elapsed_time(self, other):
            return other.at_ms - self.at_ms

    ticks = iter((2.0, 5.0))
    stand_ins = {
        "Event": Event,
        "_sleep": lambda cycles: None,
        "synchronize": lambda device: None,
        "memory_allocated": lambda device: 1000,
        "reset_peak_memory_stats": lambda device: None,
        "max_memory_allocated": lambda device: 1900,
    }
    for name, stand_in in stand_ins.items():
        monkeypatch.setattr(torch.cuda, name, stand_in)
    monkeypatch.setattr(kernel_clock, "_FLUSHED_BYTES", 8)
    clock = kernel_clock.CudaClock(CPU)
    way = Way(torch.sin, (torch.ones(100),))
    assert clock.device_s(way) == 3e-3
    assert clock.host_s(way) > 0
    assert clock.workspace_bytes(way) == 500
    if not torch.cuda.is_available():
        assert clock.launches(way) is None


def test_names_are_unique():
    for names in (
        [one.name for one in layer_cases(FULL)],
        [one.name for one in optimizer_cases(FULL.num_params)],
        [one.name for one in every_case()],
    ):
        assert len(set(names)) == len(names)


def test_rounds_begin_with_another_way_each_time():
    called = []
    ways = {n: Way(lambda n=n: called.append(n), ()) for n in (OURS, "b", "c")}
    measure(case(ways), CpuClock(), Plan(3, 1), 1.0)
    timed = called[2 + 3 * 3 :][:9]  # peers are tried once before
    assert timed == [OURS, "b", "c", "b", "c", OURS, "c", OURS, "b"]


def test_results_that_differ_end_it():
    x = torch.ones(3)
    ways = {
        OURS: Way(lambda x: x + 1e-3, (x,)),
        "eager": Way(lambda x: x, (x,)),
    }
    with pytest.raises(ResultsDifferError, match=r"1\.0e-03 of the largest apart"):
        measure(case(ways, bound=1e-4), CpuClock(), QUICK, 1.0)
    measure(case(ways, bound=1e-2), CpuClock(), QUICK, 1.0)
    ways[OURS] = Way(lambda x: x * float("nan"), (x,))
    with pytest.raises(ResultsDifferError, match="made/up: results are nan"):
        measure(case(ways, bound=1e-2), CpuClock(), QUICK, 1.0)


def test_the_workspace_is_what_neither_goes_in_nor_comes_out():
    x = torch.ones(1000)
    clock = CpuClock()
    for fn, expected in (
        (lambda x: x + 1, 0),
        (lambda x: x.add_(1), 0),
        (lambda x: (x + 1) * 2, 4000),
        (lambda x: (x[:10] + 1).sum(), 40),
    ):
        found = clock.workspace_bytes(Way(fn, (x,)))
        assert expected <= found <= expected + 16  # and the numbers in it


def test_the_roof_counts_reads_and_writes():
    class Clock(CpuClock):
        def device_s(self, way):
            way()
            return 0.5

    assert roof(Clock(), 100, rounds=2) == 2 * 3 * 4 * 100


@pytest.mark.parametrize(
    ("bar", "got", "passes"),
    [
        (Bar("roof", 0.5), 0.5, True),
        (Bar("roof", 0.51), 0.5, False),
        (Bar("faster", 1.6, "liger"), 2.0, True),
        (Bar("faster", 2.1, "liger"), 2.0, False),
        (Bar("faster", 1.0, "apex"), None, None),
        (Bar("ms", 2000.0), 2000.0, True),
        (Bar("ms", 1999.0), 2000.0, False),
        (Bar("host us", 60), 50.0, True),
        (Bar("host us", 40), 50.0, False),
        (Bar("workspace MB", 600), 700.0, False),
        (Bar("leaner", 4, "liger"), 4.0, True),
        (Bar("leaner", 5, "liger"), 4.0, False),
        (Bar("leaner", 5, "apex"), None, None),
    ],
)
def test_each_bar_has_its_figure(bar, got, passes):
    ours = named(OURS, 2.0, host_s=50e-6, launches=3, workspace_bytes=700_000_000)
    one = case({}, bars=(bar,))
    liger = named("liger", 4.0, workspace_bytes=2_800_000_000)
    (verdict,) = Found(one, (ours, liger), (), 1000.0).verdicts
    assert (verdict.got, verdict.passes) == (pytest.approx(got), passes)


def test_what_is_not_measured_passes_nothing():
    one = case({}, bars=(Bar("host us", 60), Bar("workspace MB", 1)))
    found = Found(one, (named(OURS, 1.0),), (), 1.0)
    assert [verdict.passes for verdict in found.verdicts] == [None, None]


def found_of_two():
    bars = (Bar("roof", 0.5), Bar("faster", 3.0, "eager"))
    ours = named(OURS, 1e-3, 2e-3, 3e-3, host_s=1e-5, launches=1, workspace_bytes=0)
    return Found(case({}, bars=bars), (ours, named("eager", 4e-3, 4e-3, 4e-3)), (), 1e6)


def test_what_is_printed():
    written = io.StringIO()
    console = Console(file=written, width=120, highlight=False)
    kernels_report.print_found(console, [found_of_two()])
    text = written.getvalue()
    assert "2.00 (1.33 to 4.00)" in text
    assert "made/up: roof >= 0.5: 0.5 pass" in text
    assert "made/up: faster than eager >= 3: 2 FAIL" in text
    kernels_report.print_found(console, [])
    assert written.getvalue() == text


def test_what_is_written(tmp_path):
    kernels_report.write_found(tmp_path / "a.csv", [found_of_two()])
    with (tmp_path / "a.csv").open(encoding="utf-8") as file:
        ours, eager = csv.DictReader(file)
    assert tuple(ours) == kernels_report.COLUMNS
    assert (ours["way"], ours["median_ms"], ours["launches"]) == ("zfunc", "2.0", "1")
    assert ours["bars"].count(";") == 1
    assert (eager["ratio"], eager["ratio_high"], eager["bars"]) == ("2.0", "4.0", "")
    kernels_report.plot_found(tmp_path / "a.png", [found_of_two()])
    assert (tmp_path / "a.png").read_bytes()[:4] == b"\x89PNG"


def test_ways_that_are_not_there_are_said():
    lines = []
    x = torch.ones(4)
    ways = {OURS: Way(torch.sin, (x,)), "eager": "it is not installed"}
    (found,), _ = run_kernels([case(ways)], CpuClock(), QUICK, lines.append)
    assert lines == ["made/up", "  without eager: it is not installed"]
    assert [way.name for way in found.measured] == [OURS]
    assert found.roof > 0


def no_gpu(*args):
    raise TypeError("no kernel image\nand a page more")


def test_a_peer_that_raises_is_left_out():
    ways = {OURS: Way(torch.sin, (torch.ones(4),)), "liger": Way(no_gpu, ())}
    found = measure(case(ways, bound=0.0), CpuClock(), QUICK, 1.0)
    assert [way.name for way in found.measured] == [OURS]
    assert found.skipped == (("liger", "it raised TypeError: no kernel image"),)


@pytest.mark.parametrize("kind", [kernel_case.backward, kernel_case.both])
def test_a_peer_that_raises_while_it_is_made_is_left_out(monkeypatch, kind):
    monkeypatch.setattr(kernel_case, "_compiled", lambda fn: no_gpu)
    ways = kind(SWIGLU, lambda device: (torch.ones(2, 16), torch.ones(2, 16)))(CPU)
    assert ways["compile"] == "it raised TypeError: no kernel image"
    assert isinstance(ways["eager"], Way)


def test_a_peer_that_writes_over_its_arguments_has_its_own(monkeypatch):
    monkeypatch.setattr(kernel_case, "_liger", lambda get: lambda x, y: x.zero_() + y)
    x, y = torch.ones(2, 16), torch.ones(2, 16)
    ways = kernel_case.forward(SWIGLU, lambda device: (x, y))(CPU)
    assert (ways["liger"]() == 1).all()
    assert (x == 1).all()


def test_a_case_that_fails_does_not_take_the_others_with_it():
    x = torch.ones(4)
    good = case({OURS: Way(torch.sin, (x,))})
    other = case({OURS: Way(torch.sin, (x,)), "eager": Way(torch.cos, (x,))}, bound=0)
    cases = [case({OURS: Way(no_gpu, ())}), good, other, good]
    kept = []
    found, failures = run_kernels(cases, CpuClock(), QUICK, str, kept.append)
    assert [each.case for each in found] == [good, good]
    assert [len(each) for each in kept] == [1, 2]
    assert failures[0] == "made/up: TypeError: no kernel image"
    assert "of the largest apart" in failures[1]
    assert len(failures) == 2


def test_liger_is_taken_where_it_is_installed(monkeypatch):
    monkeypatch.setattr(kernel_case.importlib.util, "find_spec", lambda name: None)
    said = kernel_case._liger(lambda liger: liger.swiglu)
    assert said == "Liger is not installed: pip install liger-kernel"
    monkeypatch.setattr(kernel_case.importlib.util, "find_spec", lambda name: name)
    monkeypatch.setattr(kernel_case.importlib, "import_module", lambda name: torch)
    assert kernel_case._liger(lambda module: module.sin) is torch.sin
    said = kernel_case._liger(lambda module: module.no_such_thing)
    assert said.startswith("this Liger does not have it:")
