# SPDX-License-Identifier: Apache-2.0
"""The directory of a run: where its files are, and whether a run may begin there."""

from __future__ import annotations

import itertools
import json
import os
import shlex
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from pydantic import ValidationError

from zfunc import checkpoint
from zfunc.checkpoint.files import fsync_directory
from zfunc.cli.config import TrainConfig
from zfunc.cli.errors import Problem, UsageError
from zfunc.core.errors import CheckpointError


@dataclass(frozen=True)
class RunDir:
    """Where a run keeps its files.

    Examples:
      >>> RunDir(Path("runs/demo")).resume_command
      'zfunc train --resume --out runs/demo'
    """

    root: Path

    @property
    def config(self) -> Path:
        """The configuration, JSON."""
        return self.root / "config.json"

    @property
    def metrics(self) -> Path:
        """One row per step, CSV."""
        return self.root / "metrics.csv"

    @property
    def hashes(self) -> Path:
        """Hashes of the state, JSON lines."""
        return self.root / "hashes.jsonl"

    @property
    def checkpoints(self) -> Path:
        """The root of the checkpoints."""
        return self.root / "checkpoints"

    @property
    def plot(self) -> Path:
        """The loss over the steps, PNG."""
        return self.root / "loss.png"

    @property
    def sample(self) -> Path:
        """The generated text."""
        return self.root / "sample.txt"

    @property
    def summary(self) -> Path:
        """The figures of the closing table, JSON."""
        return self.root / "summary.json"

    @property
    def resume_command(self) -> str:
        """What to type to go on with this run."""
        return shlex.join(["zfunc", "train", "--resume", "--out", str(self.root)])

    def files(self) -> tuple[Path, ...]:
        """All that a run writes."""
        single = (self.config, self.metrics, self.plot, self.sample, self.summary)
        return (*single, self.hashes, self.checkpoints)

    def fresh_problems(self, *, overwrite: bool) -> Iterator[Problem]:
        """What stands in the way of a new run here; nothing is written."""
        what = f"--out {self.root}"
        yield from self._place_problems()
        if not self.root.is_dir() or not any(self.root.iterdir()):
            return
        if not self._looks_like_a_run():  # what --overwrite deletes must be a run's
            yield Problem(what, "is not empty, and not a run: give another directory")
        elif not overwrite:
            yield Problem(
                what,
                "has a run already: go on with --resume, or delete it and start again "
                "with --overwrite",
            )

    def stored_config(self) -> TrainConfig:
        """The configuration of the run that is here.

        Raises:
          UsageError: There is none, or it cannot be read.
        """
        try:
            return TrainConfig.model_validate_json(self.config.read_bytes())
        except FileNotFoundError:
            why = f"has no run to resume ({self.config} is missing): leave out --resume"
        except OSError as error:
            why = f"{self.config} cannot be read: {error.strerror}"
        except ValidationError as error:
            fields = ", ".join(".".join(map(str, e["loc"])) for e in error.errors())
            why = f"{self.config} is damaged or of another version ({fields})"
        raise UsageError([Problem(f"--resume --out {self.root}", why)])

    def resume_problems(self) -> Iterator[Problem]:
        """What stands in the way of going on with the run that is here."""
        yield from self._place_problems()
        try:
            newest = checkpoint.latest(self.checkpoints)
        except CheckpointError as error:
            yield Problem(f"--resume --out {self.root}", str(error))
            return
        if newest is None:
            yield Problem(
                f"--resume --out {self.root}",
                f"no complete checkpoint in {self.checkpoints}: start again with "
                "--overwrite",
            )

    def prepare(self, config: TrainConfig, *, overwrite: bool) -> None:
        """Make the directory, without an older run's files if asked, and its config.

        Raises:
          UsageError: The directory cannot be written.
        """
        try:
            self.root.mkdir(parents=True, exist_ok=True)
            if overwrite:
                for path in set(self.files()) - {self.config}:
                    if path.is_dir() and not path.is_symlink():
                        shutil.rmtree(path)
                    else:
                        path.unlink(missing_ok=True)
            text = config.model_dump_json(indent=2) + "\n"
            write_atomically(self.config, text)
        except OSError as error:
            why = f"cannot be written: {error.strerror or error}"
            raise UsageError([Problem(f"--out {self.root}", why)]) from error

    def set_aside(self, damaged: Path) -> Path:
        """Give a damaged checkpoint a name that does not count, and return it.

        The run comes to its step again, and saves it.

        Raises:
          UsageError: It cannot be renamed.
        """
        names = itertools.chain([""], (f"-{i}" for i in itertools.count(2)))
        free = (damaged.with_name(f"damaged-{damaged.name}{n}") for n in names)
        target = next(path for path in free if not os.path.lexists(path))
        try:
            os.rename(damaged, target)
            fsync_directory(target.parent)
        except OSError as error:
            raise UsageError(
                f"--resume: {damaged} is damaged and cannot be renamed: "
                f"{error.strerror or error}"
            ) from error
        return target

    def latest_checkpoint(self) -> Path | None:
        """The newest complete checkpoint."""
        return checkpoint.latest(self.checkpoints)

    def _looks_like_a_run(self) -> bool:
        try:
            stored = json.loads(self.config.read_bytes())
        except (OSError, ValueError):
            return False
        return isinstance(stored, dict) and {"zero", "microbatches"} <= stored.keys()

    def _place_problems(self) -> Iterator[Problem]:
        what = f"--out {self.root}"
        place = self.root
        while not os.path.lexists(place) and place != place.parent:
            place = place.parent
        if not place.is_dir():
            yield Problem(what, f"{place} is not a directory")
        elif not os.access(place, os.W_OK | os.X_OK):
            yield Problem(what, f"{place} cannot be written to")


def write_atomically(path: Path, text: str) -> None:
    """Write a small file: after a crash it is the old one or the new one.

    Args:
      path: The file; its directory exists.
      text: All of it.
    """
    temporary = path.with_name(f".{path.name}.tmp")
    with temporary.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)
