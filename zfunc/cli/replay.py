# SPDX-License-Identifier: Apache-2.0
"""``zfunc replay``: steps of a run once more, compared with what the run recorded."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import torch.distributed as dist
import typer
from rich.console import Console

import zfunc as zf
from zfunc import checkpoint
from zfunc.checkpoint.find import is_step_name
from zfunc.checkpoint.manifest import Manifest, read_manifest, step_name
from zfunc.cli.config import TrainConfig, conflicts
from zfunc.cli.corpus import open_corpus
from zfunc.cli.display import make_console
from zfunc.cli.ending import explain, print_error
from zfunc.cli.errors import Problem, UsageError
from zfunc.cli.hashes import Hashes, hashed_leaves, hashes_of, named, read_hashes
from zfunc.cli.loop import Progress, Training
from zfunc.cli.metrics import Row, read_rows
from zfunc.cli.program import compiled_step, first_state
from zfunc.cli.rundir import RunDir
from zfunc.cli.verify import on_device
from zfunc.cli.worker import scaled, training_of
from zfunc.data import Cursor
from zfunc.launch import Job, current_job, guarded, torchrun

PATHS_SHOWN = 4
# Where and how a run computes may change when it is resumed: these are of the
# checkpoint after the steps, the rest is of the run.
_OF_THE_NEXT = ("nproc", "zero", "microbatches", "remat", "backend")


class ReplayDiffersError(zf.ZfuncError):
    """The steps came out otherwise: exit code 1.

    Examples:
      >>> str(ReplayDiffersError("differs at step 5: params/w"))
      'differs at step 5: params/w'
    """


@dataclass(frozen=True)
class Replay:
    """Which steps are repeated, and what the run recorded of them.

    ``rows`` and ``hashes`` are those after the checkpoint, and its own hashes.
    """

    run: RunDir
    path: Path
    manifest: Manifest
    steps: int
    config: TrainConfig
    rows: dict[int, Row]
    hashes: dict[int, Hashes]

    @property
    def first(self) -> int:
        """The step of the checkpoint."""
        return self.manifest.step

    @property
    def last(self) -> int:
        """The last step that is repeated."""
        return self.first + self.steps


def replay_command(
    path: Annotated[
        Path,
        typer.Argument(
            metavar="CKPT",
            help="A checkpoint of zfunc train: RUN/checkpoints/step-00000100.",
        ),
    ],
    steps: Annotated[
        int, typer.Option(min=1, help="How many of the steps after it to repeat.")
    ],
) -> None:
    """Repeat steps of a run from a checkpoint, and compare them bit for bit.

    The configuration, the text and the number of ranks are those of the run. What is
    compared: the loss and the gradient's norm of every step (metrics.csv), and each
    leaf of the state where the run hashed it (hashes.jsonl: every checkpoint, and every
    `--hash-every` steps).

    Ends with exit code 0 if all is equal, and 1 if not: then it names the first step
    and the leaves that differ. A difference means that the checkpoint, the
    configuration, the text, the program or the machine is not what it was, or that one
    of the two runs had an error. Nothing is written.
    """
    job = current_job()
    if job is None:
        raise typer.Exit(_launch(path, steps))
    raise typer.Exit(guarded(lambda: _rank(path, steps, job), usage=UsageError))


def _launch(path: Path, steps: int) -> int:
    stderr = Console(emoji=False, stderr=True, highlight=False, soft_wrap=True)
    try:
        replay = prepared(path, steps)
    except UsageError as error:
        print_error(stderr, str(error))
        return 2
    arguments = ["replay", str(path), f"--steps={steps}"]
    outcome = torchrun("zfunc.cli", arguments, replay.config.nproc)
    explain(stderr, outcome, "stopped before the end", ReplayDiffersError)
    return outcome.exit_code


def prepared(path: Path, steps: int) -> Replay:
    """What is to be repeated, as the run's files say.

    Args:
      path: The checkpoint's directory.
      steps: How many steps after it.

    Raises:
      UsageError: It is not a checkpoint of ``zfunc train``, or is damaged; the run
        recorded fewer steps after it.
    """
    path = path.absolute()
    run = RunDir(path.parent.parent)
    if not is_step_name(path.name):
        why = "is not a checkpoint: give RUN/checkpoints/step-..., see zf.checkpoint"
        raise UsageError([Problem(str(path), why)])
    if not run.config.exists():
        why = f"is not of zfunc train: there is no {run.config}"
        raise UsageError([Problem(str(path), why)])
    try:
        manifest, _ = read_manifest(path)
    except (zf.CheckpointError, OSError) as error:
        raise UsageError([Problem(str(path), str(error))]) from error
    rows = {row.step: row for row in read_rows(run.metrics) if row.step > manifest.step}
    recorded = next(s for s in range(manifest.step, 2**62) if s + 1 not in rows)
    if manifest.step + steps > recorded:
        more = recorded - manifest.step
        advice = f"type --steps {more}" if more else "give an older checkpoint"
        why = f"the run recorded {more} steps after step {manifest.step}: {advice}"
        raise UsageError([Problem(f"--steps {steps}", why)])
    hashes = {
        step: leaves
        for step, leaves in read_hashes(run.hashes, manifest.step + steps).items()
        if step >= manifest.step
    }
    config = _config_after(run, manifest.step)
    return Replay(run, path, manifest, steps, config, rows, hashes)


def _config_after(run: RunDir, step: int) -> TrainConfig:
    """The run's configuration, computed where and how the steps after ``step`` were."""
    config = run.stored_config()
    try:
        later = [s for s in checkpoint.list_steps(run.checkpoints) if s > step]
        if not later:
            return config
        manifest, _ = read_manifest(run.checkpoints / step_name(later[0]))
        stored = TrainConfig.model_validate(manifest.meta.get("config"))
    except (zf.CheckpointError, OSError, ValueError) as error:
        raise UsageError([Problem(str(run.checkpoints), str(error))]) from error
    update = {name: getattr(stored, name) for name in _OF_THE_NEXT}
    return config.model_copy(update=update)


