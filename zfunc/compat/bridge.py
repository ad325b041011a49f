# SPDX-License-Identifier: Apache-2.0
"""``initialize``: DeepSpeed's function of that name, over the pure step."""

from __future__ import annotations

import argparse
import os
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any, Final

import torch
from torch.utils.data import DataLoader, Dataset, DistributedSampler, IterableDataset

from zfunc.compat.engine import Engine
from zfunc.compat.errors import CompatError
from zfunc.compat.modules import check_module, take_over
from zfunc.compat.setting import Setting
from zfunc.compat.views import OptimizerView, SchedulerView
from zfunc.config.interpret import interpret
from zfunc.config.numerics import DTYPES
from zfunc.config.reading import read
from zfunc.core.mesh import Mesh, make_mesh
from zfunc.core.state import shard
from zfunc.optim.base import GradientTransformation

Config = Mapping[str, Any] | str | Path
_PORT: Final = 29500
# torch's optimizers, as sections of a configuration.
_SECTIONS: Final = MappingProxyType(
    {
        torch.optim.AdamW: ("AdamW", MappingProxyType({})),
        torch.optim.Adam: ("Adam", MappingProxyType({"adam_w_mode": False})),
        torch.optim.SGD: ("SGD", MappingProxyType({})),
    }
)


def initialize(
    args: Any = None,
    model: Any = None,
    optimizer: Any = None,
    model_parameters: Iterable[Any] | None = None,
    training_data: Any = None,
    lr_scheduler: Any = None,
    distributed_port: int = _PORT,
    mpu: Any = None,
    dist_init_required: bool | None = None,
    collate_fn: Callable[..., Any] | None = None,
    config: Config | None = None,
    mesh_param: Any = None,
    config_params: Config | None = None,
) -> tuple[Engine, OptimizerView, Any, SchedulerView | None]:
    r"""An engine that trains a module as its DeepSpeed configuration says.

    The module is taken over: its parameters live in the engine, and its own are empty.
    All ranks begin with the values of rank 0. A module that returns its loss costs what
    a step costs; one that returns outputs costs one more forward per microbatch, and
    one more at the first.

    Args:
      args: An object whose ``deepspeed_config`` is the configuration, if ``config`` is
        not given.
      model: A ``torch.nn.Module``; parameters that do not require grad stay as they
        are, whole on every rank.
      optimizer: Where the configuration has none: a ``torch.optim`` AdamW, Adam or SGD
        with one group (its settings and its parameters are read), a
        ``GradientTransformation``, or a function from a schedule to one.
      model_parameters: Those that are trained; None for those of a ``torch.optim``
        optimizer, or all that require grad.
      training_data: A dataset, for the data loader that is returned.
      lr_scheduler: Not taken: the section ``scheduler`` says it.
      distributed_port: Not taken: torchrun says it.
      mpu: Not taken.
      dist_init_required: Read and not needed: a job of torchrun is joined if there is
        one.
      collate_fn: Of the data loader.
      config: A dict, or the path of a JSON file.
      mesh_param: Not taken.
      config_params: The old name of ``config``.

    Returns:
      ``(engine, optimizer, dataloader, lr_scheduler)``. The second and the last are
      views to read from; without ``training_data`` or a scheduler there is a None.

    Raises:
      ConfigError: What is wrong with the configuration, all at once. Nothing has been
        started then, and the module is as it was.
      CompatError: An argument that is not taken, or a module that is no pure function.

    Laws:
      Losses and parameters are those of ``zf.train_step`` with the same transformations
      and of DeepSpeed, up to the order of sums: ``zfunc bench deepspeed`` compares.

    Differs from:
      DeepSpeed reduces at stages 0 and 1 once per step, and casts no inputs of float32
      unless told to.

    Examples:
      >>> config = {
      ...     "train_batch_size": 4,
      ...     "optimizer": {"type": "SGD", "params": {"lr": 0.1}},
      ... }
      >>> module = torch.nn.Linear(2, 1)
      >>> engine, _, _, _ = initialize(model=module, config=config)
      >>> loss = (engine(torch.ones(4, 2)) - 3).square().mean()
      >>> _ = engine.backward(loss)
      >>> engine.step()
      >>> engine.global_steps, engine.get_lr()
      (1, [0.1])
    """
    _check_taken(lr_scheduler, distributed_port, mpu, mesh_param, dist_init_required)
    source = _source(args, config, config_params)
    check_module(model)
    model_parameters = _trained(optimizer, model_parameters)
    setting = setting_of(source, optimizer)
    mesh = make_mesh({"data": int(os.environ.get("WORLD_SIZE", "1"))})
    engine = engine_of(model, setting, mesh, model_parameters)
    loader = _loader(training_data, collate_fn, setting, mesh)
    scheduler = SchedulerView(engine) if setting.has_scheduler else None
    return engine, OptimizerView(engine), loader, scheduler


