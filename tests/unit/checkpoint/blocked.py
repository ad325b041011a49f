# SPDX-License-Identifier: Apache-2.0
"""How long a step waits for a save, in this thread and in the background; prints it.

    python -m tests.unit.checkpoint.blocked --mib 200

The state has that many MiB in all: parameters, gradients and two moments. Runs on one
rank and on two, on the file system of --folder (the default for temporary files).
"""

import argparse
import statistics
import sys
import tempfile
import time
from pathlib import Path

import torch

import zfunc as zf
from tests.unit.checkpoint.kills import ended, forked, joined
from zfunc.checkpoint import save, save_async
from zfunc.core.tree import tree_leaves

LEAVES, ROUNDS, TREES = 8, 5, 4


def total(params, batch):
    return sum((x * batch).square().sum() for x in params.values())


def milliseconds(fn):
    start_s = time.perf_counter()
    result = fn()
    return 1e3 * (time.perf_counter() - start_s), result


def measured(rank, world, folder, mib, report):
    mesh, tx = joined(rank, world, folder / "store"), zf.optim.adamw(1e-3)
    rows = mib * 2**20 // (4 * TREES * LEAVES * 1024)
    params = {f"w{i}": torch.ones(rows, 1024) for i in range(LEAVES)}
    state, batch = zf.shard(params, mesh, tx=tx), torch.ones(())
    step = zf.donate(zf.train_step(total, tx, zf.partition(zero=1)))
    state = step(state, batch)
    times = {"save": [], "save_async": [], "written after": []}
    for _ in range(ROUNDS):
        state = step(state, batch)
        times["save"].append(milliseconds(lambda: save(folder / "a", state))[0])  # noqa: B023
        state = step(state, batch)
        blocked, pending = milliseconds(lambda: save_async(folder / "b", state))  # noqa: B023
        waited, _ = milliseconds(pending.wait)
        times["save_async"].append(blocked)
        times["written after"].append(blocked + waited)
    size = sum(x.numel() * x.element_size() for x in tree_leaves(state)) / 2**20
    medians = {name: statistics.median(values[1:]) for name, values in times.items()}
    if rank == 0:
        report.write_text(
            f"{world} ranks, {size:.0f} MiB on each: save blocks "
            f"{medians['save']:.0f} ms, save_async {medians['save_async']:.0f} ms "
            f"(written after {medians['written after']:.0f} ms); "
            f"ratio {medians['save'] / medians['save_async']:.0f}"
        )


def main(arguments=None):
    parser = argparse.ArgumentParser()
    parser.add_argument("--mib", type=int, default=200)
    parser.add_argument("--folder", type=Path, default=None)
    options = parser.parse_args(arguments)
    for world in (1, 2):
        with tempfile.TemporaryDirectory(dir=options.folder) as made:
            folder = Path(made)
            report = folder / "report"
            ended(
                [
                    forked(measured, rank, world, folder, options.mib, report)
                    for rank in range(world)
                ],
                300,
            )
            print(report.read_text())
    return 0


if __name__ == "__main__":
    sys.exit(main())