def _rank(path: Path, steps: int, job: Job) -> int:
    replay = prepared(path, steps)
    config = replay.config
    if config.nproc != job.world:
        why = f"this job has {job.world} ranks, the run had {config.nproc}"
        raise UsageError([Problem(str(path), why)])
    console = make_console() if job.is_first else None
    corpus = open_corpus(config.data)
    mesh = zf.make_mesh({"data": job.world})
    try:
        training = training_of(config, replay.run, corpus, mesh)
        compared = repeated(replay, training)
        if console is not None:
            console.print(_equal(replay, compared), markup=False, soft_wrap=True)
        if dist.is_initialized():
            dist.barrier()  # the first rank to leave has torchrun stop the others
        return 0
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()


def repeated(replay: Replay, training: Training) -> int:
    """Take the steps again; every rank of the run calls this.

    Args:
      replay: What to repeat.
      training: The run.

    Returns:
      How many states were compared.

    Raises:
      ReplayDiffersError: Something is not as recorded: the first step, and where.
      UsageError: The checkpoint or the text cannot be used.
    """
    config, mesh = training.config, training.mesh
    here = _loaded(replay, training)
    _check_state(replay, here, mesh, " as it is loaded")
    step_fn = compiled_step(config)
    for step in range(replay.first + 1, replay.last + 1):
        batch, cursor = training.loader.next(here.cursor)
        here = Progress(step_fn(here.state, on_device(batch, mesh)), cursor)
        _check_state(replay, here, mesh, "")
        different = list(_other_numbers(replay.rows[step], here.state))
        if different:
            raise _differs(replay, step, "", different)
    return len(replay.hashes)


def _loaded(replay: Replay, training: Training) -> Progress:
    like = scaled(training.config, first_state(training.config, training.mesh))
    try:
        restored = checkpoint.restore(replay.path, like)
    except zf.CheckpointError as error:
        raise UsageError(str(error)) from error
    if restored.meta.get("data_sha256") != training.meta["data_sha256"]:
        raise UsageError(
            f"the text has changed since {replay.path} was saved: put it back where "
            "--data of the run was"
        )
    return Progress(restored.state, Cursor(**restored.cursor))


def _check_state(replay: Replay, here: Progress, mesh: zf.Mesh, when: str) -> None:
    """Compare each leaf with the hash of the run, if it made one at this step."""
    recorded = replay.hashes.get(here.step)
    if recorded is None:
        return
    paths = [path for path, _ in hashed_leaves(here.state)]
    found = named(paths, hashes_of(here.state, mesh))
    paths += [path for path in recorded if path not in found]
    different = [p for p in paths if found.get(p) != recorded.get(p)]
    if different:
        if not when:
            different += _other_numbers(replay.rows[here.step], here.state)
        raise _differs(replay, here.step, when, different)


def _other_numbers(row: Row, state: zf.TrainState) -> Iterator[str]:
    for name in ("loss", "grad_norm"):
        got, recorded = float(getattr(state.metrics, name).double()), getattr(row, name)
        if repr(got) != repr(recorded):  # nan, of a step that was skipped, is nan
            yield f"{name} is {got!r}, recorded {recorded!r}"


def _differs(
    replay: Replay, step: int, when: str, where: list[str]
) -> ReplayDiffersError:
    hidden = len(where) - PATHS_SHOWN
    shown = where[:PATHS_SHOWN] + ([f"... and {hidden} more"] if hidden > 0 else [])
    lines = [f"differs at step {step}{when}:", *(f"  {line}" for line in shown)]
    stored = TrainConfig.model_validate(replay.manifest.meta.get("config"))
    fields = replay.config.model_dump(exclude={"data"})
    for problem in conflicts(stored, fields):
        name = problem.what.split()[0].removeprefix("--").replace("-", "_")
        lines.append(
            f"  ({replay.run.config.name} says {problem.what}, the checkpoint "
            f"{getattr(stored, name)})"
        )
    return ReplayDiffersError("\n".join(lines))


def _equal(replay: Replay, num_states: int) -> str:
    first, last = replay.first + 1, replay.last
    steps = f"step {first}" if first == last else f"steps {first} to {last}"
    leaves = len(next(iter(replay.hashes.values()), {}))
    return (
        f"equal: {steps} bit for bit; {replay.steps} losses and gradient norms, "
        f"{num_states} states of {leaves} leaves"
    )
