# SPDX-License-Identifier: Apache-2.0
"""The style rules no linter has, as functions from source text to findings.

A finding is `"<line>: <what is wrong>"`. Each rule is tested twice: on snippets that
it must and must not report, and on the tree.
"""

import ast
import re
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
SPDX = "# SPDX-License-Identifier: Apache-2.0"
MODULE_LINES = 400
BODY_LINES = 50
CORE_LINES = 1500
CONSTRUCTORS = ("__init__", "__new__", "__post_init__")
# What torchrun sets, the one variable torch reads for its threads, and the one
# DeepSpeed reads for its device.
ENVIRONMENT = (
    "DS_ACCELERATOR",
    "LOCAL_RANK",
    "LOCAL_WORLD_SIZE",
    "MASTER_ADDR",
    "MASTER_PORT",
    "OMP_NUM_THREADS",
    "RANK",
    "WORLD_SIZE",
)
ENVIRONMENT_PREFIX = "TORCHELASTIC_"
# The bridge, for scripts that change their engine by calling it, and for a class of
# transformers that changes itself: these attributes, and no other file.
MUTABLE_ATTRIBUTES = {
    "zfunc/compat/engine.py": {"_now"},
    "zfunc/compat/trainer.py": {
        "engine",
        "lr_scheduler",
        "model",
        "model_wrapped",
        "optimizer",
    },
}
MUTABLE_LITERALS = (
    ast.Dict,
    ast.DictComp,
    ast.List,
    ast.ListComp,
    ast.Set,
    ast.SetComp,
)
MUTABLE_CALLS = (
    "Counter",
    "OrderedDict",
    "WeakKeyDictionary",
    "WeakSet",
    "WeakValueDictionary",
    "bytearray",
    "defaultdict",
    "deque",
    "dict",
    "list",
    "set",
)
FREEZING_CALLS = ("MappingProxyType", "frozenset", "tuple")

FunctionNode = ast.FunctionDef | ast.AsyncFunctionDef
Rule = Callable[[str], list[str]]


# --- reading the tree of a module ----------------------------------------------


def name_of(node: ast.AST) -> str:
    """The last name of `a.b.c` or `c`, also under a call; "" for anything else."""
    match node:
        case ast.Name(id=name) | ast.Attribute(attr=name):
            return name
        case ast.Call(func=func) | ast.Subscript(value=func):
            return name_of(func)
    return ""


def module_level(tree: ast.Module) -> Iterator[ast.stmt]:
    """Statements that run on import, those under `if`, `try` and `with` included."""
    waiting: list[ast.AST] = list(tree.body)
    while waiting:
        node = waiting.pop(0)
        if isinstance(node, ast.stmt):
            yield node
        if isinstance(node, ast.If | ast.Try | ast.With | ast.ExceptHandler):
            waiting.extend(ast.iter_child_nodes(node))


def with_function(node: ast.AST, function: str = "") -> Iterator[tuple[ast.AST, str]]:
    """Every node below `node`, with the name of the function it is directly in."""
    for child in ast.iter_child_nodes(node):
        inside = child.name if isinstance(child, FunctionNode) else function
        yield child, inside
        yield from with_function(child, inside)


# --- the rules -----------------------------------------------------------------


def licence(source: str) -> list[str]:
    lines = source.splitlines()
    if lines and lines[0].startswith("#!"):
        lines = lines[1:]
    return [] if lines and lines[0] == SPDX else [f"1: does not start with `{SPDX}`"]


def module_length(source: str) -> list[str]:
    lines = len(source.splitlines())
    if lines <= MODULE_LINES:
        return []
    return [f"1: {lines} lines, the limit is {MODULE_LINES}"]


def function_length(source: str) -> list[str]:
    findings = []
    for node in ast.walk(ast.parse(source)):
        if not isinstance(node, FunctionNode):
            continue
        body = node.body[ast.get_docstring(node) is not None :]
        if not body:
            continue
        decorators = getattr(body[0], "decorator_list", [])
        first = min(part.lineno for part in (body[0], *decorators))
        lines = node.end_lineno - first + 1
        if lines > BODY_LINES:
            findings.append(
                f"{node.lineno}: the body of {node.name} has {lines} lines, "
                f"the limit is {BODY_LINES}"
            )
    return findings


