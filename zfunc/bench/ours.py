# SPDX-License-Identifier: Apache-2.0
"""zfunc's own steps: a jitted function of the state, the module left as it is."""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch.func import functional_call

import zfunc as zf
from zfunc.bench.setup import Setup, Step


def sharded(
    setup: Setup, zero: Literal[0, 1, 2, 3], backend: Literal["aten", "inductor"]
) -> Step:
    """A ZeRO stage over all ranks.

    Args:
      setup: What all contenders share.
      zero: The stage.
      backend: What runs the traced step.
    """
    mesh = zf.make_mesh({"data": setup.world}, device=_kind(setup))
    step = _train_step(setup, zf.partition(zero=zero))
    return _stepping(setup, step, mesh, zf.P() if zero == 0 else None, backend)


def alone(setup: Setup, backend: Literal["aten", "inductor"]) -> Step:
    """One process.

    Args:
      setup: What all contenders share.
      backend: What runs the traced step.
    """
    mesh = zf.make_mesh({}, device=_kind(setup))
    return _stepping(setup, _train_step(setup), mesh, None, backend)


def _kind(setup: Setup) -> Literal["cpu", "cuda"]:
    return "cuda" if setup.device.type == "cuda" else "cpu"


def _train_step(setup: Setup, *transforms: zf.Transform) -> Any:
    model = setup.model().to("meta")  # only its code is used: sizes without memory
    buffers = dict(setup.model().named_buffers())

    def loss_fn(params: Any, ids: torch.Tensor) -> torch.Tensor:
        given = {"input_ids": ids, "labels": ids}
        return functional_call(model, (params, buffers), (), given).loss  # type: ignore[no-any-return]

    (b1, b2), adamw = setup.adamw.betas, setup.adamw
    tx = zf.optim.adamw(adamw.lr, b1, b2, adamw.eps, adamw.weight_decay)
    return zf.train_step(loss_fn, tx, *transforms)


def _stepping(setup: Setup, step: Any, mesh: zf.Mesh, spec: Any, backend: Any) -> Step:
    jitted = zf.jit(step, backend=backend)
    params = {name: p.detach() for name, p in setup.model().named_parameters()}
    state = zf.shard(params, mesh, spec=spec)
    del params

    def run(ids: torch.Tensor) -> torch.Tensor:
        nonlocal state
        state = jitted(state, ids)
        return state.metrics.loss

    return run
