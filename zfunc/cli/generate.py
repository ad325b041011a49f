# SPDX-License-Identifier: Apache-2.0
"""``zfunc generate``: text from a directory of transformers, or from a training run."""

from __future__ import annotations

import functools
import importlib
import importlib.util
import json as json_module
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import torch
import typer
from rich.console import Console

import zfunc as zf
from zfunc import checkpoint
from zfunc.cli.ending import print_error
from zfunc.cli.errors import Problem, UsageError
from zfunc.cli.program import first_state
from zfunc.cli.rundir import RunDir

_MODEL, _TEXT, _OUTPUT = "Model", "Text", "Output"


class Source(NamedTuple):
    """A model that is ready, and how its text becomes tokens and back.

    Attributes:
      decoder: Reads and writes tokens.
      params: Its parameters.
      encode: From a text to ids.
      decode: From the ids of a continuation to text.
      eos: The ids that end a text.
    """

    decoder: zf.models.Decoder
    params: Any
    encode: Callable[[str], list[int]]
    decode: Callable[[list[int]], str]
    eos: tuple[int, ...]


def generate_command(
    model: Annotated[
        Path,
        typer.Option(
            help="A directory of transformers (config.json, safetensors, tokenizer), "
            "or the --out of a zfunc train run.",
            rich_help_panel=_MODEL,
        ),
    ],
    prompt: Annotated[str, typer.Option(help="To go on from.", rich_help_panel=_TEXT)],
    max_new_tokens: Annotated[
        int, typer.Option(help="At most so many.", rich_help_panel=_TEXT)
    ] = 100,
    temperature: Annotated[
        float,
        typer.Option(help="0 takes the most likely token.", rich_help_panel=_TEXT),
    ] = 0.0,
    top_k: Annotated[
        int | None,
        typer.Option(help="Draw from the k most likely only.", rich_help_panel=_TEXT),
    ] = None,
    top_p: Annotated[
        float | None,
        typer.Option(
            help="Draw from the fewest tokens of this probability only.",
            rich_help_panel=_TEXT,
        ),
    ] = None,
    seed: Annotated[int, typer.Option(help="Of the draws.", rich_help_panel=_TEXT)] = 0,
    json: Annotated[
        bool,
        typer.Option(
            "--json",
            help="One object: prompt, text, ids, finished, seconds.",
            rich_help_panel=_OUTPUT,
        ),
    ] = False,
) -> None:
    """Continue a prompt.

    The text alone goes to standard output. The same options give the same text.
    """
    stderr = Console(emoji=False, stderr=True, highlight=False, soft_wrap=True)
    options = {
        "max_new_tokens": max_new_tokens,
        "temperature": temperature,
        "top_k": top_k,
        "top_p": top_p,
    }
    try:
        print(run(model, prompt, options, seed, as_json=json))
    except UsageError as error:
        print_error(stderr, str(error))
        raise typer.Exit(2) from None


def run(
    model: Path, prompt: str, options: dict[str, Any], seed: int, *, as_json: bool
) -> str:
    """What is printed: the continuation, or an object about it.

    Args:
      model: A directory.
      prompt: The text to go on from.
      options: Of ``zf.generate``.
      seed: Of the draws.
      as_json: Which of the two.

    Raises:
      UsageError: The directory or an option cannot be used.
    """
    source = source_of(model)
    read = source.encode(prompt)
    if not read:
        raise UsageError([Problem(f"--prompt {prompt!r}", "has no tokens: type some")])
    ids = torch.tensor([read])
    begun_s = time.perf_counter()
    try:
        made = zf.generate(
            source.decoder,
            source.params,
            ids,
            **options,
            eos=source.eos or None,
            key=seed,
        )
    except ValueError as error:
        raise UsageError(_as_options(str(error))) from error
    seconds = time.perf_counter() - begun_s
    first = 1 if source.decoder.start is not None else ids.shape[1]
    new = made.ids[0, first : first + int(made.lengths[0])].tolist()
    text = source.decode(new)
    if not as_json:
        return text
    return json_module.dumps(
        {
            "prompt": prompt,
            "text": text,
            "ids": new,
            "finished": bool(made.finished[0]),
            "seconds": round(seconds, 3),
        }
    )