def self_assignment(source: str) -> list[str]:
    """Also through `setattr` and `object.__setattr__`, which frozen classes use."""
    findings = []
    for node, function in with_function(ast.parse(source)):
        if function in CONSTRUCTORS:
            continue
        match node:
            case ast.Attribute(
                value=ast.Name(id="self"), attr=attr, ctx=ast.Store() | ast.Del()
            ):
                findings.append(f"{node.lineno}: self.{attr} changed in {function}")
            case ast.Call(args=[ast.Name(id="self"), *_]) if name_of(node) in (
                "setattr",
                "delattr",
                "__setattr__",
                "__delattr__",
            ):
                findings.append(
                    f"{node.lineno}: {name_of(node)}(self, ...) in {function}"
                )
    return findings


def global_statement(source: str) -> list[str]:
    return [
        f"{node.lineno}: global {', '.join(node.names)}"
        for node in ast.walk(ast.parse(source))
        if isinstance(node, ast.Global)
    ]


def bare_assert(source: str) -> list[str]:
    return [
        f"{node.lineno}: assert vanishes under -O, raise an error instead"
        for node in ast.walk(ast.parse(source))
        if isinstance(node, ast.Assert)
    ]


def environment(source: str) -> list[str]:
    """Uses of the environment other than by an allowed name.

    `{**os.environ, ...}` passes: that is how a child process gets its environment.
    """
    tree = ast.parse(source)
    parent = {c: p for p in ast.walk(tree) for c in ast.iter_child_nodes(p)}
    findings = []
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.module == "os":
            hidden = {alias.name for alias in node.names}
            hidden &= {"environ", "environb", "getenv", "getenvb", "putenv"}
            findings += [f"{node.lineno}: write os.{name}" for name in sorted(hidden)]
        if not isinstance(node, ast.Attribute):
            continue
        if node.attr in ("getenv", "getenvb", "putenv", "unsetenv"):
            use, read = parent[node], _first_argument(parent[node])
        elif node.attr in ("environ", "environb"):
            use, read = _environ_use(node, parent)
        else:
            continue
        if isinstance(use, ast.Dict):
            continue
        allowed = isinstance(read, str) and (
            read in ENVIRONMENT or read.startswith(ENVIRONMENT_PREFIX)
        )
        if not allowed:
            findings.append(f"{node.lineno}: environment: {ast.unparse(use)}")
    return findings


def _environ_use(
    node: ast.Attribute, parent: dict[ast.AST, ast.AST]
) -> tuple[ast.AST, object]:
    """The expression that uses `os.environ`, and the variable's name if constant."""
    use = parent[node]
    match use:
        case ast.Subscript(slice=ast.Constant(value=name)):
            return use, name
        case ast.Compare(left=ast.Constant(value=name), ops=[ast.In() | ast.NotIn()]):
            return use, name
        case ast.Attribute(attr="get" | "pop" | "setdefault"):
            return parent[use], _first_argument(parent[use])
    return use, None


def _first_argument(node: ast.AST) -> object:
    match node:
        case ast.Call(args=[ast.Constant(value=value), *_]):
            return value
    return None


def docstrings(source: str) -> list[str]:
    """Module-level functions and classes without a leading underscore need one."""
    return [
        f"{node.lineno}: {node.name} has no docstring"
        for node in module_level(ast.parse(source))
        if isinstance(node, FunctionNode | ast.ClassDef)
        and not node.name.startswith("_")
        and not any(name_of(d) == "overload" for d in node.decorator_list)
        and not ast.get_docstring(node)
    ]