def setting_of(
    source: Config,
    optimizer: Any = None,
    *,
    auto: Mapping[str, Any] | None = None,
    total_steps: int | None = None,
) -> Setting:
    """What an engine needs of a configuration.

    Args:
      source: The configuration.
      optimizer: As of ``initialize``.
      auto: Values for keys that say "auto".
      total_steps: Updates of the whole training, for schedules that need it.

    Raises:
      ConfigError: What is wrong with the configuration.
      CompatError: An optimizer that is not taken.
    """
    if isinstance(optimizer, torch.optim.Optimizer):
        source, optimizer = _with_section(source, optimizer), None
    made = interpret(source, auto=auto, total_steps=total_steps, optimizer=optimizer)
    half = made.precision != "fp32"
    paths = {entry.path for entry in made.entries}
    owns_rate = isinstance(optimizer, GradientTransformation)
    return Setting(
        tx=made.tx,
        transforms=tuple(
            t
            for t in made.transforms
            if not getattr(t, "__name__", "").startswith("accumulate(")
        ),
        zero=made.stage,
        accumulation=made.data.accumulation_steps,
        micro_batch=made.data.micro_batch_size,
        lr=None
        if owns_rate
        else lambda count: float(made.schedule(torch.tensor(count))),
        spec=made.shard.get("spec"),
        storage=made.shard.get("dtype", torch.float32 if half else None),
        compute=DTYPES[made.precision] if half else None,
        drop_last=made.data.drop_last,
        has_scheduler="scheduler.type" in paths,
    )


def engine_of(
    model: Any,
    setting: Setting,
    mesh: Mesh,
    model_parameters: Iterable[Any] | None = None,
) -> Engine:
    """An engine around a module, which is taken over.

    Args:
      model: The module.
      setting: From its configuration.
      mesh: All ranks, along "data".
      model_parameters: As of ``initialize``.
    """
    params, taken = take_over(model, model_parameters, mesh, setting.compute)
    state = shard(params, mesh, tx=setting.tx, spec=setting.spec, dtype=setting.storage)
    return Engine(taken, state, mesh, setting)


def init_distributed(dist_backend: str | None = None) -> None:
    """Join the job of torchrun, as ``initialize`` does when it is called.

    Args:
      dist_backend: None, or the backend that zfunc uses: gloo on CPUs, nccl on GPUs.

    Raises:
      CompatError: Another backend.

    Examples:
      >>> init_distributed()
    """
    ours = "nccl" if torch.cuda.is_available() else "gloo"
    if dist_backend not in (None, ours):
        raise CompatError(
            f"init_distributed: dist_backend is {dist_backend!r}, expected {ours!r} on "
            "this machine; leave it out"
        )
    make_mesh({"data": int(os.environ.get("WORLD_SIZE", "1"))})


def add_config_arguments(parser: argparse.ArgumentParser) -> argparse.ArgumentParser:
    """Add ``--deepspeed``, ``--deepspeed_config`` and ``--local_rank`` to a parser.

    Args:
      parser: The script's.

    Examples:
      >>> parser = add_config_arguments(argparse.ArgumentParser())
      >>> parser.parse_args(["--deepspeed_config", "ds.json"]).deepspeed_config
      'ds.json'
    """
    group = parser.add_argument_group("zfunc.compat")
    group.add_argument("--deepspeed", action="store_true", help="read by the script")
    group.add_argument("--deepspeed_config", help="the configuration's JSON file")
    if not any("--local_rank" in a.option_strings for a in parser._actions):
        group.add_argument("--local_rank", type=int, default=-1, help="not needed")
    return parser


