# SPDX-License-Identifier: Apache-2.0
"""Tracing: a step and the shapes of its arguments to one flat graph.

``torch.compile`` over a function that contains ``torch.func.vjp`` drops custom
backwards without a word (torch 2.13); ``make_fx`` runs the step, backward and all, on
fake tensors and records what reaches the dispatcher, so what it records is what runs.
"""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Final, NamedTuple

import torch
from torch._subclasses import FakeTensorMode
from torch._subclasses.fake_tensor import DataDependentOutputException
from torch.fx import Graph
from torch.fx.experimental.proxy_tensor import make_fx
from torch.fx.traceback import preserve_node_meta

from zfunc.core.errors import TraceError
from zfunc.core.sharding import Sharded, is_sharded
from zfunc.core.tree import (
    PyTree,
    leaves_with_path,
    tree_flatten,
    tree_map,
    tree_unflatten,
)
from zfunc.program.ir import calls_of, remove_dead, with_bodies
from zfunc.program.list_calls import with_list_calls
from zfunc.program.mask_checks import told_of_tracing
from zfunc.transforms.loop import lift_constants


class Traced(NamedTuple):
    """A graph, the tensors its last inputs stand for, and the structure it returns."""

    graph: torch.fx.Graph
    constants: list[torch.Tensor]
    out_spec: Any
    out_paths: list[str]


def trace(fn: Callable[..., PyTree], args: PyTree, kind: str) -> Traced:
    """The graph of ``fn(*args)``; ``args`` are fake, or are described by fakes here.

    ``kind`` is that of the meshes in what the program returns.

    Python runs once, as in JAX: branches on shapes are taken, branches on the values
    of tensors are a ``TraceError`` that names the line.

    Raises:
      TraceError: such a branch; also a call from inside of vmap, grad and their kin.
    """
    if torch._C._functorch.maybe_current_level() is not None:
        raise TraceError(
            "a step is traced for one rank, outside of vmap, grad and their kin: call "
            "what zf.jit returns where no transformation of torch.func is at work. "
            "(zfunc.testing.simulate runs a step as it is; zfunc.testing.lockstep runs "
            "the programs of all ranks.)"
        )
    leaves, spec = tree_flatten(args)
    mode = fake_mode_of(leaves)
    where = [i for i, x in enumerate(leaves) if isinstance(x, torch.Tensor)]
    with mode:  # two leaves that are one tensor are two inputs, so no from_tensor
        fakes = [_empty_like(leaves[i]) for i in where]
    results: list[Any] = []

    def flat(*tensors: torch.Tensor) -> list[torch.Tensor]:
        values = list(leaves)
        for i, x in zip(where, tensors, strict=True):
            values[i] = x
        out = with_kind(fn(*tree_unflatten(spec, values)), kind)
        outputs, out_spec = tree_flatten(out)
        results.append((out_spec, [path for path, _ in leaves_with_path(out)]))
        return outputs

    try:
        with mode, torch.no_grad(), preserve_node_meta(), told_of_tracing(), _quiet():
            module = make_fx(flat, _allow_non_fake_inputs=True)(*fakes)
    except (DataDependentOutputException, RuntimeError) as error:
        if _looked_at_values(error):
            raise _explained(error) from error
        raise
    _refuse_writes(module.graph)
    with_list_calls(module.graph)
    constants = lift_constants(module)
    remove_dead(module.graph)
    return Traced(module.graph, constants, *results[-1])


def _empty_like(x: torch.Tensor) -> torch.Tensor:
    return torch.empty_strided(x.shape, x.stride(), dtype=x.dtype, device=x.device)


def fake_mode_of(leaves: list[Any]) -> FakeTensorMode:
    """The mode of the first fake tensor, or a new one.

    A state and a batch that were made abstract one by one have two.
    """
    found = [x.fake_mode for x in leaves if isinstance(x, torch._subclasses.FakeTensor)]
    return found[0] if found else FakeTensorMode(allow_non_fake_inputs=True)