def _as_options(message: str) -> str:
    """The message with the names of options for those of arguments."""
    text = message.removeprefix("generate: ")
    for name in ("max_new_tokens", "top_k", "top_p", "temperature"):
        text = text.replace(f"{name}=", f"--{name.replace('_', '-')} ")
    return text


def source_of(model: Path) -> Source:
    """The model of a directory: of a run if ``zfunc train`` wrote it.

    Args:
      model: The directory.

    Raises:
      UsageError: There is none, or nothing that can be read as one.
    """
    problems = list(_place_problems(model))
    if problems:
        raise UsageError(problems)
    if RunDir(model).checkpoints.is_dir():
        return _of_run(RunDir(model))
    return _of_transformers(model)


def _place_problems(model: Path) -> Iterator[Problem]:
    what = f"--model {model}"
    if not model.exists():
        yield Problem(what, "there is no such directory")
    elif not model.is_dir():
        yield Problem(what, "is a file: give the directory that it is in")
    elif not (model / "config.json").is_file():
        why = "has no config.json: give a directory of transformers or of zfunc train"
        yield Problem(what, why)


def _of_run(run: RunDir) -> Source:
    what = f"--model {run.root}"
    try:
        config = run.stored_config()
        mesh = zf.make_mesh({"data": 1})
        newest = checkpoint.restore_newest(run.checkpoints, first_state(config, mesh))
    except (zf.CheckpointError, UsageError) as error:
        raise UsageError([Problem(what, str(error))]) from error
    return Source(
        zf.models.decoder(config.model),
        zf.unshard(newest.restored.state).params,
        lambda text: list(text.encode()),
        lambda ids: bytes(ids).decode("utf-8", errors="replace"),
        (),
    )


def _of_transformers(model: Path) -> Source:
    what = f"--model {model}"
    if importlib.util.find_spec("transformers") is None:
        why = "is a model of transformers: pip install 'transformers>=5'"
        raise UsageError([Problem(what, why)])
    transformers: Any = importlib.import_module("transformers")
    try:
        tokenizer = _tokenizer(transformers, model)
        params, loss_fn = zf.models.from_hf(str(model), dropout="off")
        decoder = zf.models.decoder(loss_fn)
    except (zf.ZfuncError, OSError, ValueError, ImportError) as error:
        raise UsageError([Problem(what, _first_lines(str(error)))]) from error
    return Source(
        decoder,
        params,
        lambda text: list(tokenizer(text).input_ids),
        functools.partial(tokenizer.decode, skip_special_tokens=True),
        _ends(model, loss_fn.config),
    )


def _tokenizer(transformers: Any, model: Path) -> Any:
    try:
        return transformers.AutoTokenizer.from_pretrained(model, local_files_only=True)
    except (OSError, ValueError, ImportError) as error:
        if (model / "config.json").is_file() and not any(model.glob("*token*")):
            raise ValueError(
                "has no tokenizer: copy one there with tokenizer.save_pretrained, or "
                "call zf.generate, which takes ids"
            ) from error
        raise


def _ends(model: Path, config: Any) -> tuple[int, ...]:
    """What ends a text: as the directory says of generation, else of the model."""
    path = model / "generation_config.json"
    try:
        said = json_module.loads(path.read_text("utf-8")) if path.is_file() else {}
    except ValueError as error:
        raise UsageError([Problem(str(path), f"is no JSON: {error}")]) from error
    ends = said.get("eos_token_id", getattr(config, "eos_token_id", None))
    if ends is None:
        return ()
    several = tuple(ends) if isinstance(ends, list) else (int(ends),)
    # An id past the vocabulary is never generated.
    return tuple(end for end in several if 0 <= end < config.vocab_size)


def _first_lines(text: str, most: int = 3) -> str:
    return "\n".join(text.strip().splitlines()[:most])
