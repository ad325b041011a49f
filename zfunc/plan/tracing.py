# SPDX-License-Identifier: Apache-2.0
"""The program of a real step on an abstract mesh: no ranks, no weights, no memory."""

from __future__ import annotations

from types import MappingProxyType
from typing import Final, Literal, NamedTuple

import torch
from torch._subclasses import FakeTensorMode

from zfunc.core.mesh import AbstractMesh
from zfunc.core.sharding import P
from zfunc.core.state import shard
from zfunc.core.step import train_step
from zfunc.core.tree import tree_map
from zfunc.optim import adamw, chain, clip_by_global_norm
from zfunc.plan.models import Model
from zfunc.plan.request import Request
from zfunc.program import passes
from zfunc.program.jit import jit
from zfunc.program.program import Pass, Program
from zfunc.transforms.accumulate import accumulate
from zfunc.transforms.partition import partition
from zfunc.transforms.precision import precision
from zfunc.transforms.remat import remat

Zero = Literal[0, 1, 2, 3]
_DTYPES: Final = MappingProxyType({"bf16": torch.bfloat16, "fp32": torch.float32})


def passes_of(*, late: bool = False) -> tuple[Pass, ...]:
    """The passes of a plan: those of ``zf.jit``, small tensors by themselves.

    Buckets, gathers that are kept, and chunks of an update put the small tensors of
    many layers together as far as they fit. Such a program has no part that repeats
    with each layer, and small tensors are a small part of it: norms, biases.

    Args:
      late: Leave reductions where the step has them, after the backward.
    """
    without = {"bucketed", "keep_small"} | ({"scatter_early"} if late else set())
    alone = {"batch_updates": passes.batch_updates(joined_numel=1)}
    return tuple(
        alone.get(p.__name__, p) for p in passes.DEFAULT if p.__name__ not in without
    )


class Lowered(NamedTuple):
    """The program of a step, and the same before its updates were batched."""

    program: Program
    unbatched: Program


def lower(
    model: Model,
    request: Request,
    zero: Zero,
    depth: int | None,
    *,
    chosen: tuple[Pass, ...] | None = None,
) -> Lowered:
    """The traced step of a model of some depth, after the passes of a plan.

    Args:
      model: What is trained, with AdamW and clipping as ``zfunc train`` does.
      request: Sizes and precision.
      zero: The stage.
      depth: Number of layers; None for a model that has no such number.
      chosen: Other passes than ``passes_of()``.
    """
    tx = chain(clip_by_global_norm(1.0), adamw(3e-4))
    built = model.build(depth, request.seq_len, remat if request.remat else None)
    step = train_step(
        built.loss,
        tx,
        partition(zero=zero, reduce_dtype=_DTYPES[request.reduce]),
        precision(request.precision),
        accumulate(request.microbatches),
    )
    mesh, spec = AbstractMesh({"data": request.ranks}), P("data") if zero else P()
    with FakeTensorMode(allow_non_fake_inputs=True):
        params = tree_map(lambda x: torch.empty(x.shape, dtype=x.dtype), built.params)
        state = shard(params, mesh, tx=tx, spec=spec, dtype=torch.float32)
        batch = built.batch(request.samples_per_rank, request.seq_len)
        batch = tree_map(lambda x: torch.empty(x.shape, dtype=x.dtype), batch)
    unbatched: list[Program] = []

    def keep(program: Program) -> Program:
        unbatched.append(program)
        return program

    selected = passes_of() if chosen is None else chosen
    names = [p.__name__ for p in selected]
    here = names.index("batch_updates") if "batch_updates" in names else len(names)
    compiled = jit(step, passes=(*selected[:here], keep, *selected[here:]))
    return Lowered(compiled.lower(state, batch), unbatched[0])
