# SPDX-License-Identifier: Apache-2.0
"""Random initialisation, one parameter at a time: recorded, then replayed.

A constructor draws numbers for all parameters in turn, and often twice. Run on fake
tensors it costs no memory; the operators it ran are then run for real in the same
order, with the same generator, and each parameter is handed over and freed when its
last operator is done. So the numbers are those of the constructor, bit for bit.
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import dataclass
from typing import Any, Final, NamedTuple

import torch
from torch._subclasses import FakeTensorMode
from torch._subclasses.fake_tensor import DataDependentOutputException, is_fake
from torch.utils._mode_utils import no_dispatch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

from zfunc.models.hf.errors import ModelError

_OVERWRITES: Final = frozenset(
    ["normal_", "uniform_", "zero_", "fill_", "copy_", "random_"]
)


class _Ref(NamedTuple):
    """A tensor of the recording: a view of a storage."""

    storage: int
    shape: tuple[int, ...]
    stride: tuple[int, ...]
    offset: int
    dtype: torch.dtype


@dataclass(frozen=True)
class _Op:
    func: Any
    args: Any
    kwargs: Any
    outs: Any


class _Recorder(TorchDispatchMode):
    """Notes every operator that reaches the dispatcher."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.ops: list[_Op] = []
        self.kept: list[torch.Tensor] = []  # so that no storage's address is reused
        self.sizes: dict[int, int] = {}

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        outs = func(*args, **kwargs)
        self.ops.append(_Op(func, *map(self.refs, (args, kwargs, outs))))
        return outs

    def refs(self, tree: Any) -> Any:
        """The tree with each fake tensor as a reference; real ones are constants."""

        def one(x: Any) -> Any:
            if not isinstance(x, torch.Tensor):
                return x
            if is_fake(x):
                return self.ref(x)
            with no_dispatch():
                return x.clone()  # numbers of the code itself, as in torch.tensor(3)

        return tree_map(one, tree)

    def ref(self, x: torch.Tensor) -> _Ref:
        """The view that a tensor is."""
        self.kept.append(x)
        storage = x.untyped_storage()._cdata
        self.sizes[storage] = x.untyped_storage().nbytes()
        return _Ref(storage, (*x.shape,), x.stride(), int(x.storage_offset()), x.dtype)


@dataclass(frozen=True)
class Recording:
    """A module on fake tensors, and how its numbers come about."""

    module: torch.nn.Module
    ops: list[_Op]
    sizes: dict[int, int]
    named: dict[str, _Ref]


def record(construct: Callable[[], torch.nn.Module]) -> Recording:
    """Run a constructor without memory and note what it did.

    Raises:
      ModelError: the constructor looks at the numbers that it draws.
    """
    recorder = _Recorder()
    try:
        with FakeTensorMode(), recorder:
            module = construct()
    except DataDependentOutputException as error:
        raise ModelError(
            "this model's constructor looks at the numbers it draws, so it cannot be "
            f"made piece by piece ({error}): make the model and pass it instead."
        ) from error
    _check_attributes(module)
    tensors = [*module.named_parameters(), *module.named_buffers()]
    named = {name: recorder.ref(x) for name, x in tensors}
    return Recording(module, recorder.ops, recorder.sizes, named)


def _check_attributes(module: torch.nn.Module) -> None:
    for name, part in module.named_modules():
        for attribute, value in vars(part).items():
            if isinstance(value, torch.Tensor):
                raise ModelError(
                    f"{name}.{attribute} is a tensor that is neither a parameter nor a "
                    "buffer, so it cannot be made piece by piece: make the model and "
                    "pass it instead."
                )


