# SPDX-License-Identifier: Apache-2.0
"""``jit``: a training step traced once, transformed by passes, and replayed."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import torch

from zfunc.core.sharding import is_sharded
from zfunc.core.state import Metrics, TrainState, check_usable
from zfunc.core.step import TrainStep
from zfunc.core.tree import (
    PyTree,
    leaves_with_path,
    tree_flatten,
    tree_leaves,
)
from zfunc.program import backends
from zfunc.program.donated import Donation, donation_of, with_donated
from zfunc.program.inplace import write_over
from zfunc.program.layout import Layout, Matched, layout_of
from zfunc.program.passes import DEFAULT
from zfunc.program.program import Pass, Program
from zfunc.program.trace import trace, with_kind
from zfunc.transforms.donation import check_placed

logger = logging.getLogger("zfunc.jit")

Backend = Literal["aten", "inductor", "cudagraph"]


class _Signature(NamedTuple):
    """What a program was traced for: anything else is another program."""

    spec: Any
    leaves: tuple[Any, ...]
    ambient: Any


@dataclass(frozen=True)
class _Value:
    """A leaf that is no tensor: 1, 1.0 and True are equal, but make other programs."""

    kind: type
    value: Any

    def __repr__(self) -> str:
        return repr(self.value)


class _Executable(NamedTuple):
    """A compiled program, and how its outputs become a state."""

    run: Callable[[list[Any]], list[Any]]
    layout: Layout
    donation: Donation | None
    ambient: Any

    def call(self, grads: PyTree, matched: Matched) -> TrainState:
        """One step; ``grads`` are those of the last one."""
        if self.donation is None:
            outputs = self.run(matched.tensors)
        else:
            outputs = self.donation.run(self.run, grads, matched)
        return self.layout.filled(outputs)  # type: ignore[no-any-return]


class Jitted:
    """The step that ``jit`` returns; see there."""

    __slots__ = ("_backend", "_cache", "_donate", "_passes", "_step")

    def __init__(
        self, step: TrainStep, donate: bool, backend: Any, passes: tuple[Pass, ...]
    ) -> None:
        self._step, self._donate = step, donate
        self._backend, self._passes = backend, passes
        self._cache: dict[_Signature, _Executable] = {}

    def __call__(self, state: TrainState, batch: PyTree) -> TrainState:
        """One step."""
        if self._cache and isinstance(state, TrainState):
            latest = next(reversed(self._cache.values()))
            matched = latest.layout.match(state, batch)
            if matched is not None and latest.ambient == ambient():
                return latest.call(state.grads, matched)
        grads = check_usable(state).grads
        state = _traceable(self._step, state)
        executable = self._executable(state, batch)
        matched = executable.layout.match(state, batch)
        if matched is None:
            raise AssertionError("the program does not fit what it was traced for")
        del state
        return executable.call(grads, matched)

    def _executable(self, state: TrainState, batch: PyTree) -> _Executable:
        """The program for these arguments, made if it is not there; then the latest."""
        if self._donate:
            check_placed(state)
        leaves, spec = tree_flatten((state, batch))
        _check_leaves((state, batch), leaves)
        signature = _Signature(spec, tuple(map(_described, leaves)), ambient())
        executable = self._cache.pop(signature, None)
        if executable is None:
            self._say_why(signature, state, batch)
            executable = self._compiled(state, batch)
        self._cache[signature] = executable
        return executable

    def lower(self, state: TrainState, batch: PyTree) -> Program:
        """The program for these shapes after the passes; nothing is run or sent.

        State and batch may be abstract, and on an ``AbstractMesh``.
        """
        state = _traceable(self._step, check_usable(state))
        program = lowered(self._step, state, batch)
        if self._donate:
            program = with_donated(program, state)
        for change in self._passes:
            program = change(program)
        return write_over(program)

    def loss_scale_of(self, state: TrainState) -> Any:
        """The state's loss scale, as of the step that was traced."""
        return self._step.loss_scale_of(state)

    def __repr__(self) -> str:
        return f"<jit {self._step!r}>"

    def _compiled(self, state: TrainState, batch: PyTree) -> _Executable:
        program = self.lower(state, batch)
        compile_graph = backends.choose(self._backend, program.device_type)
        return _Executable(
            program.run_by(compile_graph),
            layout_of(state, batch, program.out_spec),
            donation_of(state, program) if self._donate else None,
            ambient(),
        )

    def _say_why(self, new: _Signature, state: TrainState, batch: PyTree) -> None:
        if self._cache:
            last = next(reversed(self._cache))
            logger.warning(
                "zf.jit traces again: %s", _difference(last, new, state, batch)
            )


