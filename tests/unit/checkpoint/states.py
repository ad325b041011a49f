# SPDX-License-Identifier: Apache-2.0
"""States to save, and bitwise comparison."""

import hashlib
import json
import math
import sys
from pathlib import Path

import torch

import zfunc as zf
from zfunc.checkpoint.files import tensor_bytes
from zfunc.checkpoint.leaves import buffer_of, named_leaves
from zfunc.core.mesh import Mesh
from zfunc.core.sharding import NamedSharding, place
from zfunc.core.state import TrainState
from zfunc.core.tree import tree_structure

MESH = {"data": 1}


def parameters(seed=0, dtype=torch.float32):
    """Uneven, empty, scalar and many-dimensional leaves."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(shape, generator=generator).to(dtype)

    return {
        "layers": [{"w": normal(7, 5), "b": normal(5)}, {"w": normal(5, 3)}],
        "empty": normal(0, 3),
        "scale": normal(),
        "cube": normal(3, 2, 4),
    }


def loss(params, batch):
    hidden = torch.tanh(batch @ params["layers"][0]["w"] + params["layers"][0]["b"])
    out = hidden @ params["layers"][1]["w"] * params["scale"]
    return out.square().mean() + params["cube"].square().sum(), {"out": out.mean()}


def batch(step, rows=4):
    generator = torch.Generator().manual_seed(1000 + step)
    return torch.randn(rows, 7, generator=generator)


def made(seed=0, step=0, mesh=None, tx=None, **options) -> TrainState:
    mesh = zf.make_mesh(MESH) if mesh is None else mesh
    tx = zf.optim.adamw(1e-2) if tx is None else tx
    state = zf.shard(parameters(seed), mesh, tx=tx, key=11, **options)
    return state.replace(step=state.step + step)


def contents(state):
    """Dtype, shape and bytes of every leaf, by path."""
    return {
        path: (
            str(buffer_of(leaf).dtype),
            tuple(buffer_of(leaf).shape),
            bytes(tensor_bytes(buffer_of(leaf))),
        )
        for path, leaf in named_leaves(state).items()
    }


def assert_same(got, expected):
    assert tree_structure(got) == tree_structure(expected)
    one, two = contents(got), contents(expected)
    assert [path for path in two if one[path] != two[path]] == []


def state_on(axes, rank, full, placements, kind="process"):
    """What a rank of a mesh holds, without the other ranks."""
    mesh = Mesh(axes, kind, rank=rank)
    params = [
        place(x, NamedSharding(mesh, spec))
        for x, spec in zip(full, placements, strict=True)
    ]
    count = torch.tensor(3)
    fresh = zf.shard(torch.zeros(1), zf.make_mesh({}))
    return fresh.replace(step=count, params=params, grads={}, moments=(), key=count)


def saved_by_ranks(root, axes, full, placements):
    """A checkpoint as the ranks of a mesh would save it, one after the other."""
    saving = sys.modules["zfunc.checkpoint.save"]
    drafting = sys.modules["zfunc.checkpoint.draft"]
    size = math.prod(n for _, n in axes)
    states = [state_on(axes, rank, full, placements) for rank in range(size)]
    drafts = [
        drafting.drafted(s, Mesh(axes, "process", rank=r), None, None)
        for r, s in enumerate(states)
    ]
    assert len({str(drafting.digests(draft, None)) for draft in drafts}) == 1
    saving._prepare(root, drafts[0])
    files = []
    for rank, draft in enumerate(drafts):
        files.append(saving._write(root, draft, Mesh(axes, "process", rank=rank))[1])
    return saving._commit(root, drafts[0], files, Mesh(axes, "process", rank=0))[0]


def edit_manifest(directory: Path, change):
    """Apply ``change`` to the manifest's JSON in place, with a hash that fits."""
    path = directory / "manifest.json"
    tree = json.loads(path.read_text())
    change(tree)
    path.write_text(with_its_hash(tree))


def with_its_hash(tree):
    """The text of a manifest whose author knows about its hash."""
    rest = {name: tree[name] for name in tree if name != "manifest_sha256"}
    text = json.dumps(rest, separators=(",", ":"), ensure_ascii=False)
    digest = hashlib.sha256(text.encode()).hexdigest()
    return json.dumps({**rest, "manifest_sha256": digest}) + "\n"


def everything(root: Path):
    """Names and bytes of all that is below a directory."""
    return {
        str(path.relative_to(root)): path.read_bytes() if path.is_file() else None
        for path in sorted(root.rglob("*"))
    }


def message_of(fn, *args, **options):
    """The error of a checkpoint, "" if there is none."""
    try:
        fn(*args, **options)
    except zf.CheckpointError as error:
        return str(error)
    return ""
