# SPDX-License-Identifier: Apache-2.0
"""``from_hf``: a model of transformers as parameters and a loss."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch

from zfunc.models.hf.birth import Recording, record, replay
from zfunc.models.hf.blocks import with_blocks
from zfunc.models.hf.errors import ModelError
from zfunc.models.hf.layout import Layout
from zfunc.models.hf.loading import load
from zfunc.models.hf.loss import HFLoss
from zfunc.models.hf.packing import check_packable
from zfunc.models.hf.private import (
    check_own_code,
    check_values,
    dropout_keys,
    made_functional,
    on_meta,
)
from zfunc.models.hf.source import (
    check_own_loss,
    class_of,
    config_of,
    kind_of_model,
    transformers,
)
from zfunc.models.hf.trainable import Chosen, split


class _Made(NamedTuple):
    """A model in parts: its code on the meta device, leaves and buffers by name."""

    module: Any
    leaves: dict[str, Any]
    buffers: dict[str, torch.Tensor]


def from_hf(
    source: Any,
    *,
    task: str | None = None,
    mesh: Any = None,
    spec: Any = None,
    dtype: torch.dtype | None = None,
    key: int = 0,
    remat: Callable[..., Any] | None = None,
    packed: bool = False,
    trainable: Chosen | None = None,
    dropout: Literal["off"] | None = None,
    new: Sequence[str] = (),
    ignore: Sequence[str] = (),
) -> tuple[dict[str, Any], HFLoss]:
    r"""A model of transformers as parameters and the loss of them.

    The loss is the mean over labelled tokens (or samples), as transformers computes it,
    but as a total and a weight, so that it stays exact over microbatches and ranks:

    .. math:: L = \frac{\sum_{r, i} \ell_{r, i}}{\sum_r n_r}

    Args:
      source: A ``PreTrainedModel``, a ``PreTrainedConfig`` (random numbers), or the
        path of a checkpoint directory with ``config.json`` and safetensors files.
        Nothing is downloaded. A model is not changed; without a mesh, the leaves are
        its own tensors.
      task: ``"causal-lm"``, ``"masked-lm"``, ``"seq2seq-lm"``,
        ``"sequence-classification"`` or ``"token-classification"``; None: as the
        model's class or ``config.architectures`` says.
      mesh: If given, leaves are placed: a rank reads or draws its own pieces, and holds
        at most one whole parameter besides.
      spec: A ``P`` for all leaves or a dict of them by name; default ``P("data")``.
      dtype: Storage dtype; None keeps what is stored (for a config: its own dtype).
      key: Seed of random numbers: those of the model that transformers makes after
        ``torch.manual_seed(key)``, on any mesh.
      remat: ``zf.remat``, to wrap each layer.
      packed: Batches are those of ``zf.models.pack``.
      trainable: Patterns such as ``["*.bias"]`` or a predicate on names: all else is
        frozen, in ``loss_fn.frozen``. None: what has ``requires_grad``.
      dropout: ``"off"`` if the config has dropout and it is to be left out.
      new: Patterns of parameters that are drawn if the directory does not have them,
        such as the head of a classifier.
      ignore: Patterns of stored tensors that the model has no use for.

    Returns:
      ``(params, loss_fn)``: leaves by the names of ``named_parameters()``, tied ones
      once; and an ``HFLoss``. A batch is a dict as transformers takes it, with
      ``labels`` (-100 does not count).

    Raises:
      ModelError: a model, directory or option that is not supported; one error names
        all parameters that are missing, not of the model or of another shape.
      TypeError: something else than a model, a config or a path.

    Laws: on one batch ``loss_fn(params, batch).value()`` is the loss of transformers,
    and its gradient that of ``backward``; with a mesh, the leaves are the pieces of
    those without.

    Differs from DeepSpeed: no ``zero.Init`` around the constructor, and no engine. From
    ``from_pretrained``: weights that are missing are an error, pickles are refused.

    Examples:
      >>> import zfunc as zf
      >>> from transformers import LlamaConfig
      >>> config = LlamaConfig(
      ...     vocab_size=64,
      ...     hidden_size=16,
      ...     intermediate_size=32,
      ...     num_hidden_layers=1,
      ...     num_attention_heads=2,
      ...     bos_token_id=1,
      ...     eos_token_id=2,
      ... )
      >>> params, loss_fn = from_hf(config, task="causal-lm", key=0)
      >>> ids = torch.arange(8).reshape(2, 4)
      >>> loss_fn(params, {"input_ids": ids, "labels": ids}).weight
      tensor(6)

    References:
      Wolf et al., `Transformers <https://arxiv.org/abs/1910.03771>`_, 2019.
    """
    layout = Layout(mesh, spec, dtype)
    _check_options(key, remat, packed, dropout)
    made = _made(source, task, layout, key, new, ignore)
    module = made.module
    kind = kind_of_model(module, task)
    layout.check_names(set(made.leaves))
    _check_supported(module, kind, packed, dropout is not None)
    flags = {name: p.requires_grad for name, p in module.named_parameters()}
    chosen: Chosen = flags.__getitem__ if trainable is None else trainable
    params, frozen = split(made.leaves, chosen)
    loss = HFLoss(
        made_functional(module),
        made.buffers,
        module.config,
        kind,
        frozen,
        packed,
        frozenset(made.leaves),
        remat,
    )
    if remat is not None:
        blocks = with_blocks(loss.module, remat, loss.config.model_type)
        loss = dataclasses.replace(loss, run=blocks)
    return params, loss


def _made(
    source: Any,
    task: str | None,
    layout: Layout,
    key: int,
    new: Sequence[str],
    ignore: Sequence[str],
) -> _Made:
    hf = transformers()
    if isinstance(source, torch.nn.Module):
        if not isinstance(getattr(source, "config", None), hf.PreTrainedConfig):
            raise TypeError(
                f"from_hf: a {type(source).__name__} is no model of transformers: use "
                "zf.models.from_module(module, loss)."
            )
        _check_reads(None, new, ignore)
        check_own_code(source)
        return _from_model(source, layout)
    config, directory = config_of(source)
    _check_reads(directory, new, ignore)
    cls = class_of(config, task)
    recording = record(lambda: cls._from_config(config, **_given(layout.dtype)))
    return _born(recording, directory, layout, key, new, ignore)


def _given(dtype: torch.dtype | None) -> dict[str, Any]:
    return {} if dtype is None else {"dtype": dtype}


def _check_reads(
    directory: Path | None, new: Sequence[str], ignore: Sequence[str]
) -> None:
    for option, patterns in (("new", new), ("ignore", ignore)):
        if isinstance(patterns, str):
            raise TypeError(
                f"{option} is a list of patterns, such as [{patterns!r}], got a string."
            )
        if patterns and directory is None:
            raise ModelError(
                f"{option} is for checkpoint directories; nothing is read here."
            )


def _from_model(model: torch.nn.Module, layout: Layout) -> _Made:
    check_values(
        model, "pass model.config for random ones, or the directory of a checkpoint"
    )
    if getattr(model.config, "quantization_config", None) is not None:
        raise ModelError(
            "the model's weights are quantized, and have no gradient: load the "
            "original ones."
        )
    leaves = {n: layout.placed(n, p) for n, p in model.named_parameters()}
    buffers = {n: layout.whole(b) for n, b in model.named_buffers()}
    return _Made(on_meta(model), leaves, buffers)


def _born(
    recording: Recording,
    directory: Path | None,
    layout: Layout,
    key: int,
    new: Sequence[str],
    ignore: Sequence[str],
) -> _Made:
    """The parameters of a constructor: read where they are stored, else drawn."""
    module = on_meta(recording.module)
    buffers = {name for name, _ in module.named_buffers()}
    leaves: dict[str, Any] = {}
    values: dict[str, torch.Tensor] = {}
    names = {name for name, _ in module.named_parameters()}
    drawn = names | buffers
    if directory is not None:
        loaded = load(directory, module, layout, new, ignore)
        leaves, values = loaded.leaves, loaded.buffers
        drawn = loaded.new | (buffers - values.keys())

    def hand_over(name: str, tensor: torch.Tensor) -> None:
        if name in buffers:
            values[name] = layout.whole(tensor)
        else:
            leaves[name] = layout.placed(name, tensor)

    replay(recording, drawn, key, hand_over)
    order = [name for name, _ in module.named_parameters()]
    return _Made(module, {name: leaves[name] for name in order}, values)


def _check_options(key: Any, remat: Any, packed: Any, dropout: Any) -> None:
    if isinstance(key, bool) or not isinstance(key, int):
        raise TypeError(f"key is an integer seed, got {key!r}")
    if remat is not None and not callable(remat):
        raise TypeError(f"remat is zf.remat or None, got {remat!r}")
    if not isinstance(packed, bool):
        raise TypeError(f"packed is True or False, got {packed!r}")
    if dropout not in (None, "off"):
        raise ModelError(f"dropout is 'off' or None, got {dropout!r}.")


def _check_supported(module: Any, kind: str, packed: bool, without: bool) -> None:
    config = module.config
    check_own_loss(module, kind)
    rates = dropout_keys(module, config)
    if rates and not without:
        raise ModelError(
            f"the config has {', '.join(rates)}: dropout is not done here, and would "
            "be left out without a word. Pass dropout='off' to train without it, or "
            "set these to 0."
        )
    if getattr(config, "output_router_logits", False):
        raise ModelError(
            "config.output_router_logits adds a balancing loss of the whole batch, "
            "which is not a mean over tokens: set it to False."
        )
    if packed:
        check_packable(kind, config)