def _traceable(step: TrainStep, state: TrainState) -> TrainState:
    """The state without what a step does not read, and with moments."""
    loss = state.metrics.loss
    return state.replace(
        grads=None,
        moments=step.moments_of(state),
        loss_scale=step.loss_scale_of(state),
        metrics=Metrics(loss, state.metrics.grad_norm, state.metrics.skipped, {}),
    )


def _check_leaves(args: PyTree, leaves: list[Any]) -> None:
    """Raise for what a program cannot be chosen by, or run on."""
    for i, leaf in enumerate(leaves):
        fake = isinstance(leaf, torch._subclasses.FakeTensor)
        if isinstance(leaf, torch.Tensor) and not fake:
            continue
        place, _, rest = leaves_with_path(args)[i][0].partition("/")
        path = "/".join(filter(None, (("state", "batch")[int(place)], rest)))
        if fake:
            raise TypeError(
                f"{path} is abstract, without values: type "
                ".lower(state, batch) for the program"
            )
        if type(leaf).__hash__ is None or leaf != leaf:
            raise TypeError(
                f"{path} is a {type(leaf).__name__}: a batch is of "
                "tensors, and of Python values that equal themselves (a program is "
                "traced for each); type torch.as_tensor(x)"
            )


def ambient() -> tuple[Any, ...]:
    """What of torch's own settings a step is traced with: the default dtype, autocast.

    Examples:
      >>> with torch.autocast("cpu", torch.bfloat16):
      ...     ambient()
      (torch.float32, ('cpu', torch.bfloat16))
    """
    autocast = [
        (kind, torch.get_autocast_dtype(kind))
        for kind in ("cpu", "cuda")
        if torch.is_autocast_enabled(kind)
    ]
    return torch.get_default_dtype(), *autocast


def _described(leaf: Any) -> Any:
    if isinstance(leaf, torch.Tensor):
        return (leaf.shape, leaf.dtype, leaf.stride(), leaf.device)
    return _Value(type(leaf), leaf)


def _difference(
    old: _Signature, new: _Signature, state: TrainState, batch: PyTree
) -> str:
    """What of a signature is new, in one line."""
    if old.spec != new.spec:
        return "the structure or the placement of the state or of the batch is new"
    if old.ambient != new.ambient:
        return f"torch's default dtype and autocast are {new.ambient}"
    paths = _paths(state, batch)
    words = ("shape", "dtype", "strides", "device")
    for path, before, now in zip(paths, old.leaves, new.leaves, strict=True):
        if before == now:
            continue
        if not (isinstance(before, tuple) and isinstance(now, tuple)):
            return f"{path} is {now!r}, it was {before!r}"
        for word, a, b in zip(words, before, now, strict=True):
            if a != b:
                a, b = (tuple(x) if word == "shape" else x for x in (a, b))
                return f"{path} has {word} {b}, it had {a}"
    return "nothing differs"


