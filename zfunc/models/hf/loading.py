# SPDX-License-Identifier: Apache-2.0
"""Weights from a checkpoint directory into each rank's pieces.

Which stored tensors make up which parameter is transformers' own knowledge: its table
of renamed keys and of conversions (experts that were stored one by one are one tensor
in its version 5). What is only renamed is read slice by slice; what is converted is
converted one parameter at a time.
"""

from __future__ import annotations

import copy
import functools
import importlib
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any, NamedTuple

import torch

from zfunc.models.hf.errors import ModelError
from zfunc.models.hf.files import Stored, described, stored_in
from zfunc.models.hf.layout import Layout, Region


class Loaded(NamedTuple):
    """Leaves by name, stored buffers by name, and the names that are to be made."""

    leaves: dict[str, Any]
    buffers: dict[str, torch.Tensor]
    new: set[str]


@dataclass
class _Source:
    """What makes up one parameter: stored tensors, and a conversion or None."""

    target: str
    converter: Any
    parts: list[tuple[str, Stored]] = field(default_factory=list)

    def shapes(self, model: Any) -> dict[str, tuple[int, ...]]:
        """Names and shapes of what this source gives, without reading."""
        if self.converter is None:
            return {self.target: self.parts[0][1].shape}
        made = self._converted(
            model, lambda stored: torch.empty(stored.shape, device="meta")
        )
        return {name: tuple(x.shape) for name, x in made.items()}

    def read(self, model: Any, name: str, region: Region) -> torch.Tensor:
        """The part of the parameter ``name`` in ``region``."""
        if self.converter is None:
            return self.parts[0][1].read(region)
        if _stacks(self.converter):
            chosen = self._stacked(*region[0])
            rest = ((0, region[0][1] - region[0][0]), *region[1:])
            full = chosen._converted(model, Stored.read)[name] if chosen.parts else None
            if full is None:  # a rank whose piece is padding only
                return torch.empty([stop - start for start, stop in region])
            return full[tuple(slice(*ends) for ends in rest)]
        full = self._converted(model, Stored.read)[name]
        return full[tuple(slice(*ends) for ends in region)]

    def _converted(
        self, model: Any, value: Callable[[Stored], torch.Tensor]
    ) -> dict[str, torch.Tensor]:
        converter = copy.deepcopy(self.converter)
        for pattern, stored in self.parts:
            reading = functools.partial(value, stored)
            converter.add_tensor(self.target, stored.key, pattern, reading)
        made = converter.convert(self.target, model=model, config=model.config)
        return {name: x[0] if isinstance(x, list) else x for name, x in made.items()}

    def _stacked(self, start: int, stop: int) -> _Source:
        """Only the tensors start to stop of each list that is stacked along dim 0."""
        counts: dict[str, int] = {}
        parts = []
        for pattern, stored in self.parts:
            position = counts.get(pattern, 0)
            counts[pattern] = position + 1
            if start <= position < stop:
                parts.append((pattern, stored))
        return _Source(self.target, self.converter, parts)


def load(
    directory: Path,
    model: Any,
    layout: Layout,
    new: Iterable[str] = (),
    ignore: Iterable[str] = (),
) -> Loaded:
    """Read the parameters of ``model``, which is on the meta device.

    Raises:
      ModelError: one error with all the names that are missing, that nothing asks for
        or that have another shape.
    """
    sources, unexpected = _sources(stored_in(directory), model)
    wanted = {**dict(model.named_parameters()), **_persistent(model)}
    canonical = _canonical(model)
    made: dict[str, list[tuple[_Source, str]]] = {}
    wrong: list[str] = []
    for source in sources:
        for name, shape in source.shapes(model).items():
            path = canonical.get(name, name)
            if path not in wanted:
                unexpected.append(name)
            elif tuple(wanted[path].shape) != shape:
                has = tuple(wanted[path].shape)
                wrong.append(f"{path} is {shape} in the files and {has} in the model")
            else:
                made.setdefault(path, []).append((source, name))
    _check_patterns("new", new, list(wanted))
    failed = {line.split(" ")[0] for line in wrong}
    missing = [name for name in wanted if name not in made and name not in failed]
    fresh = {n for n in missing if _matches(n, new) or _optional(n, model)}
    problems = [
        ("missing", [n for n in missing if n not in fresh]),
        ("not of the model", _not_ignored(unexpected, model, ignore)),
        ("wrong shape", wrong),
    ]
    if any(names for _, names in problems):
        raise described(problems, directory, type(model).__name__)
    buffers = _persistent(model)
    values: dict[str, torch.Tensor] = {}
    leaves: dict[str, Any] = {}
    for name in [name for name in wanted if name in made]:
        if name in buffers:  # whole on every rank
            source, alias = made[name][0]
            everything = tuple((0, size) for size in wanted[name].shape)
            values[name] = layout.whole(source.read(model, alias, everything))
        else:
            leaves[name] = _leaf(name, made[name], model, wanted[name], layout)
    return Loaded(leaves, values, fresh)


