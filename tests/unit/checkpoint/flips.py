# SPDX-License-Identifier: Apache-2.0
"""Checkpoints with one bit flipped, or cut short; prints how many were refused.

    python -m tests.unit.checkpoint.flips --flips 500 --truncations 100

The checkpoint is one of two ranks. A bit is chosen evenly among all bits of its files,
and every fifth time among those of the manifest. It must be refused, by an error that
names the file, before anything is loaded.
"""

import argparse
import collections
import contextlib
import random
import re
import sys
import tempfile
from pathlib import Path

import torch

import zfunc as zf
from tests.unit.checkpoint.states import contents, saved_by_ranks, state_on
from zfunc.checkpoint import DamagedError, restore
from zfunc.core.sharding import P

PLACEMENTS = [P("data"), P("data"), P()]
MANIFEST = "manifest.json"


def full_tensors():
    generator = torch.Generator().manual_seed(0)
    shapes = ((6, 4), (5,), (3, 3))
    return [torch.randn(shape, generator=generator) for shape in shapes]


def like():
    zeros = [torch.zeros_like(x) for x in full_tensors()]
    return state_on((("data", 1),), 0, zeros, PLACEMENTS, kind="local")


def made(root):
    return saved_by_ranks(root, (("data", 2),), full_tensors(), PLACEMENTS)


def flipped(whole, rng):
    bit = rng.randrange(8 * len(whole))
    changed = bytearray(whole)
    changed[bit // 8] ^= 1 << bit % 8
    return bytes(changed)


def cut(whole, rng):
    return whole[: rng.randrange(len(whole))]


def outcome(directory, path, given):
    """ "refused", or what happened instead."""
    before = contents(given)
    try:
        restore(directory, given)
    except DamagedError as error:
        named = str(path) in str(error)
        return "refused, the file named" if named else f"refused otherwise: {error}"
    except zf.CheckpointError as error:
        # A manifest of another version says that it is one.
        other = re.search("schema version", str(error)) and path.name == MANIFEST
        named = other and str(path) in str(error)
        return "refused, the file named" if named else f"refused otherwise: {error}"
    finally:
        if contents(given) != before:
            raise AssertionError("like has changed")
    return "LOADED"


def damaged(root, count, damage, seed=0):
    """Outcomes by kind of file, counted."""
    rng, given = random.Random(seed), like()
    directory = made(root)
    files = sorted(directory.iterdir())
    sizes = [path.stat().st_size for path in files]
    counts = collections.Counter()
    for i in range(count):
        path = rng.choices(files, sizes)[0] if i % 5 else directory / MANIFEST
        whole = path.read_bytes()
        path.write_bytes(damage(whole, rng))
        kind = "manifest" if path.name == MANIFEST else "data"
        counts[kind, outcome(directory, path, given)] += 1
        path.write_bytes(whole)
    restore(directory, given)  # whole again
    return counts


def main(arguments=None):
    parser = argparse.ArgumentParser()
    parser.add_argument("--flips", type=int, default=500)
    parser.add_argument("--truncations", type=int, default=100)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args(arguments)
    bad = 0
    with contextlib.ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        for name, count, damage in (
            ("single-bit flips", options.flips, flipped),
            ("truncations", options.truncations, cut),
        ):
            counts = damaged(folder / name, count, damage, options.seed)
            print(f"{count} {name}")
            for (kind, what), number in sorted(counts.items()):
                print(f"  {kind}: {what}: {number}")
                bad += number * (what != "refused, the file named")
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())
