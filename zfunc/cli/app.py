# SPDX-License-Identifier: Apache-2.0
"""The commands and their options."""

from __future__ import annotations

import importlib.metadata
from pathlib import Path
from typing import Annotated, Any

import typer

from zfunc.cli.bench import bench_app
from zfunc.cli.bench_decode import decode
from zfunc.cli.bench_kernels import bench_kernels
from zfunc.cli.command import Request, train_command
from zfunc.cli.config import TrainConfig
from zfunc.cli.config_command import config_app
from zfunc.cli.generate import generate_command
from zfunc.cli.lr_find import lr_find_command
from zfunc.cli.plan import plan_command
from zfunc.cli.replay import replay_command

_RUN, _MODEL, _TRAINING, _END = "Run", "Model", "Training", "At the end"
_DEFAULT = TrainConfig()

app = typer.Typer(
    name="zfunc",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode="markdown",
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
bench_app.command("decode")(decode)
bench_app.command("kernels")(bench_kernels)
app.add_typer(bench_app, name="bench")
app.add_typer(config_app, name="config")
app.command("generate")(generate_command)
app.command("lr-find")(lr_find_command)
app.command("plan")(plan_command)
app.command("replay")(replay_command)


def _option(name: str, panel: str) -> Any:
    """The option of a field of the configuration, with the field's description."""
    field = TrainConfig.model_fields[name]
    shown = "[default:" not in (field.description or "")
    return typer.Option(
        help=field.description, rich_help_panel=panel, show_default=shown
    )


def _print_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"zfunc {importlib.metadata.version('zfunc-torch')}")
        raise typer.Exit


@app.callback()
def zfunc(
    version: Annotated[
        bool,
        typer.Option(
            "--version",
            callback=_print_version,
            is_eager=True,
            help="Show the version and exit.",
        ),
    ] = False,
) -> None:
    """Training steps as pure functions: sharded, resumable, and checked."""


@app.command()
def train(
    ctx: typer.Context,
    nproc: Annotated[int, _option("nproc", _RUN)] = _DEFAULT.nproc,
    data: Annotated[Path | None, _option("data", _RUN)] = None,
    out: Annotated[
        Path,
        typer.Option(
            help="Directory of the run: metrics.csv, loss.png, config.json, "
            "checkpoints and more.",
            rich_help_panel=_RUN,
        ),
    ] = Path("runs/train"),
    resume: Annotated[
        bool,
        typer.Option(
            "--resume",
            help="Go on from the newest checkpoint in --out, to the bits of a run that "
            "was never interrupted. The other options are those of the run.",
            rich_help_panel=_RUN,
        ),
    ] = False,
    overwrite: Annotated[
        bool,
        typer.Option(
            "--overwrite",
            help="Delete the run in --out and start again.",
            rich_help_panel=_RUN,
        ),
    ] = False,
    save_every: Annotated[int, _option("save_every", _RUN)] = _DEFAULT.save_every,
    keep_last: Annotated[int | None, _option("keep_last", _RUN)] = None,
    keep_every: Annotated[int | None, _option("keep_every", _RUN)] = None,
    hash_every: Annotated[int, _option("hash_every", _RUN)] = _DEFAULT.hash_every,
    zero: Annotated[int, _option("zero", _RUN)] = _DEFAULT.zero,
    precision: Annotated[str, _option("precision", _RUN)] = _DEFAULT.precision,
    microbatches: Annotated[int, _option("microbatches", _RUN)] = _DEFAULT.microbatches,
    remat: Annotated[bool, _option("remat", _RUN)] = _DEFAULT.remat,
    backend: Annotated[str | None, _option("backend", _RUN)] = None,
    d_model: Annotated[int, _option("d_model", _MODEL)] = _DEFAULT.d_model,
    layers: Annotated[int, _option("layers", _MODEL)] = _DEFAULT.layers,
    heads: Annotated[int, _option("heads", _MODEL)] = _DEFAULT.heads,
    kv_heads: Annotated[int | None, _option("kv_heads", _MODEL)] = None,
    seq_len: Annotated[int, _option("seq_len", _MODEL)] = _DEFAULT.seq_len,
    steps: Annotated[int, _option("steps", _TRAINING)] = _DEFAULT.steps,
    batch_size: Annotated[int, _option("batch_size", _TRAINING)] = _DEFAULT.batch_size,
    lr: Annotated[float, _option("lr", _TRAINING)] = _DEFAULT.lr,
    warmup_steps: Annotated[int | None, _option("warmup_steps", _TRAINING)] = None,
    clip: Annotated[float, _option("clip", _TRAINING)] = _DEFAULT.clip,
    weight_decay: Annotated[
        float, _option("weight_decay", _TRAINING)
    ] = _DEFAULT.weight_decay,
    seed: Annotated[int, _option("seed", _TRAINING)] = _DEFAULT.seed,
    sample_tokens: Annotated[int, _option("sample_tokens", _END)] = 200,
    temperature: Annotated[float, _option("temperature", _END)] = 0.8,
    verify_steps: Annotated[int, _option("verify_steps", _END)] = 3,
) -> None:
    """Train a byte-level GPT on text, with its state sharded over the ranks.

    Starts its own ranks, on all GPUs or on two processes of the CPU; under `torchrun`
    it is one of them. `zfunc train` alone learns Python from the sources of the
    standard library in a minute or two.

    Ctrl-C saves a checkpoint and says how to go on; a second one stops at once. So do
    SIGTERM and SIGHUP: the exit code is 128 and the number of the signal.
    """
    given = {
        name: value
        for name, value in ctx.params.items()
        if name in TrainConfig.model_fields and _was_typed(ctx, name)
    }
    raise typer.Exit(train_command(Request(given, out, resume, overwrite)))


def _was_typed(ctx: typer.Context, name: str) -> bool:
    source = ctx.get_parameter_source(name)
    return source is not None and source.name == "COMMANDLINE"


def main() -> None:
    """The entry point ``zfunc``."""
    app()
