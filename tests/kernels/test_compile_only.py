# SPDX-License-Identifier: Apache-2.0
"""The gate over everything that ships, and the gate over what must not."""

import ast
import importlib
import json
from collections import Counter
from pathlib import Path

import pytest

from tests.kernels.spilling import CONFIGURATIONS
from zfunc.kernels import compile_only, swiglu
from zfunc.kernels.compile_only import ARCHITECTURES, Resources, violations

KERNELS = Path(compile_only.__file__).parent
GOOD = Resources(
    registers=32,
    stack_bytes=0,
    local_bytes=0,
    shared_bytes=0,
    wide=2,
    narrow=0,
    num_warps=4,
    architecture=90,
)


def first_of_each_kernel():
    """Enough for an architecture that is not measured: a name for each kernel."""
    names = {}
    for one in compile_only.shipped():
        names.setdefault(one.kernel.fn.__name__ + one.name.split("/")[0], one.name)
    return tuple(names.values())


def passes(rows):
    wrong = [f"{r.name} on sm_{r.resources.architecture}: {r.violations}" for r in rows]
    failed = [said for said, row in zip(wrong, rows, strict=True) if row.violations]
    assert rows
    assert not failed, "\n" + "\n".join(failed)


def test_everything_that_ships_passes_for_sm_90():
    rows = compile_only.report(architectures=(90,))
    assert [row.name for row in rows] == [c.name for c in compile_only.shipped()]
    passes(rows)


def test_a_configuration_of_each_kernel_passes_for_other_architectures():
    passes(compile_only.report(first_of_each_kernel(), (80, 100)))


def test_the_gate_can_fail():
    rows = compile_only.report(jobs=1, module="tests.kernels.spilling")
    found = {row.name: row for row in rows}
    assert found["good/copy"].violations == ()
    strided, spills = found["bad/strided"], found["bad/spills"]
    assert strided.resources.narrow == 8
    assert strided.violations == (
        "8 global accesses are narrower than 16 bytes, expected 0 at most",
    )
    assert spills.resources.stack_bytes > 0
    assert spills.violations[0].startswith("stack is ")


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({}, []),
        ({"stack_bytes": 8}, ["stack is 8 B, expected 0"]),
        ({"local_bytes": 4}, ["local is 4 B, expected 0"]),
        ({"wide": 0}, ["no global access has 16 bytes, expected streams"]),
        (
            {"shared_bytes": 227 * 1024 + 1},
            [
                "shared memory is 232449 B, expected 232448 at most",
                "a multiprocessor cannot hold a program",
            ],
        ),
        (
            {"shared_bytes": 200 * 1024, "architecture": 80},
            [
                "shared memory is 204800 B, expected 166912 at most",
                "a multiprocessor cannot hold a program",
            ],
        ),
    ],
)
def test_each_violation_has_its_sentence(change, said):
    assert violations(CONFIGURATIONS[0], GOOD._replace(**change)) == said


@pytest.mark.parametrize(
    ("registers", "warps", "shared", "programs"),
    [
        # 65536 registers: 32 per thread fill every warp; one more costs a quarter.
        (32, 4, 0, 16),
        (33, 4, 0, 12),
        (255, 4, 0, 2),
        (255, 8, 0, 1),
        (64, 32, 0, 1),
        (65, 32, 0, 0),
        (16, 1, 0, 32),
        (40, 2, 0, 24),  # 51 warps, in fours
        # 1 KiB of each program is the system's: 228 / (37 + 1).
        (32, 4, 37 * 1024, 6),
        (32, 4, 227 * 1024, 1),
    ],
)
def test_occupancy_is_that_of_the_calculator(registers, warps, shared, programs):
    found = GOOD._replace(registers=registers, num_warps=warps, shared_bytes=shared)
    assert found.programs == programs
    assert found.occupancy == programs * warps / 64


def test_shared_memory_differs_between_architectures():
    found = [
        GOOD._replace(shared_bytes=40 * 1024, architecture=a).programs
        for a in ARCHITECTURES
    ]
    assert found == [4, 5, 5]


def test_the_interpreter_is_refused():
    configuration = swiglu.CONFIGURATIONS[0]
    with pytest.raises(RuntimeError, match="start Python with TRITON_INTERPRET=0"):
        compile_only.compiled(configuration, 90)
    with pytest.raises(ValueError, match="is 70, expected one of 80, 90, 100"):
        compile_only.compiled(configuration, 70)