def _check_taken(scheduler: Any, port: Any, mpu: Any, mesh: Any, init: Any) -> None:
    refused = [
        (
            scheduler is not None,
            'lr_scheduler: write it as the section "scheduler" of the configuration, '
            "or give an optimizer that is a function of zf.optim's schedules",
        ),
        (port != _PORT, "distributed_port: torchrun --master-port says it"),
        (mpu is not None, "mpu: there is no model parallelism"),
        (mesh is not None, "mesh_param: all ranks are along the axis 'data'"),
        (
            init not in (None, True, False),
            f"dist_init_required: got {init!r}, expected True, False or None",
        ),
    ]
    problems = [text for is_wrong, text in refused if is_wrong]
    if problems:
        raise CompatError("initialize cannot take\n  " + "\n  ".join(problems))


def _source(args: Any, config: Any, config_params: Any) -> Config:
    from_args = getattr(args, "deepspeed_config", None)
    given = [x for x in (config, config_params, from_args) if x is not None]
    if not given:
        raise CompatError(
            "initialize: there is no configuration: give config=, a dict or the path "
            "of a JSON file (or args with deepspeed_config)"
        )
    if any(other != given[0] for other in given[1:]):
        raise CompatError(
            "initialize: config, config_params and args.deepspeed_config are not the "
            "same: give one of them"
        )
    found: Config = given[0]
    return found


def _trained(optimizer: Any, given: Iterable[Any] | None) -> Iterable[Any] | None:
    """The parameters that are trained; an optimizer of torch says it too."""
    if not isinstance(optimizer, torch.optim.Optimizer):
        return given
    if optimizer.state:
        raise CompatError(
            "initialize: the optimizer has taken steps, and its moments would be lost: "
            "give one that is new"
        )
    theirs = [p for group in optimizer.param_groups for p in group["params"]]
    listed = theirs if given is None else list(given)
    if {id(p) for p in listed if getattr(p, "requires_grad", True)} != {
        id(p) for p in theirs if p.requires_grad
    }:
        raise CompatError(
            "initialize: model_parameters are not those of the optimizer: leave them "
            "out, and the optimizer's are trained"
        )
    return listed


def _with_section(source: Config, optimizer: torch.optim.Optimizer) -> Config:
    """The configuration with torch's optimizer as its section ``optimizer``."""
    kind = type(optimizer)
    if kind not in _SECTIONS or len(optimizer.param_groups) != 1:
        known = ", ".join(each.__name__ for each in _SECTIONS)
        raise CompatError(
            f"initialize: optimizer is a {kind.__name__} with "
            f"{len(optimizer.param_groups)} groups, expected one of torch.optim's "
            f"{known} with one group, or a GradientTransformation of zf.optim (masks "
            "are its groups)"
        )
    raw = dict(read(source)[1])
    if "optimizer" in raw:
        raise CompatError(
            "initialize: there is an optimizer in the arguments and one in the "
            "configuration: leave one of them out"
        )
    name, extra = _SECTIONS[kind]
    group = optimizer.param_groups[0]
    params = {k: v for k, v in group.items() if k not in ("params", "initial_lr")}
    params.pop("decoupled_weight_decay", None)
    params = {k: v for k, v in params.items() if v is not None}
    return {**raw, "optimizer": {"type": name, "params": {**params, **extra}}}


def _loader(data: Any, collate: Any, setting: Setting, mesh: Mesh) -> Any:
    if data is None:
        if collate is not None:
            raise CompatError("initialize: collate_fn is for training_data")
        return None
    if not isinstance(data, Dataset) or isinstance(data, IterableDataset):
        raise CompatError(
            f"initialize: training_data is a {type(data).__name__}, expected a torch "
            "Dataset with a length; make a DataLoader of others yourself"
        )
    sampler: Any = DistributedSampler(data, mesh.size, int(mesh.rank))
    return DataLoader(
        data,
        setting.micro_batch,
        sampler=sampler,
        collate_fn=collate,
        drop_last=setting.drop_last,
    )
