# SPDX-License-Identifier: Apache-2.0
"""The configuration of a training run: what the options of ``zfunc train`` make."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, Final, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator

from zfunc.checkpoint import Keep
from zfunc.cli.errors import Problem, flag
from zfunc.models.gpt_config import GPTConfig

# Options that change where and how fast a run computes, not what it computes: these may
# differ from those of the run that is resumed. (Another number of ranks or microbatches
# adds up in another order: the same to rounding.)
MAY_CHANGE: Final[frozenset[str]] = frozenset(
    {"nproc", "zero", "microbatches", "remat", "backend", "save_every"}
    | {"sample_tokens", "temperature", "verify_steps"}
    | {"keep_last", "keep_every", "hash_every"}
)
_MAX_WARMUP_STEPS = 100


class TrainConfig(BaseModel):
    """Everything that decides a run; frozen, and ``config.json`` in its directory.

    Examples:
      >>> TrainConfig(steps=30).model.d_model
      128
    """

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    data: Path | None = Field(
        default=None,
        description="Text to learn: a file, or a folder read recursively. "
        "[default: the sources of Python's standard library]",
    )
    nproc: int = Field(
        default=2,
        ge=1,
        description="Ranks on this machine. [default: all GPUs, else 2]",
    )
    steps: int = Field(
        default=240, ge=1, description="Optimizer steps of the whole run."
    )
    zero: Literal[0, 1, 2, 3] = Field(
        default=3, description="ZeRO stage: 0 replicates; 1, 2 and 3 shard the state."
    )
    precision: Literal["fp32", "bf16", "fp16"] = Field(
        default="fp32",
        description="Arithmetic of the loss: fp32, bf16, or fp16 with a dynamic scale.",
    )
    microbatches: int = Field(
        default=1, ge=1, description="Parts in which each rank computes its batch."
    )
    batch_size: int = Field(
        default=16, ge=1, description="Samples per step, over all ranks."
    )
    seq_len: int = Field(default=128, ge=2, description="Bytes per sample.")
    d_model: int = Field(default=128, ge=2, description="Width of the model.")
    layers: int = Field(default=4, ge=1, description="Number of blocks.")
    heads: int = Field(default=4, ge=1, description="Query heads.")
    kv_heads: int | None = Field(
        default=None,
        ge=1,
        description="Key/value heads. [default: as many as query heads]",
    )
    lr: float = Field(default=3e-3, gt=0, description="Peak learning rate.")
    warmup_steps: int | None = Field(
        default=None,
        ge=0,
        description="Steps in which the rate rises. [default: a fifth, at most 100]",
    )
    clip: float = Field(
        default=1.0, ge=0, description="Largest norm of the gradient; 0 turns it off."
    )
    weight_decay: float = Field(
        default=0.1, ge=0, description="Of the matrices, per unit of lr."
    )
    seed: int = Field(
        default=0,
        ge=0,
        lt=2**63,
        description="Of the parameters and the order of the data.",
    )
    save_every: int = Field(default=100, ge=1, description="Steps between checkpoints.")
    keep_last: int | None = Field(
        default=None,
        ge=1,
        description="Newest checkpoints that stay; older ones are removed once a newer "
        "one is on the disk. [default: all; 1 with --keep-every]",
    )
    keep_every: int | None = Field(
        default=None,
        ge=1,
        description="Checkpoints of steps that are a multiple of it stay too. "
        "[default: none, with --keep-last]",
    )
    hash_every: int = Field(
        default=10,
        ge=1,
        description="Steps between hashes of the state, which zfunc replay compares; "
        "every checkpoint has one.",
    )
    remat: bool = Field(
        default=True,
        description="Recompute each block in the backward, to save memory.",
    )
    backend: Literal["eager", "aten", "inductor", "cudagraph"] | None = Field(
        default=None,
        description="How a step runs: eager, or traced once and run by aten, inductor "
        "or cudagraph. [default: aten on the CPU, inductor on a GPU]",
    )
    sample_tokens: int = Field(
        default=200, ge=0, description="Bytes of text to generate at the end."
    )
    temperature: float = Field(
        default=0.8, ge=0, description="Of that text; 0 takes the likeliest byte."
    )
    verify_steps: int = Field(
        default=3,
        ge=0,
        description="First steps to repeat unsharded at the end, on one rank and in "
        "float32, for comparison.",
    )

    @field_validator("data")
    @classmethod
    def _absolute(cls, path: Path | None) -> Path | None:
        """A run may be resumed from another working directory."""
        return None if path is None else path.absolute()

    @property
    def model(self) -> GPTConfig:
        """The shape of the model."""
        return GPTConfig(
            vocab_size=256,
            d_model=self.d_model,
            n_layers=self.layers,
            n_heads=self.heads,
            n_kv_heads=self.kv_heads or self.heads,
            d_ff=3 * self.d_model,
            max_seq_len=self.seq_len,
        )

    @property
    def keep(self) -> Keep | None:
        """Which checkpoints stay; None is all."""
        if self.keep_last is None and self.keep_every is None:
            return None
        return Keep(last=self.keep_last or 1, every=self.keep_every)

    @property
    def warmup(self) -> int:
        """Steps in which the learning rate rises."""
        if self.warmup_steps is not None:
            return self.warmup_steps
        return min(self.steps // 5, _MAX_WARMUP_STEPS)


def problems_of(options: Mapping[str, Any]) -> list[Problem]:
    """Everything that is wrong with some options, each checked as far as others allow.

    Args:
      options: Values by the name of the field; the others have their defaults.

    Examples:
      >>> for problem in problems_of({"zero": 5, "batch_size": 3}):
      ...     print(problem)
      --zero 5: must be 0, 1, 2 or 3
      --batch-size 3: not a multiple of --nproc 2 x --microbatches 1; type 4
    """
    found, wrong = [], set()
    try:
        TrainConfig.model_validate(dict(options))
    except ValidationError as error:
        for item in error.errors(include_url=False, include_context=False):
            name = str(item["loc"][0])
            wrong.add(name)
            text = item["msg"].removeprefix("Input should be ")
            text = text.replace("greater than or equal to", "at least")
            found.append(Problem(f"{flag(name)} {item['input']}", f"must be {text}"))
    sound = {name: value for name, value in options.items() if name not in wrong}
    if any(name not in TrainConfig.model_fields for name in wrong):
        return found
    config = TrainConfig.model_validate(sound)
    for names, check in _CROSS_CHECKS:
        if wrong.isdisjoint(names):
            found += check(config)
    return found


def conflicts(stored: TrainConfig, given: Mapping[str, Any]) -> list[Problem]:
    """The options that would make a resumed run another run.

    Args:
      stored: The configuration of the run.
      given: The options on the command line, by the name of the field, all valid.

    Examples:
      >>> [str(p) for p in conflicts(TrainConfig(), {"layers": 9, "zero": 1})]
      ['--layers 9: the run to resume has 4: leave it out, or start another run']
    """
    asked = stored.model_copy(update=dict(given))
    return [
        Problem(
            f"{flag(name)} {given[name]}",
            f"the run to resume has {_shown(getattr(stored, name))}: leave it out, or "
            "start another run",
        )
        for name in given
        if name not in MAY_CHANGE and getattr(asked, name) != getattr(stored, name)
    ]


def _shown(value: object) -> str:
    return "the default" if value is None else str(value)


def _batch(config: TrainConfig) -> Iterator[Problem]:
    share = config.nproc * config.microbatches
    if config.batch_size % share:
        yield Problem(
            f"--batch-size {config.batch_size}",
            f"not a multiple of --nproc {config.nproc} x --microbatches "
            f"{config.microbatches}; type {-(-config.batch_size // share) * share}",
        )


def _warmup(config: TrainConfig) -> Iterator[Problem]:
    if config.warmup > config.steps:
        yield Problem(
            f"--warmup-steps {config.warmup}", f"more than --steps {config.steps}"
        )


def _width(config: TrainConfig) -> Iterator[Problem]:
    unit = 2 * config.heads
    if config.d_model % unit:
        yield Problem(
            f"--d-model {config.d_model}",
            f"not a multiple of twice --heads {config.heads}; "
            f"type {-(-config.d_model // unit) * unit}",
        )


def _kv_heads(config: TrainConfig) -> Iterator[Problem]:
    if config.kv_heads is not None and config.heads % config.kv_heads:
        yield Problem(
            f"--kv-heads {config.kv_heads}", f"does not divide --heads {config.heads}"
        )


_CROSS_CHECKS: Final[
    tuple[tuple[tuple[str, ...], Callable[[TrainConfig], Iterator[Problem]]], ...]
] = (
    (("batch_size", "nproc", "microbatches"), _batch),
    (("warmup_steps", "steps"), _warmup),
    (("d_model", "heads"), _width),
    (("kv_heads", "heads"), _kv_heads),
)
