# SPDX-License-Identifier: Apache-2.0
"""Examples and documentation run, print what they say, and name things that exist.

Every script in ``examples`` runs in a process of its own with warnings as errors. Every
```` ```python ```` block of a Markdown file runs too, those of one file in order in one
namespace; a ```` ```text ```` block after one is what it has to print.
"""

import importlib
import json
import os
import re
import subprocess
import sys
from functools import cache
from itertools import pairwise
from pathlib import Path

import pytest
from hypothesis import settings

import zfunc as zf
from zfunc.program import passes

ROOT = Path(__file__).resolve().parent.parent
TIMEOUT_S = 240
PAGES = [
    ROOT / "README.md",
    ROOT / "CHANGELOG.md",
    ROOT / "CONTRIBUTING.md",
    *sorted((ROOT / "docs").rglob("*.md")),
]
EXAMPLES = sorted(path.name for path in (ROOT / "examples").glob("*.py"))


def page_name(path):
    return path.relative_to(ROOT).as_posix()


def run(*arguments, stdin=None, **environment):
    """The output of a Python process that must succeed without a warning."""
    done = subprocess.run(
        [sys.executable, *map(str, arguments)],
        cwd=ROOT,
        input=stdin,
        env={**os.environ, "OMP_NUM_THREADS": "1", **environment},
        capture_output=True,
        text=True,
        timeout=TIMEOUT_S,
        check=False,
    )
    assert done.returncode == 0, f"{arguments}:\n{done.stdout}\n{done.stderr}"
    return done.stdout


@cache
def example(name, ranks=0):
    """What an example prints; with ranks, under torchrun on CPU."""
    path = Path("examples") / name
    if not ranks:
        return run("-W", "error", path)
    launcher = ("-m", "torch.distributed.run", "--standalone")
    where = {"CUDA_VISIBLE_DEVICES": "", "PYTHONWARNINGS": "error"}
    return run(*launcher, "--nproc-per-node", ranks, path, **where)


def numbers(pattern, text):
    """Every match of a pattern, each a tuple of floats."""
    found = [tuple(map(float, m.groups())) for m in re.finditer(pattern, text)]
    assert found, f"no {pattern!r} in:\n{text}"
    return found


# --- what the examples print ---------------------------------------------------


QUICK = r"step +(\d+)  loss ([\d.]+)"
HELD = r"rank 0 of (\d+) holds (\d+) of (\d+) parameters"


def test_quickstart_learns():
    text = example("quickstart.py")
    losses = [loss for _, loss in numbers(QUICK, text)]
    assert len(losses) == 4
    assert losses[-1] < 0.1 * losses[0]
    assert numbers(HELD, text) == [(1, 4224, 4224)]


@pytest.mark.distributed
def test_quickstart_prints_the_same_losses_on_two_ranks():
    one, two = example("quickstart.py"), example("quickstart.py", ranks=2)
    for (step, loss), (also, got) in zip(
        numbers(QUICK, one), numbers(QUICK, two), strict=True
    ):
        assert (step, loss) == (also, pytest.approx(got, rel=1e-3))
    assert numbers(HELD, two) == [(2, 2112, 4224)]


STAGES = r"zero (\d), .* loss ([\d.]+), .* state ([\d.]+) MB, .* step ([\d.]+) MB"
APART = r"largest difference between the stages' losses: (.*)"


def test_four_stages_have_equal_losses():
    text = example("four_stages.py")
    rows = numbers(STAGES, text)
    assert [row[0] for row in rows] == [0, 1, 2, 3]
    assert len({row[1:3] for row in rows}) == 1
    assert numbers(APART, text) == [(0.0,)]


@pytest.mark.distributed
def test_four_stages_differ_in_bytes_on_two_ranks():
    text = example("four_stages.py", ranks=2)
    zero, losses, state, peak = zip(*numbers(STAGES, text), strict=True)
    assert zero == (0, 1, 2, 3)
    assert len(set(losses)) == 1
    assert numbers(APART, text) == [(0.0,)]
    assert state[1] == state[2] == state[3] == pytest.approx(state[0] / 2, rel=0.01)
    assert peak[3] < 0.7 * peak[1] < peak[0]


@pytest.mark.distributed
def test_same_bits_on_1_2_and_4_ranks():
    text = example("same_bits.py")
    rows = re.findall(r"(\w+) +(\d) rank\(s\) (\w{64}) ", text)
    assert [(name, ranks) for name, ranks, _ in rows] == [
        (name, ranks) for ranks in "124" for name in ("deterministic", "plain")
    ]
    assert len({digest for name, _, digest in rows if name == "deterministic"}) == 1
    assert len({digest for name, _, digest in rows if name == "plain"}) > 1


