# SPDX-License-Identifier: Apache-2.0
"""``zfunc config``: what a DeepSpeed configuration becomes, and what is wrong."""

from __future__ import annotations

import json as json_format
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Final

import typer
from rich.console import Console
from rich.table import Table
from rich.text import Text

from zfunc.cli.display import make_console
from zfunc.cli.ending import print_error
from zfunc.config import ConfigError, Entry, Interpretation, interpret
from zfunc.config.reading import read
from zfunc.optim.adamw import adamw

SCHEMA: Final = 1
_STAND_IN: Final = (
    "There is no optimizer in the file: give one to zf.from_ds_config(optimizer=...)."
)

config_app = typer.Typer(
    no_args_is_help=True, help="Check and explain a DeepSpeed configuration."
)

_File = Annotated[
    Path,
    typer.Argument(help="A ds_config.json; comments are read.", show_default=False),
]
_World = Annotated[
    int | None,
    typer.Option(help="Data-parallel ranks. [default: WORLD_SIZE, else 1]"),
]
_Auto = Annotated[
    list[str] | None,
    typer.Option(
        help="A value for a key that says auto: optimizer.params.lr=3e-4. May be "
        "repeated.",
    ),
]
_Steps = Annotated[
    int | None, typer.Option(help="Updates of the whole training, for its schedule.")
]


@config_app.command("check")
def check_command(
    file: _File, world: _World = None, auto: _Auto = None, total_steps: _Steps = None
) -> None:
    """Say whether zfunc can train with a configuration, and if not, all that is wrong.

    Exit code 0 or 2. A key that does not exist is wrong, with the nearest one that
    does; so is a feature that is switched on and not here.
    """
    made = _interpreted(file, world, auto, total_steps)
    counts = ", ".join(
        f"{sum(entry.status == status for entry in made.entries)} {status}"
        for status in dict.fromkeys(entry.status for entry in made.entries)
    )
    typer.echo(f"{file}: {_in_words(made)}")
    typer.echo(f"{len(made.entries)} keys: {counts}")
    for note in made.notes:
        typer.echo(note)


@config_app.command("explain")
def explain_command(
    file: _File,
    world: _World = None,
    auto: _Auto = None,
    total_steps: _Steps = None,
    json: Annotated[
        bool, typer.Option("--json", help="All of it as JSON, to stdout.")
    ] = False,
) -> None:
    """Say what each key of a configuration becomes, and the defaults that matter."""
    made = _interpreted(file, world, auto, total_steps)
    if json:
        typer.echo(as_json(made))
        return
    console = make_console()
    console.print(f"{file}: {_in_words(made)}", markup=False)
    console.print(_table("in the file", made.entries))
    console.print(_table("not in the file", made.defaults))
    for note in made.notes:
        console.print(note, markup=False)


def as_json(made: Interpretation) -> str:
    """An interpretation as JSON, for other programs.

    Args:
      made: What a configuration means.

    Examples:
      >>> config = {"train_batch_size": 8, "optimizer": {"type": "SGD"}}
      >>> json_format.loads(as_json(interpret(config, world=2)))["stage"]
      0
    """
    document = {
        "schema": SCHEMA,
        "stage": made.stage,
        "precision": made.precision,
        "gradient_clipping": made.clipping,
        "data": {
            "train_batch_size": made.data.train_batch_size,
            "micro_batch_size": made.data.micro_batch_size,
            "accumulation_steps": made.data.accumulation_steps,
            "world": made.data.world,
            "drop_last": made.data.drop_last,
            "seed": made.data.seed,
        },
        "transforms": [each.__name__ for each in made.transforms],
        "passes": [each.__name__ for each in made.jit.get("passes", ())],
        "shard": {name: str(value) for name, value in made.shard.items()},
        "entries": [entry._asdict() for entry in made.entries],
        "defaults": [entry._asdict() for entry in made.defaults],
        "notes": list(made.notes),
    }
    return json_format.dumps(document, indent=1, default=str)


def _interpreted(
    file: Path, world: int | None, auto: Sequence[str] | None, total_steps: int | None
) -> Interpretation:
    try:
        return _lenient(file, world, _values(auto or ()), total_steps)
    except (ConfigError, ValueError) as error:
        stderr = Console(emoji=False, stderr=True, highlight=False, soft_wrap=True)
        print_error(stderr, str(error))
        raise typer.Exit(2) from None


def _lenient(
    file: Path, world: int | None, auto: dict[str, Any], total_steps: int | None
) -> Interpretation:
    """A file without an optimizer is whole: the training script has one."""
    if not file.exists():
        raise ValueError(f"{file}: there is no such file")
    raw = read(file)[1]
    if raw.get("optimizer") is not None:
        return interpret(file, world=world, auto=auto, total_steps=total_steps)
    whole = adamw(1e-3)
    client: Any = (lambda rate: whole) if raw.get("scheduler") else whole
    made = interpret(
        file, world=world, auto=auto, total_steps=total_steps, optimizer=client
    )
    return made._replace(notes=(*made.notes, _STAND_IN))


def _values(auto: Sequence[str]) -> dict[str, Any]:
    """Values by path, each read as JSON or else as a string."""
    values = {}
    for each in auto:
        path, equals, text = each.partition("=")
        if not equals:
            raise ValueError(
                f"--auto {each}: expected PATH=VALUE; type --auto "
                "train_micro_batch_size_per_gpu=8"
            )
        try:
            values[path] = json_format.loads(text)
        except ValueError:
            values[path] = text
    return values


def _in_words(made: Interpretation) -> str:
    data = made.data
    return (
        f"ZeRO {made.stage}, {made.precision}, {data.train_batch_size} samples = "
        f"{data.micro_batch_size} x {data.accumulation_steps} microbatch"
        f"{'es' * (data.accumulation_steps > 1)} x {data.world} "
        f"rank{'s' * (data.world > 1)}"
    )


def _table(title: str, entries: Sequence[Entry]) -> Table:
    table = Table(box=None)
    for name in (title, "value", "status", "what it becomes"):
        table.add_column(name, overflow="fold")
    for entry in entries:
        became = f"{entry.became} ({entry.note})" if entry.note else entry.became
        value = json_format.dumps(entry.value, default=str)
        cells = (entry.path, value, entry.status, became.replace("`", ""))
        table.add_row(*(Text(cell) for cell in cells))
    return table
