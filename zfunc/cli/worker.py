# SPDX-License-Identifier: Apache-2.0
"""One rank of ``zfunc train``: from the configuration to the last file."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from pydantic import ValidationError
from rich.console import Console

import zfunc as zf
from zfunc import checkpoint
from zfunc.cli.closing import finish
from zfunc.cli.config import TrainConfig, conflicts
from zfunc.cli.corpus import Corpus, open_corpus
from zfunc.cli.display import make_console, make_display
from zfunc.cli.errors import UsageError
from zfunc.cli.hashes import HashesFile
from zfunc.cli.loop import Progress, Training, train
from zfunc.cli.metrics import MetricsFile
from zfunc.cli.observer import Observer, Reporter, Silent
from zfunc.cli.program import first_state, sharded_step
from zfunc.cli.report import measured_bytes
from zfunc.cli.rundir import RunDir
from zfunc.data import Cursor, Loader
from zfunc.launch import Job, StopRequest
from zfunc.models import gpt


def run_rank(config: TrainConfig, run: RunDir, job: Job, *, resume: bool) -> int:
    """Train, as one rank of a job; rank 0 has prepared the directory of the run.

    Args:
      config: Of the run; ``nproc`` is the size of the job.
      run: Its directory.
      job: This rank's place.
      resume: Whether to go on from the newest checkpoint.

    Returns:
      0, or 128 + n if signal n stopped the training, which is then saved.

    Raises:
      UsageError: The text or the checkpoint cannot be used; the training diverged.
    """
    corpus = open_corpus(config.data)
    mesh = zf.make_mesh({"data": job.world})
    try:
        training = training_of(config, run, corpus, mesh)
        start = Progress(first_state(config, mesh), Cursor(seed=config.seed))
        console = make_console() if job.is_first else None
        if resume:
            start = _restored(training, start, run, console)
        if console is not None:
            _introduce(console, training, corpus, start.step)
        observing = _observer(console, training, run, start)
        # Only here: a rank that waits for the others to start must die when told to.
        with StopRequest() as stop, observing as observer:
            end, stopped_by = train(training, start, observer, lambda: stop.signal)
        if not stopped_by:
            finish(training, corpus, end, run, console)
        else:
            _say_stopped(console, run, end.step, mesh)
        return 128 + stopped_by if stopped_by else 0
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()


def training_of(
    config: TrainConfig, run: RunDir, corpus: Corpus, mesh: zf.Mesh
) -> Training:
    """What a run consists of, for this rank."""
    loader = Loader(
        corpus.train,
        seq_len=config.seq_len,
        global_batch=config.batch_size,
        rank=int(mesh.rank),
        world=mesh.size,
    )
    meta = {"config": config.model_dump(mode="json"), "data_sha256": corpus.sha256()}
    return Training(config, mesh, loader, run.checkpoints, meta)


def _restored(
    training: Training, fresh: Progress, run: RunDir, console: Console | None
) -> Progress:
    """The newest checkpoint that is whole, placed like the fresh state.

    Damaged ones are passed over, said, and renamed: the run comes to them again.
    """
    root = training.checkpoints
    try:
        newest = checkpoint.restore_newest(root, scaled(training.config, fresh.state))
    except zf.CheckpointError as error:
        raise UsageError(
            f"--resume: {error}\n(A checkpoint that is moved out of {root} is not "
            "looked at: --resume then goes on from the one before it.)"
        ) from error
    _check_origin(root, training, newest.restored.meta)
    if console is not None:
        for damage in newest.damaged:
            moved = run.set_aside(damage.path)
            console.print(
                f"passed over: {damage.why}\n  (it is {moved.name} now)",
                markup=False,
                soft_wrap=True,
            )
    return Progress(newest.restored.state, Cursor(**newest.restored.cursor))


def scaled(config: TrainConfig, state: zf.TrainState) -> zf.TrainState:
    """A first state with the loss scale of the run's step, as a checkpoint has it."""
    return state.replace(loss_scale=sharded_step(config).loss_scale_of(state))


def _check_origin(root: Path, training: Training, meta: dict[str, Any]) -> None:
    """The checkpoint is of this configuration and of these bytes."""
    try:
        stored = TrainConfig.model_validate(meta.get("config"))
    except ValidationError as error:
        raise UsageError(
            f"--resume: the checkpoint in {root} was not saved by zfunc train"
        ) from error
    differing = conflicts(stored, training.config.model_dump(exclude={"data"}))
    if differing:
        lines = "".join(f"\n  {problem.what}: not so there" for problem in differing)
        raise UsageError(
            f"--resume: the checkpoint in {root} is of another run:{lines}"
        )
    if meta.get("data_sha256") != training.meta["data_sha256"]:
        raise UsageError(
            f"--resume: the text has changed since the checkpoint in {root} was saved: "
            "give --data as it was, or start another run"
        )


def _observer(
    console: Console | None, training: Training, run: RunDir, start: Progress
) -> Observer:
    if console is None:
        return Silent()
    state = start.state
    per_rank = measured_bytes((state.params, state.grads, state.moments)).per_rank
    steps = training.config.steps
    display = make_display(console, steps, start.step, per_rank / 1e6)
    metrics = MetricsFile(run.metrics, start.step)
    return Reporter(metrics, HashesFile(run.hashes, start.step), display)


def _introduce(console: Console, training: Training, corpus: Corpus, step: int) -> None:
    config, mesh = training.config, training.mesh
    ranks = f"{mesh.size} {mesh.device_type} rank{'s' * (mesh.size > 1)}"
    console.print(
        f"{gpt.num_params(config.model):,} parameters on {ranks}, ZeRO {config.zero}, "
        f"{config.precision}"
    )
    console.print(
        f"{len(corpus.train):,} bytes to train on and {len(corpus.validation):,} to "
        f"validate with, from {corpus.name}",
        soft_wrap=True,
    )
    if step:
        console.print(f"going on after step {step} of {config.steps}")


def _say_stopped(
    console: Console | None, run: RunDir, step: int, mesh: zf.Mesh
) -> None:
    if console is not None:
        console.print(
            f"stopped after step {step}, which is saved; go on with:\n"
            f"  {run.resume_command}",
            markup=False,
            soft_wrap=True,
        )
    # The first rank to leave has torchrun stop the others: not before this is said.
    float(zf.psum(torch.zeros((), device=mesh.device), "data", mesh))
