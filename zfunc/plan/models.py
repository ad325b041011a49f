# SPDX-License-Identifier: Apache-2.0
"""The model of a plan: parameters without memory, a loss, and a batch's shape."""

from __future__ import annotations

import dataclasses
import functools
import importlib
import inspect
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch

from zfunc.core.tree import PyTree, leaves_with_path
from zfunc.models import gpt
from zfunc.plan import hf
from zfunc.plan.errors import PlanError
from zfunc.plan.presets import Preset, preset


class Built(NamedTuple):
    """A model of some depth.

    Attributes:
      params: Its parameters; only their shapes and dtypes are read.
      loss: ``(params, batch)`` to what ``zf.train_step`` takes.
      batch: From a number of samples and a length in tokens to a batch.
    """

    params: PyTree
    loss: Callable[..., Any]
    batch: Callable[[int, int], PyTree]


class Model(NamedTuple):
    """A model that can be built at any depth.

    Attributes:
      name: What ``--model`` was given.
      depth: Its number of repeated layers; None if it cannot be built at others.
      build: From a depth, a length in tokens and a transformation of the block (None
        or ``zf.remat``) to the model.
      takes_remat: Whether ``build`` heeds the transformation.
    """

    name: str
    depth: int | None
    build: Callable[[int | None, int, Any], Built]
    takes_remat: bool = True


def load(name: str, depth: int | None = None) -> Model:
    """The model of a preset's name or a Python path.

    Args:
      name: A preset, or ``your.module:function`` (see ``from_path``).
      depth: The number of layers; the model's own if None.

    Raises:
      PlanError: There is no such model, or it has no layers to count.
    """
    model = from_path(name) if ":" in name else _from_preset(preset(name))
    if depth is None:
        return model
    if model.depth is None:
        raise PlanError(
            f"--layers {depth}: {name} takes no number of layers; give it a parameter "
            "num_layers"
        )
    return model._replace(depth=depth)


def _from_preset(chosen: Preset) -> Model:
    def build(depth: int | None, seq_len: int, remat: Any) -> Built:
        layers = chosen.config.n_layers if depth is None else depth
        config = dataclasses.replace(
            chosen.config, n_layers=layers, max_seq_len=seq_len
        )
        if chosen.library == "transformers":
            return Built(*hf.llama(config, remat), hf.batch)
        with torch.device("meta"):
            params = gpt.init(config)
        loss = functools.partial(gpt.loss, config=config, remat=remat)
        return Built(params, loss, _next_tokens)

    return Model(chosen.name, chosen.config.n_layers, build)


def _next_tokens(samples: int, seq_len: int) -> PyTree:
    return {"tokens": torch.zeros(samples, seq_len + 1, dtype=torch.int64)}


def _ids(samples: int, seq_len: int) -> PyTree:
    return torch.zeros(samples, seq_len, dtype=torch.int64)


def from_path(path: str) -> Model:
    """The model that ``your.module:function`` returns.

    The function returns ``(params, loss_fn)``, or ``(params, loss_fn, make_batch)``
    with ``make_batch(samples, seq_len)``; without it a batch is int64 ids of that
    shape. Parameters may be on the meta device: only shapes are read. Parameters of
    the function that are called ``num_layers`` (an int, with the model's own depth as
    its default), ``remat`` (None or ``zf.remat``) and ``seq_len`` are passed to it;
    with ``num_layers`` a deep model is traced at two small depths.

    Raises:
      PlanError: The path leads to no such function.
    """
    function = _function(path)
    takes = inspect.signature(function).parameters
    depth = None
    if "num_layers" in takes:
        depth = takes["num_layers"].default
        if type(depth) is not int or depth < 1:
            raise PlanError(
                f"--model {path}: the default of num_layers must be the model's own "
                f"number of layers, as in num_layers=32; it is {depth!r}"
            )

    def build(depth: int | None, seq_len: int, remat: Any) -> Built:
        offered = {"num_layers": depth, "seq_len": seq_len, "remat": remat}
        made = function(**{k: v for k, v in offered.items() if k in takes})
        return _checked(path, made)

    return Model(path, depth, build, takes_remat="remat" in takes)


def _function(path: str) -> Callable[..., Any]:
    module_name, _, name = path.partition(":")
    here = str(Path.cwd())
    if here not in sys.path:  # as `python -m` has it
        sys.path.insert(0, here)
    try:
        found = getattr(importlib.import_module(module_name), name, None)
    except ImportError as error:
        raise PlanError(
            f"--model {path}: cannot import {module_name} ({error}); the path is "
            "your.module:function, from the working directory or an installed package"
        ) from error
    if not callable(found):
        raise PlanError(f"--model {path}: {module_name} has no function {name!r}")
    return found  # type: ignore[no-any-return]


def _checked(path: str, made: Any) -> Built:
    parts = made if isinstance(made, tuple) else (made,)
    if len(parts) not in (2, 3) or not all(callable(part) for part in parts[1:]):
        raise PlanError(
            f"--model {path}: the function must return (params, loss_fn) or (params, "
            f"loss_fn, make_batch), it returned a {type(made).__name__}"
            + (f" of {len(parts)}" if isinstance(made, tuple) else "")
        )
    for make_batch in parts[2:]:
        try:
            inspect.signature(make_batch).bind(1, 1)
        except TypeError as error:
            raise PlanError(
                f"--model {path}: make_batch is called as make_batch(samples, "
                f"seq_len), and does not take that: {error}"
            ) from error
    for leaf_path, leaf in leaves_with_path(parts[0]):
        if not isinstance(leaf, torch.Tensor) or not leaf.is_floating_point():
            raise PlanError(
                f"--model {path}: params[{leaf_path!r}] must be a floating tensor, it "
                f"is a {getattr(leaf, 'dtype', type(leaf).__name__)}"
            )
    return Built(parts[0], parts[1], parts[2] if len(parts) == 3 else _ids)