def _leaf(
    name: str,
    origins: list[tuple[_Source, str]],
    model: Any,
    like: torch.Tensor,
    layout: Layout,
) -> Any:
    shape = tuple(like.shape)
    region = layout.region(name, shape)
    first, *others = [source.read(model, alias, region) for source, alias in origins]
    for (_, alias), other in zip(origins[1:], others, strict=True):
        if not torch.equal(first, other):
            raise ModelError(
                f"{origins[0][1]} and {alias} are one parameter in this model and "
                "differ in the files: set config.tie_word_embeddings=False."
            )
    return layout.leaf(name, shape, first)


def _sources(stored: dict[str, Stored], model: Any) -> tuple[list[_Source], list[str]]:
    """What each target of the checkpoint is made of, and the keys without a target."""
    table: Any = importlib.import_module("transformers.conversion_mapping")
    tools: Any = importlib.import_module("transformers.core_model_loading")
    transforms = table.get_model_conversion_mapping(model)
    renamings = [t for t in transforms if isinstance(t, tools.WeightRenaming)]
    converters = [t for t in transforms if isinstance(t, tools.WeightConverter)]
    by_pattern = {p: c for c in converters for p in c.source_patterns}
    targets = model.state_dict()
    found: dict[str, _Source] = {}
    unexpected: list[str] = []
    for key in sorted(stored, key=tools.dot_natural_key):
        prefix = model.base_model_prefix
        name, pattern = tools.rename_source_key(
            key, renamings, converters, prefix, targets
        )
        if name not in targets and key in targets:
            name, pattern = tools.rename_source_key(key, [], [], prefix, targets)
        if name not in targets:
            unexpected.append(key)
            continue
        converter = None if pattern is None else by_pattern[pattern]
        source = found.setdefault(name, _Source(name, converter))
        source.parts.append((pattern or key, stored[key]))
    return list(found.values()), unexpected


def _stacks(converter: Any) -> bool:
    """Whether dim 0 of the result counts the stored tensors of each pattern."""
    first, *rest = converter.operations
    return (
        type(first).__name__ == "MergeModulelist"
        and first.dim == 0
        and all(type(op).__name__ == "Concatenate" and op.dim > 0 for op in rest)
    )


def _canonical(model: torch.nn.Module) -> dict[str, str]:
    """The one name of each parameter, for each name that it has."""
    names = {id(p): name for name, p in reversed(list(model.named_parameters()))}
    every = model.named_parameters(remove_duplicate=False)
    return {name: names[id(p)] for name, p in every}


def _persistent(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {n: b for n, b in model.named_buffers() if n in model.state_dict()}


def _check_patterns(option: str, patterns: Iterable[str], names: list[str]) -> None:
    for pattern in patterns:
        if not any(fnmatchcase(name, pattern) for name in names):
            raise ModelError(
                f"{option}: {pattern!r} matches none of the model's parameters, "
                f"such as {', '.join(names[:3])}."
            )


def _matches(name: str, patterns: Iterable[str]) -> bool:
    return any(fnmatchcase(name, pattern) for pattern in patterns)


def _optional(name: str, model: Any) -> bool:
    patterns = model._keys_to_ignore_on_load_missing or ()
    return any(re.search(pattern, name) for pattern in patterns)


def _not_ignored(names: list[str], model: Any, ignore: Iterable[str]) -> list[str]:
    """Without what transformers ignores too: buffers that older versions stored."""
    known = [
        *(model._keys_to_ignore_on_load_unexpected or ()),
        r"rotary_emb\.inv_freq$",
        r"(^|\.)position_ids$",
        r"\.attn\.(masked_)?bias$",
    ]
    return [
        name
        for name in names
        if not _matches(name, ignore)
        and not any(re.search(pattern, name) for pattern in known)
    ]