def module_state(source: str) -> list[str]:
    """Module-level containers that a caller could change.

    A constant table is `NAME: Final = MappingProxyType({...})`, a tuple or a
    frozenset. `__all__` is the interpreter's own protocol and may be a list.
    """
    findings = []
    for node in module_level(ast.parse(source)):
        match node:
            case ast.Assign(targets=[ast.Name(id="__all__")]):
                continue
            case ast.Assign(targets=targets, value=value):
                name, final = ast.unparse(targets[0]), False
            case ast.AnnAssign(target=target, annotation=annotation, value=value):
                name, final = ast.unparse(target), name_of(annotation) == "Final"
            case _:
                continue
        if _is_mutable(value):
            findings.append(f"{node.lineno}: {name} is mutable module state")
        elif _freezes(value) and not final:
            findings.append(f"{node.lineno}: annotate {name} as Final")
    return findings


def _is_mutable(value: ast.AST | None) -> bool:
    if isinstance(value, ast.Tuple):
        return any(map(_is_mutable, value.elts))
    if isinstance(value, ast.Call):
        return name_of(value) in MUTABLE_CALLS
    return isinstance(value, MUTABLE_LITERALS)


def _freezes(value: ast.AST | None) -> bool:
    match value:
        case ast.Call(args=[inner, *_]):
            return name_of(value) in FREEZING_CALLS and _is_mutable(inner)
    return False


def kernel_imports(source: str) -> list[str]:
    """Imports of zfunc; neighbours are imported relatively, kernels/ is flat.

    import-linter checks this too, but does not see a relative import leave the folder.
    """
    findings = []
    for node in ast.walk(ast.parse(source)):
        match node:
            case ast.Import(names=names):
                found = any(alias.name.split(".")[0] == "zfunc" for alias in names)
            case ast.ImportFrom(level=0, module=str(module)):
                found = module.split(".")[0] == "zfunc"
            case ast.ImportFrom(level=level):
                found = level > 1
            case _:
                continue
        if found:
            findings.append(f"{node.lineno}: {ast.unparse(node)}")
    return findings


def root_imports(source: str) -> list[str]:
    """Imports from zfunc/__init__.py: inside the library, import from the source."""
    findings = []
    for node in ast.walk(ast.parse(source)):
        match node:
            case ast.Import(names=names) if any(a.name == "zfunc" for a in names):
                findings.append(f"{node.lineno}: import zfunc")
            case ast.ImportFrom(module="zfunc", level=0):
                findings.append(f"{node.lineno}: {ast.unparse(node)}")
    return findings


# --- the rules fire on bad source, and only there --------------------------------