def test_your_own_module_equals_a_torch_loop():
    text = example("your_own_module.py")
    assert "5 parameters, 1 buffer, 20 steps" in text
    [(first, last)] = numbers(r"first loss ([\d.]+), last loss ([\d.]+)", text)
    assert last < 0.6 * first
    [(apart,)] = numbers(r"difference from the torch loop: (.*)", text)
    assert apart < 1e-5
    assert "tied in the new module: True" in text


def test_prove_your_model_can_fail():
    text = example("prove_your_model.py")
    assert "sharded is unsharded on 60 examples" in text
    assert "stages [0, 1, 2, 3], data axes of [1, 2, 3, 4] ranks" in text
    assert re.search(r"the wrong model is refused:\nstep 1 of 2: .* grads/\w+ by", text)
    assert "Recipe(zero=2" in text


def test_checkpoint_and_resume_is_bitwise():
    text = example("checkpoint_and_resume.py")
    assert "saved step-00000005: manifest.json, rank-00000.safetensors" in text
    assert "restored step 5 of run 'example', Cursor(epoch=0, position=40" in text
    assert "not interrupted, to the last bit: True" in text


TUNED = (
    r"rank 0 read (\d+) of (\d+) parameters\nfirst loss ([\d.]+), last loss ([\d.]+)"
)


@pytest.mark.distributed
def test_fine_tuning_reads_trains_generates_and_saves():
    one, two = example("fine_tune_hf.py"), example("fine_tune_hf.py", ranks=2)
    for ranks, text in ((1, one), (2, two)):
        [(read, total, first, last)] = numbers(TUNED, text)
        assert read == pytest.approx(total / ranks, rel=0.01)
        assert last < 0.05 < 4 < first
        assert "transformers continues alike: True" in text
        prompt, more = (
            [int(n) for n in re.search(rf"{word} +\[(.*)\]", text)[1].split(", ")]
            for word in ("prompt", "continued")
        )
        assert more == [(prompt[-1] + i) % 96 for i in range(1, 9)]


PASSES = r"^(\S+|\(as traced\)) +(\d+) +(\d+) +([\d.]+) +([\d.]+) +([\d.]+)$"


def test_read_the_program_shows_what_passes_do():
    rows = re.findall(PASSES, example("read_the_program.py"), re.M)
    names, *columns = zip(*rows, strict=True)
    nodes, messages, sent, peak, gathered = ([*map(float, c)] for c in columns)
    assert list(names[1:]) == [p.__name__ for p in passes.DEFAULT]
    again, bucketed = names.index("regather"), names.index("bucketed")
    assert nodes[-1] < nodes[0]
    assert sent[again] == pytest.approx(1.5 * sent[again - 1], rel=0.02)
    assert gathered[again] < 0.5 * gathered[again - 1]
    assert peak[again] < peak[again - 1]
    assert messages[bucketed] < messages[bucketed - 1]
    assert peak[-1] < 0.9 * peak[0]


def test_every_example_is_tested_and_named_in_the_documentation():
    source = Path(__file__).read_text("utf-8")
    pages = "".join(page.read_text("utf-8") for page in PAGES)
    for name in EXAMPLES:
        assert f'example("{name}")' in source, name
        assert f"examples/{name}" in pages, name


# --- the Python in the documentation ---------------------------------------------


BLOCK = re.compile(
    r"^```python\n(?P<code>.*?)^```\n(?:\n```text\n(?P<text>.*?)^```\n)?",
    re.DOTALL | re.MULTILINE,
)
# Errors and their lines are those of the page.
RUNNER = """
import contextlib, io, json, sys
namespace = {"__name__": "page"}
for line, code, expected in json.load(sys.stdin):
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        exec(compile("\\n" * line + code, sys.argv[1], "exec"), namespace)
    if expected is not None and printed.getvalue() != expected:
        sys.exit(f"{sys.argv[1]}:{line} printed:\\n{printed.getvalue()}")
"""


def blocks(page):
    """(line, code, expected output or None) of the Python blocks of a page."""
    text = page.read_text("utf-8")
    return [
        (text.count("\n", 0, match.start("code")), match["code"], match["text"])
        for match in BLOCK.finditer(text)
    ]


@pytest.mark.parametrize("page", [p for p in PAGES if blocks(p)], ids=page_name)
def test_python_of_a_page_prints_what_the_page_says(page):
    code = json.dumps(blocks(page))
    run("-W", "error", "-c", RUNNER, page_name(page), stdin=code)


def test_no_block_is_missed():
    for page in PAGES:
        opened = page.read_text("utf-8").count("```python")
        assert len(blocks(page)) == opened, page_name(page)
    with_python = {page_name(page) for page in PAGES if blocks(page)}
    assert {"README.md", "docs/the_step.md", "docs/zero.md"} <= with_python


# --- what the documentation names --------------------------------------------------