def replay(
    recording: Recording,
    wanted: Collection[str],
    key: int,
    hand_over: Callable[[str, torch.Tensor], None],
) -> None:
    """Run what was recorded for real; ``hand_over`` gets each wanted name and tensor.

    The numbers are those that the constructor gives after ``torch.manual_seed(key)``.
    torch's own generator is as before at the end.
    """
    named = {name: recording.named[name] for name in wanted}
    needed, last = _liveness(recording, {ref.storage for ref in named.values()})
    drawn = [i for i in needed if _is_random(recording.ops[i])]
    names: dict[int, list[str]] = {}
    for name, ref in named.items():
        names.setdefault(ref.storage, []).append(name)
    memory: dict[int, torch.UntypedStorage] = {}
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(key)
        for i, op in enumerate(recording.ops):
            if i in needed:
                _run(op, memory, recording.sizes)
            elif _is_random(op) and i < max(drawn, default=0):
                _run(op, {}, recording.sizes)  # only the generator moves on
            for storage in last.get(i, ()):
                for name in names.get(storage, ()):
                    hand_over(name, _view(named[name], memory[storage]))
                memory.pop(storage, None)


def _is_random(op: _Op) -> bool:
    return torch.Tag.nondeterministic_seeded in op.func.tags


def _liveness(
    recording: Recording, live: set[int]
) -> tuple[set[int], dict[int, list[int]]]:
    """The operators whose results matter, and the storages that each of them ends."""
    needed: set[int] = set()
    last: dict[int, list[int]] = {}
    seen: set[int] = set()
    for i, op in reversed(list(enumerate(recording.ops))):
        read, written = _storages((op.args, op.kwargs)), _written(op)
        if not live & written:
            continue
        needed.add(i)
        fresh = _storages(op.outs) - read
        overwritten = _overwritten(op, recording.sizes)
        live -= fresh | overwritten
        live |= read - overwritten
        ended = (read | written) - seen
        seen |= ended
        last[i] = sorted(ended)
    return needed, last


def _storages(tree: Any) -> set[int]:
    return {x.storage for x in _refs_of(tree)}


def _refs_of(tree: Any) -> list[_Ref]:
    leaves = tree_leaves(tree, is_leaf=lambda x: isinstance(x, _Ref))
    return [x for x in leaves if isinstance(x, _Ref)]


def _written(op: _Op) -> set[int]:
    """What an operator makes or changes; a view makes nothing new of its storage."""
    made = _storages(op.outs) - _storages((op.args, op.kwargs))
    schema = op.func._schema.arguments
    for i, argument in enumerate(schema):
        if argument.alias_info is not None and argument.alias_info.is_write:
            value = op.args[i] if i < len(op.args) else op.kwargs.get(argument.name)
            made |= _storages(value)
    return made


def _overwritten(op: _Op, sizes: dict[int, int]) -> set[int]:
    """The storage that an operator fills as a whole, whatever was there."""
    name = op.func._schema.name.split("::")[-1]
    if name not in _OVERWRITES:
        return set()
    target = op.args[0]
    numel = 1
    for size in target.shape:
        numel *= size
    whole = numel * target.dtype.itemsize == sizes[target.storage]
    others = {x.storage for x in _refs_of((op.args[1:], op.kwargs))}
    return {target.storage} - others if whole else set()


def _run(
    op: _Op, memory: dict[int, torch.UntypedStorage], sizes: dict[int, int]
) -> None:
    def real(x: Any) -> Any:
        if not isinstance(x, _Ref):
            return x
        if x.storage not in memory:
            raw = torch.empty(sizes[x.storage], dtype=torch.uint8)
            memory[x.storage] = raw.untyped_storage()
        return _view(x, memory[x.storage])

    is_ref = lambda x: isinstance(x, _Ref)  # noqa: E731
    args, kwargs = (
        tree_map(real, tree, is_leaf=is_ref) for tree in (op.args, op.kwargs)
    )
    outs = op.func(*args, **kwargs)
    known = _storages((op.args, op.kwargs))
    for ref, out in zip(
        _refs_of(op.outs),
        [x for x in tree_leaves(outs) if isinstance(x, torch.Tensor)],
        strict=True,
    ):
        if ref.storage not in known:
            memory[ref.storage] = out.untyped_storage()


def _view(ref: _Ref, storage: torch.UntypedStorage) -> torch.Tensor:
    empty = torch.empty(0, dtype=ref.dtype)
    return empty.set_(storage, ref.offset, ref.shape, ref.stride)
