# SPDX-License-Identifier: Apache-2.0
"""Per-layer remat: each layer as a closed function of its own parameters and inputs."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch.func import functional_call

from zfunc.models.hf.errors import ModelError
from zfunc.models.hf.private import Rebinding, on_meta


def with_blocks(
    module: torch.nn.Module, remat: Callable[..., Any], model_type: str
) -> torch.nn.Module:
    """A copy whose layers run as ``remat(block)`` of their parameters and inputs.

    Raises:
      ModelError: the model has no list of layers.
    """
    copied = on_meta(module)
    layers = _layers(copied)
    if not layers:
        raise ModelError(
            f"remat: found no list of layers in {type(module).__name__}: apply "
            "zf.remat in a loss of your own (zf.models.from_module)."
        )
    for layer in layers:
        # The block runs a twin: the layer's own forward is what calls the block.
        block = remat(_block_of(on_meta(layer), model_type))
        layer.forward = functools.partial(_forward, layer, block)
    return copied


def _layers(module: torch.nn.Module) -> list[torch.nn.Module]:
    """The outermost elements of lists that transformers could checkpoint."""
    from transformers.modeling_layers import GradientCheckpointingLayer as Layer

    found: list[torch.nn.Module] = []
    for child in module.children():
        if isinstance(child, torch.nn.ModuleList) and all(
            isinstance(part, Layer) for part in child
        ):
            found += list(child)
        else:
            found += _layers(child)
    return found


def _block_of(twin: torch.nn.Module, model_type: str) -> Callable[..., Any]:
    def block(weights: Any, buffers: Any, args: Any, kwargs: Any) -> Any:
        with Rebinding(model_type):
            return functional_call(twin, (weights, buffers), args, kwargs)

    block.__name__ = type(twin).__name__
    return block


def _forward(
    layer: torch.nn.Module, block: Callable[..., Any], *args: Any, **kwargs: Any
) -> Any:
    """The layer's forward: whatever tensors it holds now go to the block."""
    weights, buffers = dict(layer.named_parameters()), dict(layer.named_buffers())
    return block(weights, buffers, args, kwargs)