BAD: list[tuple[Rule, str, int]] = [
    (licence, "import os\n", 1),
    (licence, "", 1),
    (licence, f"\n{SPDX}\n", 1),
    (module_length, "x = 1\n" * 401, 1),
    (function_length, "def f():\n" + "    x = 1\n" * 51, 1),
    (function_length, 'class A:\n  def f(s):\n    """Doc."""\n' + "    x\n" * 51, 2),
    (function_length, "async def f():\n" + "    x = 1\n" * 51, 1),
    (function_length, "def f():\n @a\n def g(): pass\n" + " x\n" * 49, 1),
    (self_assignment, "class A:\n  def f(self):\n    self.x = 1\n", 3),
    (self_assignment, "class A:\n  def f(self):\n    self.x += 1\n", 3),
    (self_assignment, "class A:\n  def f(self):\n    self.x: int = 1\n", 3),
    (self_assignment, "class A:\n  def f(self):\n    y, self.x = 1, 2\n", 3),
    (self_assignment, "class A:\n  def f(self):\n    del self.x\n", 3),
    (self_assignment, "class A:\n  def f(self):\n    setattr(self, 'x', 1)\n", 3),
    (
        self_assignment,
        "class A:\n  def f(self):\n    object.__setattr__(self, 'x', 1)\n",
        3,
    ),
    (
        self_assignment,
        "class A:\n  def __init__(self):\n    def g():\n      self.x = 1\n",
        4,
    ),
    (global_statement, "def f():\n    global x\n    x = 1\n", 2),
    (bare_assert, "def f(x):\n    assert x\n", 2),
    (environment, "import os\nos.environ['ZFUNC_DEBUG']\n", 2),
    (environment, "import os\nos.environ.get('HOME')\n", 2),
    (environment, "import os\nos.environ.get(name)\n", 2),
    (environment, "import os\nos.environ[name]\n", 2),
    (environment, "import os\nos.getenv('HOME', '')\n", 2),
    (environment, "import os\n'HOME' in os.environ\n", 2),
    (environment, "import os\nf(os.environ)\n", 2),
    (environment, "import os\ndict(os.environ)\n", 2),
    (environment, "import os as o\no.environ['HOME'] = '1'\n", 2),
    (environment, "from os import environ\n", 1),
    (environment, "from os import getenv as g\n", 1),
    (docstrings, "def f():\n    return 1\n", 1),
    (docstrings, "class A:\n    x = 1\n", 1),
    (docstrings, "if x:\n    def f():\n        return 1\n", 2),
    (module_state, "CACHE = {}\n", 1),
    (module_state, "CACHE: dict[str, int] = {}\n", 1),
    (module_state, "CACHE: Final = []\n", 1),
    (module_state, "CACHE = dict(a=1)\n", 1),
    (module_state, "CACHE = {x for x in y}\n", 1),
    (module_state, "CACHE = collections.defaultdict(list)\n", 1),
    (module_state, "CACHE = dict[str, int]()\n", 1),
    (module_state, "CACHE = ({}, 1)\n", 1),
    (module_state, "try:\n    x = 1\nexcept E:\n    CACHE = []\n", 4),
    (module_state, "TABLE = MappingProxyType({1: 2})\n", 1),
    (kernel_imports, "import zfunc\n", 1),
    (kernel_imports, "import zfunc.core.mesh as m\n", 1),
    (kernel_imports, "from zfunc import core\n", 1),
    (kernel_imports, "from zfunc.core import mesh\n", 1),
    (kernel_imports, "def f():\n    from ..core import mesh\n", 2),
    (kernel_imports, "from zfunc.kernels import f\n", 1),
    (root_imports, "import os, zfunc as zf\n", 1),
    (root_imports, "from zfunc import P\n", 1),
]

GOOD: list[tuple[Rule, str]] = [
    (licence, f"{SPDX}\n"),
    (licence, f"#!/usr/bin/env python3\n{SPDX}\n"),
    (module_length, "x = 1\n" * 400),
    (function_length, "def f():\n" + "    x = 1\n" * 50),
    (function_length, 'def f():\n    """A\n' + "    b\n" * 60 + '    """\n    x\n'),
    (function_length, 'def f():\n    """Doc."""\n'),
    (self_assignment, "class A:\n  def __init__(self):\n    self.x = 1\n"),
    (
        self_assignment,
        "class A:\n  def __post_init__(self):\n    object.__setattr__(self, 'x', 1)\n",
    ),
    (self_assignment, "class A:\n  def f(self):\n    y = self.x\n    ctx.y = y\n"),
    (global_statement, "x = 1\n"),
    (bare_assert, "if not x:\n    raise ValueError('assert x')\n"),
    (environment, "import os\nos.environ['RANK']\n"),
    (environment, "import os\nos.environ.get('LOCAL_RANK', '0')\n"),
    (environment, "import os\nos.getenv('WORLD_SIZE')\n"),
    (environment, "import os\n'TORCHELASTIC_RUN_ID' in os.environ\n"),
    (environment, "import os\nrun(cmd, env={**os.environ, 'OMP_NUM_THREADS': '1'})\n"),
    (environment, "from os import path\n"),
    (docstrings, 'def f():\n    """Doc."""\n'),
    (docstrings, "def _f():\n    return 1\n"),
    (docstrings, "class _A:\n    x = 1\n"),
    (docstrings, "@typing.overload\ndef f(x: int) -> int: ...\n"),
    (module_state, "TABLE: Final = MappingProxyType({1: 2})\n"),
    (module_state, "NAMES: Final[frozenset[str]] = frozenset({'a'})\n"),
    (module_state, "NAMES = ('a', 'b')\n"),
    (module_state, "__all__ = ['a']\n"),
    (module_state, "def f():\n    x = {}\n    return x\n"),
    (module_state, "x: dict[str, int]\n"),
    (kernel_imports, "import torch\nimport triton.language as tl\n"),
    (kernel_imports, "from . import neighbour\nfrom .neighbour import f\n"),
    (kernel_imports, "import zfuncs\n"),
    (root_imports, "from zfunc.core.sharding import P\nimport zfunc.core.mesh\n"),
    (root_imports, "from .sharding import P\n"),
]