def with_kind(tree: PyTree, kind: str) -> PyTree:
    """The tree with its meshes of other ranks as of another kind.

    While it is traced a mesh is "traced"; its groups' names stay, so the program talks
    to the ranks of the job that it was traced in.
    """

    def one(node: Any) -> Any:
        if not is_sharded(node) or node.sharding.mesh.kind in ("local", "simulated"):
            return node
        mesh = dataclasses.replace(node.sharding.mesh, kind=kind)
        sharding = dataclasses.replace(node.sharding, mesh=mesh)
        return Sharded(node.buffer, sharding, node.global_shape)

    return tree_map(one, tree, is_leaf=is_sharded)


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """No log of torch's about an error that is raised to the user anyway."""
    logger = logging.getLogger("torch._subclasses.fake_tensor")

    def keep(record: logging.LogRecord) -> bool:
        return not str(record.msg).startswith("failed while attempting to run meta")

    logger.addFilter(keep)
    try:
        yield
    finally:
        logger.removeFilter(keep)


_VALUE_ERRORS = (
    "data-dependent",
    "get value out of a tracing tensor",
    "aten._local_scalar_dense",
    "aten.nonzero",
    "aten.equal",
    # What numpy and torch.tensor([...]) run into.
    ".numpy() is not supported",
    "Cannot access data pointer",
    "data is not allocated yet",
)


def _looked_at_values(error: Exception) -> bool:
    """Whether it comes from tensors that have shapes only."""
    return (
        isinstance(error, DataDependentOutputException)
        or "Dynamic" in type(error).__name__
        or any(mark in str(error) for mark in _VALUE_ERRORS)
    )


def _refuse_writes(graph: Graph) -> None:
    """Raise where something is written over: a program's order is that of its edges.

    What a write through a view changes is not among its users.
    """
    for one in with_bodies(graph):
        for node in calls_of(one):
            target = node.target
            if isinstance(target, torch._ops.OpOverload) and target._schema.is_mutable:
                lines = (node.stack_trace or "").strip().splitlines()
                place = "".join(f"\n    {line.strip()}" for line in lines[-2:])
                raise TraceError(
                    f"the step writes over a tensor ({target._opname}), which a "
                    f"program cannot:{place}\n"
                    "Write x = x + y instead of x += y, torch.where, torch.cat, "
                    "torch.stack or x.scatter(...) instead of x[i] = y, and no method "
                    "that ends in _. (Without zf.jit the step runs as it is.)"
                )


def _explained(error: Exception) -> TraceError:
    frame = _users_frame(error)
    place = f"{frame.filename}:{frame.lineno}" if frame else "the step"
    line = f"\n    {frame.line}" if frame and frame.line else ""
    # torch.func keeps numpy out of a loss, traced or not.
    numpy = any(mark in str(error) for mark in (".numpy()", "data pointer"))
    untraced = "" if numpy else " (Without zf.jit the step runs as it is.)"
    return TraceError(
        f"{place} needs the value of a tensor while the step is traced, when tensors "
        f"have shapes only:{line}\n"
        "Choose with torch.where(condition, a, b) instead of `if`, keep numbers as "
        "0-d tensors instead of .item() or float(), join them with torch.stack instead "
        "of torch.tensor([...]), select with a mask instead of x[mask], compute with "
        "torch instead of numpy, or move the decision out of the loss: into the "
        "batch, or a Python value that the loss closes over (fixed when traced)."
        f"{untraced}"
    )


# Code without a file that nobody wrote; "<stdin>" is the user's.
GENERATED: Final = ("<eval_with_key>", "<frozen", "<string>", "<zfunc")


def _users_frame(error: Exception) -> traceback.FrameSummary | None:
    """The innermost line that is neither torch's nor ours, or else a library's."""
    ours = Path(__file__).resolve().parents[1]
    inner = Path(torch.__file__).resolve().parent
    frames = traceback.extract_tb(error.__traceback__)
    outside = [
        f
        for f in frames
        if not Path(f.filename).is_relative_to(inner)
        and not (
            Path(f.filename).is_relative_to(ours)
            and not Path(f.filename).is_relative_to(ours / "models")
        )
        and not f.filename.startswith(GENERATED)
    ]
    own = [f for f in outside if "site-packages" not in f.filename]
    return (own or outside or [None])[-1]  # type: ignore[list-item]