def slug(heading):
    """The anchor that GitHub gives to a heading."""
    kept = re.sub(r"[^\w\- ]", "", heading.strip().lower())
    return kept.replace(" ", "-")


def anchors(page):
    prose = re.sub(r"^```.*?^```", "", page.read_text("utf-8"), flags=re.S | re.M)
    return {slug(line.lstrip("#")) for line in prose.splitlines() if line[:1] == "#"}


@pytest.mark.parametrize("page", PAGES, ids=page_name)
def test_links_lead_somewhere(page):
    for target in re.findall(r"\]\(([^)\s]+)\)", page.read_text("utf-8")):
        if target.startswith("https://"):
            continue
        path, _, anchor = target.partition("#")
        there = (page.parent / path).resolve() if path else page
        assert there.exists(), target
        assert there.is_relative_to(ROOT), target
        if anchor:
            assert anchor in anchors(there), target


FOLDERS = "zfunc|tests|docs|examples|kernels"


@pytest.mark.parametrize("page", PAGES, ids=page_name)
def test_files_and_tests_that_are_named_exist(page):
    text = page.read_text("utf-8")
    for path in re.findall(rf"\b(?:{FOLDERS})/[\w./-]*\w", text):
        assert (ROOT / path).exists(), path
    tests = "".join(p.read_text("utf-8") for p in (ROOT / "tests").rglob("*.py"))
    for name in re.findall(r"\b(test_\w+)\b(?!\.py|/)", text):
        assert f"def {name}(" in tests or (ROOT / "tests" / name).exists(), name


@pytest.mark.parametrize("page", PAGES, ids=page_name)
def test_commands_that_are_named_exist(page):
    text = page.read_text("utf-8")
    makefile = (ROOT / "Makefile").read_text("utf-8")
    found = re.finditer(r"^```\n(.*?)^```|`([^`\n]+)`", text, re.S | re.M)
    code = "\n".join(m[1] or m[2] for m in found)
    for target in re.findall(r"^\s*make (\w+)", code, re.M):
        assert f"\n{target}:" in makefile, target
    for module in re.findall(r"python -m (tests\.[\w.]+)", code):
        assert (ROOT / f"{module.replace('.', '/')}.py").exists(), module


@pytest.mark.parametrize("page", PAGES, ids=page_name)
def test_public_names_that_are_named_exist(page):
    for name in re.findall(r"\bzf\.([A-Za-z_][\w.]*\w)", page.read_text("utf-8")):
        value = zf
        for part in name.split("."):
            assert hasattr(value, part), f"zf.{name}"
            value = getattr(value, part)


# --- figures in the documentation ----------------------------------------------------


def law_modules():
    """The files of ``tests/laws`` that state laws."""
    names = {path.stem for path in (ROOT / "tests" / "laws").glob("test_*.py")}
    about_tests = {"test_tools", "test_mutants"}
    return [importlib.import_module(f"tests.laws.{n}") for n in names - about_tests]


def num_examples():
    """Hypothesis examples of all the laws under the profile of ``make test``."""
    used = sum(
        test._hypothesis_internal_use_settings.max_examples
        for module in law_modules()
        for test in vars(module).values()
        if hasattr(test, "is_hypothesis_test")
    )
    return 100 * used / settings.default.max_examples


def readme_number(pattern):
    [text] = re.findall(pattern, (ROOT / "README.md").read_text("utf-8"))
    return int(text.replace(",", ""))


def test_the_readme_counts_right():
    mutants = importlib.import_module("tests.laws.mutants").MUTANTS
    assert readme_number(r"tries over ([\d,]+)\s+examples") <= num_examples()
    assert readme_number(r"So over (\d+) wrong versions") < len(mutants)
    assert len((ROOT / "README.md").read_text("utf-8").splitlines()) <= 200


def test_the_laws_page_names_every_mutant():
    text = (ROOT / "docs" / "laws.md").read_text("utf-8")
    listed = re.findall(r"^Mutants: (.*?)\.$", text, re.S | re.M)
    names = re.findall(r"`([^`]+)`", "".join(listed))
    mutants = importlib.import_module("tests.laws.mutants").MUTANTS
    assert sorted(" ".join(n.split()) for n in names) == sorted(m.name for m in mutants)


def test_the_list_of_decisions_is_complete():
    folder = ROOT / "docs" / "adr"
    text = (folder / "README.md").read_text("utf-8")
    files = sorted(path.name for path in folder.glob("0*.md"))
    assert re.findall(r"\((0[\w-]+\.md)\)", text) == files
    for name in files:
        headings = re.findall(r"^## (.*)$", (folder / name).read_text("utf-8"), re.M)
        assert headings == ["Context", "Decision", "Consequences"], name
    numbered = [int(name[:4]) for name in files]
    assert all(b == a + 1 for a, b in pairwise(numbered))
