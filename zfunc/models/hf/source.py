# SPDX-License-Identifier: Apache-2.0
"""What ``from_hf`` was given: a model, a configuration or a directory."""

from __future__ import annotations

import copy
import importlib
import importlib.util
import inspect
import os
from pathlib import Path
from typing import Any

import torch

from zfunc.models.hf.errors import ModelError
from zfunc.models.hf.heads import TASKS, kind_of


def transformers() -> Any:
    """The package, or an error that says how to install it."""
    if importlib.util.find_spec("transformers") is None:
        raise ModelError(
            "zf.models.from_hf needs transformers: pip install 'transformers>=5'"
        )
    return importlib.import_module("transformers")


def config_of(source: Any) -> tuple[Any, Path | None]:
    """The configuration of a directory or of itself, and the directory.

    Raises:
      ModelError: not a directory with a ``config.json``; nothing is downloaded.
      TypeError: something else.
    """
    hf = transformers()
    if isinstance(source, hf.PreTrainedConfig):
        return copy.deepcopy(source), None
    if not isinstance(source, str | os.PathLike):
        raise TypeError(
            "from_hf takes a transformers model, a configuration or the path of a "
            f"checkpoint directory, got a {type(source).__name__}. Any other module: "
            "zf.models.from_module(module, loss)."
        )
    path = Path(source)
    if not (path / "config.json").is_file():
        raise ModelError(
            f"{path} has no config.json: give the directory that save_pretrained "
            "wrote. Nothing is downloaded here; `hf download NAME --local-dir DIR` "
            "does that."
        )
    try:  # code that the directory brings is not run, and nobody is asked whether to
        config = hf.AutoConfig.from_pretrained(
            path, local_files_only=True, trust_remote_code=False
        )
    except Exception as error:  # those of transformers have no class in common
        raise ModelError(
            f"transformers cannot use {path / 'config.json'}: {error}"
        ) from error
    if getattr(config, "quantization_config", None) is not None:
        raise ModelError(
            f"{path} holds quantized weights, which have no gradient: take the "
            "original ones."
        )
    return config, path


def class_of(config: Any, task: str | None) -> Any:
    """The class of transformers for a configuration: by task, or as it was saved.

    Raises:
      ModelError: no such task, a configuration that names no class, or a class whose
        loss is not known here.
    """
    hf = transformers()
    if task is not None:
        check_task(task)
        table = getattr(hf, TASKS[task])._model_mapping
        if type(config) not in table:
            raise ModelError(
                f"task={task!r}: transformers has no such model for "
                f"{type(config).__name__}."
            )
        found = table[type(config)]
        return found[0] if isinstance(found, tuple) else found
    named = list(config.architectures or ())
    if not named:
        raise ModelError(
            f"{type(config).__name__} names no architecture: pass task=, one of "
            f"{', '.join(TASKS)}."
        )
    cls = getattr(hf, named[0], None)
    if cls is None or kind_of(named[0]) is None:
        raise ModelError(
            f"the config's architecture is {named[0]}, whose loss is not known here: "
            f"pass task=, one of {', '.join(TASKS)}, or write the loss: "
            "zf.models.from_module(model, loss)."
        )
    return cls


def check_task(task: str) -> None:
    """Raise where a task is not known."""
    if task not in TASKS:
        raise ModelError(f"task={task!r} is not one of {', '.join(TASKS)}.")


def check_own_loss(model: Any, kind: str) -> None:
    """Raise where the class of a model computes another loss than its kind's.

    Most classes of causal models call the one that transformers has for them; those
    that do not take labels that are shifted already, or add terms.
    """
    get = getattr(model, "get_base_model", None)
    model = model if get is None else get()
    forward = inspect.unwrap(type(model).forward)
    own = forward.__module__.startswith("transformers.")
    calls = getattr(forward, "__code__", None)
    shared = calls is None or "loss_function" in calls.co_names
    two_parts = getattr(model.config, "is_encoder_decoder", False)
    if "_loss_function" in vars(model):
        why = "has a loss_function of its own, which would not be called"
    elif kind == "causal-lm" and own and not shared:
        why = "does not compute the usual loss of the next token"
    elif kind == "seq2seq-lm" and not two_parts:
        why = "has no decoder that reads the labels"
    elif kind == "seq2seq-lm" and model.config.model_type == "prophetnet":
        why = "predicts several tokens at a place"
    else:
        return
    raise ModelError(
        f"{type(model).__name__} {why}: write the loss, "
        "zf.models.from_module(model, loss)."
    )


def kind_of_model(model: torch.nn.Module, task: str | None) -> str:
    """The task of a model, which its class says."""
    get = getattr(model, "get_base_model", None)
    name = type(model if get is None else get()).__name__
    kind = kind_of(name)
    if task is not None:
        check_task(task)
    if kind is None or task not in (None, kind):
        said = f", not {task}" if kind else ", whose loss is not known here"
        raise ModelError(
            f"the model is a {name}{f' ({kind})' if kind else ''}{said}: pass a model "
            f"with a head for one of {', '.join(TASKS)}, or write the loss: "
            "zf.models.from_module(model, loss)."
        )
    return kind