@pytest.mark.parametrize(("rule", "source", "line"), BAD)
def test_rule_fires(rule: Rule, source: str, line: int):
    findings = rule(source)
    assert [int(finding.split(":")[0]) for finding in findings] == [line]


@pytest.mark.parametrize(("rule", "source"), GOOD)
def test_rule_is_silent(rule: Rule, source: str):
    assert rule(source) == []


# --- the tree obeys the rules ----------------------------------------------------


def sources(*folders: str) -> list[Path]:
    return sorted(path for f in folders for path in (ROOT / f).rglob("*.py"))


def check(rule: Rule, paths: list[Path]) -> None:
    assert paths, "found no source file to check"
    findings = [
        f"{path.relative_to(ROOT)}:{finding}"
        for path in paths
        for finding in rule(path.read_text(encoding="utf-8"))
    ]
    assert not findings, "\n" + "\n".join(findings)


@pytest.mark.parametrize(
    "rule",
    [
        module_length,
        function_length,
        self_assignment,
        global_statement,
        bare_assert,
        environment,
        docstrings,
        module_state,
    ],
)
def test_library(rule: Rule):
    paths = sources("zfunc", "kernels")
    if rule is self_assignment:
        bridge = [ROOT / name for name in MUTABLE_ATTRIBUTES]
        paths = [path for path in paths if path not in bridge]
    check(rule, paths)


@pytest.mark.parametrize("name", MUTABLE_ATTRIBUTES)
def test_the_bridge_changes_what_it_says(name: str):
    findings = self_assignment((ROOT / name).read_text("utf-8"))
    changed = {re.search(r": self\.(\w+) changed", each)[1] for each in findings}
    assert changed == MUTABLE_ATTRIBUTES[name]


def test_kernels_import_nothing_of_zfunc():
    check(kernel_imports, sources("kernels"))


def test_library_imports_from_where_things_are_defined():
    # The command line, the benchmarks and the test tools use the public names.
    users = ("bench", "cli", "testing")
    below = [p for p in sources("zfunc") if p.relative_to(ROOT).parts[1] not in users]
    check(root_imports, below)


def test_every_file_names_its_licence():
    folders = ("zfunc", "kernels", "tests", "examples", "docs", "bench")
    check(licence, [*sources(*folders), *ROOT.glob("*.py")])


def test_every_folder_is_a_package():
    # Without its __init__.py a folder works in the checkout and is lost in the wheel.
    folders = {path.parent for path in sources("zfunc", "kernels")}
    missing = [f for f in sorted(folders) if not (f / "__init__.py").is_file()]
    assert not missing


def code_lines(text):
    """Lines that are neither blank, nor a comment, nor part of a docstring.

    The house asks for long docstrings with examples; the budget is for code.
    """
    documented = set()
    for node in ast.walk(ast.parse(text)):
        kinds = ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef
        if isinstance(node, kinds) and ast.get_docstring(node):
            documented.update(range(node.body[0].lineno, node.body[0].end_lineno + 1))
    return sum(
        bool(line.strip()) and not line.strip().startswith("#")
        for number, line in enumerate(text.splitlines(), 1)
        if number not in documented
    )


def test_code_lines():
    text = '"""Doc.\n\nMore."""\n# why\n\nx = 1\ndef f():\n    "doc"\n    return x\n'
    assert code_lines(text) == 3


def test_core_stays_small():
    lines = {
        path.relative_to(ROOT).as_posix(): code_lines(path.read_text("utf-8"))
        for path in sources("zfunc/core")
    }
    total = sum(lines.values())
    assert total <= CORE_LINES, f"zfunc/core has {total} lines of code: {lines}"