def lowered(step: TrainStep, state: TrainState, batch: PyTree) -> Program:
    """The step traced on the shapes of a state and a batch, before any pass."""
    meshes = {
        leaf.sharding.mesh
        for leaf in tree_leaves(state.params, is_sharded)
        if is_sharded(leaf)
    }
    kind = next((mesh.kind for mesh in meshes), "local")
    state, paths = with_kind(state, "traced"), _paths(state, batch)
    leaves = tree_flatten((state, batch))[0]
    traced = trace(step.__call__, (state, batch), kind)
    tensors = [i for i, x in enumerate(leaves) if isinstance(x, torch.Tensor)]
    groups = [
        (mesh.group(axis), axis, n) for mesh in meshes for axis, n in mesh.axes if n > 1
    ]
    names = [f"constant/{i}" for i in range(len(traced.constants))]
    return Program(
        traced.graph,
        tuple([paths[i] for i in tensors] + names),
        tuple(path.removesuffix("/buffer") for path in traced.out_paths),
        tuple(traced.constants),
        tuple(groups),
        leaves[tensors[0]].device.type,
        out_spec=traced.out_spec,
    )


def _paths(state: TrainState, batch: PyTree) -> list[str]:
    paths = [path.removesuffix("/buffer") for path, _ in leaves_with_path(state)]
    return paths + [f"batch/{p}".rstrip("/") for p, _ in leaves_with_path(batch)]


def jit(
    step: TrainStep,
    *,
    donate: bool = True,
    backend: Backend | None = None,
    passes: Sequence[Pass] = DEFAULT,
) -> Jitted:
    r"""The step as a program: traced once for its shapes, then replayed.

    The first call runs the step's Python on shapes alone, backward, collectives and
    optimizer included, and records one flat graph. Passes schedule it (when to gather,
    gather again, reduce, send together), a backend runs it, and later calls with the
    same structure, shapes, dtypes and placements only replay. Anything else is traced
    anew; the logger ``zfunc.jit`` says why, in one line.

    Args:
      step: made by ``zf.train_step``.
      donate: the state that a step is given is used up: parameters and moments are
        written over in place, except where something else holds their memory (which
        then keeps its values), and using the old state is a ``DonatedBufferError``.
        False leaves it as it was.
      backend: ``"aten"`` replays operator by operator, with no compile time;
        ``"inductor"`` compiles what is between collectives, equal layers once;
        ``"cudagraph"`` replays on a GPU. Default: aten on the CPU, inductor on a GPU.
      passes: functions from program to program, in order; see
        ``zfunc.program.passes``. None of them changes a bit of the result.

    Returns:
      A callable like the step. Its ``lower(state, batch)`` is the ``Program``, which
      can be read without being run, for abstract states and meshes too.

    Raises:
      TypeError: something that is not a ``TrainStep``, or a pass that is no function.
      ValueError: a backend that does not exist, or not on this machine.
      TraceError: (when called) Python that depends on the values of tensors, with the
        line.

    Laws: ``jit(step) == step`` bitwise on the aten backend, with each pass and all; to
    rounding on inductor. The bytes that the program sends are those of the stage.

    Differs from ``torch.compile``: dynamo drops custom backwards under ``torch.func``
    without a word, so it is never asked; and from DeepSpeed: gathers, releases,
    buckets and overlap are passes over one graph instead of hooks and streams.

    Example:
      >>> import zfunc as zf
      >>> step = jit(zf.train_step(lambda p, b: (p * b).sum(), zf.optim.sgd(0.1)))
      >>> state = step(zf.shard(torch.ones(2), zf.make_mesh({})), torch.ones(2))
      >>> state.params.buffer
      tensor([0.9000, 0.9000])
    """
    if not isinstance(step, TrainStep):
        raise TypeError(f"jit takes a TrainStep, got a {type(step).__name__}")
    backends.check_name(backend)
    for change in passes:
        if not callable(change):
            raise TypeError(
                f"passes are functions from program to program, got {change!r}: type "
                "zfunc.program.passes.sink, without quotes"
            )
    return Jitted(step, donate, backend, tuple(passes))
