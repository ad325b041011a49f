# SPDX-License-Identifier: Apache-2.0
"""A whole benchmark, as one rank of its job."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import warnings
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.distributed as dist

import zfunc as zf
from zfunc.bench.contenders import Choice
from zfunc.bench.memory import peak_rss_bytes
from zfunc.bench.presets import Preset, batches
from zfunc.bench.result import Measured, Result, loss_difference, ratios
from zfunc.bench.rounds import start, time_round
from zfunc.bench.setup import Setup
from zfunc.launch import Job


class Plan(NamedTuple):
    """What is measured, and how often.

    Attributes:
      preset: The model and its batch.
      threads: Of each rank.
      rounds: Passes over all contenders.
      steps: Steps whose losses are compared, and timed steps of each round.
      warmup: Steps before the timed ones of each round.
    """

    preset: Preset
    threads: int
    rounds: int
    steps: int
    warmup: int


def run(
    plan: Plan,
    choice: Choice,
    job: Job,
    tell: Callable[[str], None] = lambda line: None,
) -> Result:
    """Measure every contender, one after the other, in rounds.

    Args:
      plan: What is measured, and how often.
      choice: Who takes part.
      job: This rank's place.
      tell: Told what is being done, in a few words.

    Returns:
      The same numbers on every rank.
    """
    _prepare(plan.threads)
    # Joins the job; contenders find the process group that it makes.
    device = zf.make_mesh({"data": job.world}).device
    setup = Setup(plan.preset, job.world, device)
    mine = batches(plan.preset, plan.steps, job.rank, device)
    started = []
    for contender in choice.contenders:
        tell(f"losses of {contender.name}")
        started.append(start(contender, setup, mine))
    rounds = []
    for number in range(plan.rounds):
        tell(f"round {number + 1} of {plan.rounds}")
        rounds.append(time_round(started, mine, number, plan.warmup))
    measured = tuple(
        Measured(
            s.name,
            s.losses,
            tuple(tuple(times_s[s.name]) for times_s in rounds),
            s.live_peak_bytes,
        )
        for s in started
    )
    peers = {contender.name: contender.peers for contender in choice.contenders}
    return Result(
        about(plan, job.world, device),
        measured,
        ratios(measured, peers),
        loss_difference(measured),
        _most(peak_rss_bytes(), device),
        choice.left_out,
    )


def about(plan: Plan, world: int, device: torch.device) -> dict[str, Any]:
    """What the numbers are of: they mean nothing without it.

    Args:
      plan: What is measured.
      world: Number of ranks.
      device: Of this rank.
    """
    setup = Setup(plan.preset, world, torch.device("cpu"))
    libraries = ("zfunc-torch", "torch", "transformers", "deepspeed")
    return {
        "model": plan.preset._asdict(),
        "num_params": sum(p.numel() for p in setup.model().parameters()),
        "adamw": setup.adamw._asdict(),
        "ranks": world,
        "threads": plan.threads,
        "rounds": plan.rounds,
        "steps": plan.steps,
        "warmup": plan.warmup,
        "device": torch.cuda.get_device_name() if device.type == "cuda" else "cpu",
        "versions": {name: _version(name) for name in libraries},
        "python": platform.python_version(),
    }


def _version(distribution: str) -> str | None:
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return None


def _prepare(threads: int) -> None:
    torch.set_num_threads(threads)
    # Read by DeepSpeed when it is imported, which transformers may do.
    if not torch.cuda.is_available():
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    # Engines call what torch has renamed since, at every step: printing that would
    # be a part of their time.
    warnings.filterwarnings("ignore", category=FutureWarning)


def _most(value: int, device: torch.device) -> int:
    most = torch.tensor(value, device=device)
    if dist.is_initialized():
        dist.all_reduce(most, dist.ReduceOp.MAX)
    return int(most)
