# SPDX-License-Identifier: Apache-2.0
"""``zfunc bench decode``: its options, and what it says."""

from __future__ import annotations

import json as json_module
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from zfunc.bench.decode import (
    DECODE_MODELS,
    DecodePlan,
    DecodeResult,
    TokensDifferError,
    decode_model,
    run_decode,
)
from zfunc.bench.errors import BenchError
from zfunc.cli.display import make_console
from zfunc.cli.ending import print_error
from zfunc.cli.errors import Problem, UsageError

_MODELS = "; ".join(f"`{m.name}`: {m.why}" for m in DECODE_MODELS)


def decode(
    model: Annotated[str, typer.Option(help=_MODELS)] = "small",
    batch: Annotated[int, typer.Option(help="Rows.", min=1)] = 1,
    prompt: Annotated[int, typer.Option(help="Tokens of each prompt.", min=1)] = 16,
    tokens: Annotated[int, typer.Option(help="New tokens of each row.", min=2)] = 128,
    rounds: Annotated[int, typer.Option(help="Runs of each, in turn.", min=1)] = 5,
    threads: Annotated[int, typer.Option(help="Of torch.", min=1)] = 2,
    json: Annotated[
        Path | None, typer.Option(help="All that was measured, as a file.")
    ] = None,
) -> None:
    """Time greedy decoding beside transformers' own, with its cache.

    The same model, weights and prompt, in this process, in interleaved rounds. Ends
    with exit code 1 if the tokens differ.
    """
    stderr = Console(emoji=False, stderr=True, highlight=False, soft_wrap=True)
    try:
        if json is not None and not json.parent.is_dir():
            why = f"there is no directory {json.parent}: make it first"
            raise UsageError([Problem(f"--json {json}", why)])
        plan = DecodePlan(decode_model(model), batch, prompt, tokens, rounds, threads)
        result = run_decode(plan, stderr.print)
    except TokensDifferError as error:
        print_error(stderr, str(error))
        raise typer.Exit(1) from None
    except (BenchError, UsageError) as error:
        print_error(stderr, str(error))
        raise typer.Exit(2) from None
    make_console().print(said(result), highlight=False)
    if json is not None:
        json.write_text(as_json(result), encoding="utf-8")


def said(result: DecodeResult) -> str:
    """What the command prints.

    Args:
      result: What was found.

    Examples:
      >>> plan = DecodePlan(DECODE_MODELS[0], 1, 16, 8, 1, 1)
      >>> print(said(DecodeResult(plan, (0.5,), (1.0,), 0.25)).splitlines()[-1])
      ratio          2.00 (2.00 to 2.00)
    """
    plan, (middle, low, high) = result.plan, result.ratios
    return "\n".join(
        [
            f"{plan.model.name}: hidden {plan.model.hidden}, {plan.model.layers} "
            f"layers, {plan.batch} x {plan.tokens} tokens after {plan.prompt}, "
            f"{plan.threads} threads, {plan.rounds} rounds",
            f"zfunc          {result.tokens_per_s(result.ours_s):.1f} tokens/s "
            f"(the first call, which traces, took {result.trace_s:.2f} s)",
            f"transformers   {result.tokens_per_s(result.theirs_s):.1f} tokens/s",
            f"ratio          {middle:.2f} ({low:.2f} to {high:.2f})",
        ]
    )


def as_json(result: DecodeResult) -> str:
    """Everything, as JSON.

    Args:
      result: What was found.

    Examples:
      >>> plan = DecodePlan(DECODE_MODELS[0], 1, 16, 8, 1, 1)
      >>> json_module.loads(as_json(DecodeResult(plan, (0.5,), (1.0,), 0.2)))["ratio"]
      [2.0, 2.0, 2.0]
    """
    plan = {**result.plan._asdict(), "model": result.plan.model._asdict()}
    found = {
        "plan": plan,
        "ours_s": result.ours_s,
        "theirs_s": result.theirs_s,
        "trace_s": result.trace_s,
        "ratio": result.ratios,
    }
    return json_module.dumps(found, indent=2) + "\n"