def test_missing_tools_are_named(monkeypatch, tmp_path):
    monkeypatch.setattr(compile_only.triton, "__file__", str(tmp_path / "triton.py"))
    with pytest.raises(RuntimeError, match=r"no cuobjdump in .*Linux wheel"):
        compile_only._tool()


def test_what_ptxas_says_is_read():
    (row,) = compile_only.report(["good"], jobs=1, module="tests.kernels.spilling")
    assert 8 <= row.resources.registers <= 64
    expected = GOOD._replace(registers=row.resources.registers, wide=4)
    assert row.resources == expected  # 1024 elements of 4 bytes by 128 threads


def test_a_line_for_each_configuration_and_architecture(monkeypatch, capsys):
    def compiled(one, architecture):
        wide = 1 if one.name == "good/copy" else 0
        return GOOD._replace(architecture=architecture, wide=wide)

    monkeypatch.setattr(compile_only, "compiled", compiled)
    pair = CONFIGURATIONS[:2]
    assert compile_only.main(["good", "--architectures=80,90"], pair) == 0
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [line["resources"]["architecture"] for line in lines] == [80, 90]
    assert {line["occupancy"] for line in lines} == {1.0}
    assert compile_only.main(["--share=1/2"], pair) == 3
    (line,) = capsys.readouterr().out.splitlines()
    assert json.loads(line)["name"] == "bad/strided"


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["swiglu", "nothing"], None),
        (["nothing", "no_such"], "nothing that ships begins with nothing or no_such"),
        (["swiglu", "--architectures=75"], "is 75, expected some of 80,90,100"),
        (["swiglu", "--architectures=sm_90"], "is sm_90, expected some of 80,90,100"),
    ],
)
def test_what_cannot_be_asked_for_is_no_pass(words, said, capsys, monkeypatch):
    monkeypatch.setattr(compile_only, "compiled", lambda one, architecture: GOOD)
    if said is None:
        assert compile_only.main(words, swiglu.CONFIGURATIONS) == 0
        return
    with pytest.raises(SystemExit) as ended:
        compile_only.main(words, swiglu.CONFIGURATIONS)
    assert ended.value.code == 2
    assert said in capsys.readouterr().err


def test_a_compilation_that_fails_is_an_error():
    with pytest.raises(RuntimeError, match=r"No module named .*nothing"):
        compile_only.report(jobs=1, module="tests.kernels.nothing")


# --- what ships is complete ------------------------------------------------------


def test_names_are_unique():
    counted = Counter(one.name for one in compile_only.shipped())
    assert [name for name, count in counted.items() if count > 1] == []


def is_jit(node):
    return isinstance(node, ast.FunctionDef) and any(
        "jit" in ast.unparse(decorator) for decorator in node.decorator_list
    )


def names_in(path):
    """Every jit function of a file, and the names in it that it does not bind."""
    for node in filter(is_jit, ast.parse(path.read_text("utf-8")).body):
        names = [name for name in ast.walk(node) if isinstance(name, ast.Name)]
        bound = {name.id for name in names if isinstance(name.ctx, ast.Store)}
        yield node.name, {name.id for name in names} - bound


def kernels_and_helpers():
    """(module, name) of every jit function, and of those that jit functions use."""
    kernels, used = set(), set()
    for path in sorted(KERNELS.glob("*.py")):
        module = importlib.import_module(f"zfunc.kernels.{path.stem}")
        for kernel, names in names_in(path):
            kernels.add((module.__name__, kernel))
            for helper in (getattr(module, name, None) for name in names):
                if hasattr(helper, "fn"):
                    used.add((helper.fn.__module__, helper.fn.__name__))
    return kernels, used


def test_every_kernel_that_is_launched_ships_a_configuration():
    kernels, used = kernels_and_helpers()
    compiled = [
        part.fn
        for one in compile_only.shipped()
        for part in (one.kernel, *one.constants.values())
        if hasattr(part, "fn")  # functions are constants of kernels that call them
    ]
    shipped = {(fn.__module__, fn.__name__) for fn in compiled}
    launched = kernels - used
    assert ("zfunc.kernels.swiglu", "_forward_kernel") in launched
    assert ("zfunc.kernels.norm_backward", "slopes") in launched  # a variable elsewhere
    assert not launched - shipped, f"not compiled: {sorted(launched - shipped)}"
