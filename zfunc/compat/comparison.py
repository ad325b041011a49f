# SPDX-License-Identifier: Apache-2.0
"""DeepSpeed itself and the bridge, trained by one function from one configuration.

The bound of a difference between two losses: in float32, 1e-4. In bfloat16 it is
measured. Let E be the largest difference between the losses of DeepSpeed in bfloat16
and of DeepSpeed in float32, over the steps. If the bridge is no further from float32
than that, the two are at most 2 E apart: that is the bound.
"""

from __future__ import annotations

import contextlib
import importlib
import importlib.util
import io
import itertools
import logging
import warnings
from collections.abc import Callable
from typing import Any, Final, NamedTuple

import torch
import torch.distributed as dist
from torch import nn

from zfunc.compat.bridge import initialize
from zfunc.compat.errors import CompatError
from zfunc.core.mesh import make_mesh

_TOKENS, _WIDTH, _SAMPLES = 61, 24, 4
_LEARNING_RATE: Final = 5e-3
_FP32_BOUND: Final = 1e-4
_SCHEDULES: Final = ("WarmupLR", "OneCycle")


class Case(NamedTuple):
    """One configuration.

    Attributes:
      stage: Of ZeRO.
      precision: "fp32" or "bf16".
      clipping: The bound of the gradient's norm; 0.0 is none.
      accumulation: Microbatches per update.
      schedule: A type of DeepSpeed's section ``scheduler``.

    Examples:
      >>> Case(3, "bf16", 0.5, 4, "OneCycle").name
      'zero3 bf16 clip0.5 accumulate4 OneCycle'
    """

    stage: int
    precision: str
    clipping: float
    accumulation: int
    schedule: str

    @property
    def name(self) -> str:
        """What ``--only`` looks in."""
        return (
            f"zero{self.stage} {self.precision} clip{self.clipping:g} "
            f"accumulate{self.accumulation} {self.schedule}"
        )


class Run(NamedTuple):
    """What a library did.

    Attributes:
      losses: Of each step, mean over ranks and microbatches.
      rates: That each step used.
    """

    losses: tuple[float, ...]
    rates: tuple[float, ...]


class Compared(NamedTuple):
    """A case, done by both.

    Attributes:
      case: What was done.
      difference: The largest between losses of a step.
      bound: What it may be.
      fall: Of the loss, first to last; both have to train.
      same_rates: Whether each step's learning rates are equal.
    """

    case: Case
    difference: float
    bound: float
    fall: float
    same_rates: bool

    @property
    def is_equal(self) -> bool:
        """Whether all is as it has to be."""
        return self.verdict == "ok"

    @property
    def verdict(self) -> str:
        """In a word; a training whose loss does not fall says nothing."""
        if not (self.difference <= self.bound and self.same_rates):
            return "DIFFERENT"
        return "ok" if self.fall > 0 else "NO FALL"


CASES: Final = tuple(
    Case(*values)
    for values in itertools.product(
        (0, 1, 2, 3), ("fp32", "bf16"), (0.0, 0.5), (1, 4), _SCHEDULES
    )
)


def chosen(only: str | None) -> tuple[Case, ...]:
    """The cases whose names have all of some words.

    Args:
      only: Words with commas or spaces between them; None for all.

    Raises:
      CompatError: There is none, or DeepSpeed is not installed.

    Examples:
      >>> [case.name for case in chosen("zero3, bf16, clip0.5, accumulate4, OneCycle")]
      ['zero3 bf16 clip0.5 accumulate4 OneCycle']
    """
    if importlib.util.find_spec("deepspeed") is None:
        raise CompatError('DeepSpeed is not installed: pip install -e ".[bench]"')
    words = (only or "").replace(",", " ").split()
    found = tuple(c for c in CASES if all(word in c.name.split() for word in words))
    if not found:
        known = sorted({word for case in CASES for word in case.name.split()})
        raise CompatError(f"no case has all of {words}; words are {', '.join(known)}")
    return found


def configuration(case: Case) -> dict[str, Any]:
    """The JSON that both are given.

    Args:
      case: What is compared.

    Examples:
      >>> configuration(CASES[0])["optimizer"]["params"]["lr"]
      0.005
    """
    cycle = {
        "cycle_min_lr": _LEARNING_RATE / 10,
        "cycle_max_lr": _LEARNING_RATE,
        "cycle_first_step_size": 4,
    }
    warmup = {"warmup_max_lr": _LEARNING_RATE, "warmup_num_steps": 4}
    return {
        "train_micro_batch_size_per_gpu": _SAMPLES,
        "gradient_accumulation_steps": case.accumulation,
        "gradient_clipping": case.clipping,
        "steps_per_print": 10**9,
        "optimizer": {
            "type": "AdamW",
            # Its own AdamW is compiled where it runs.
            "params": {
                "lr": _LEARNING_RATE,
                "weight_decay": 0.1,
                "torch_adam": True,
            },
        },
        "scheduler": {
            "type": case.schedule,
            "params": cycle if case.schedule == "OneCycle" else warmup,
        },
        "bf16": {"enabled": case.precision == "bf16"},
        "zero_optimization": {
            "stage": case.stage,
            # Every parameter is in pieces, however small.
            "stage3_param_persistence_threshold": 0,
            "reduce_bucket_size": 10_000,
            "allgather_bucket_size": 10_000,
            # It replaces torch.nn.functional.linear for the whole process.
            "memory_efficient_linear": False,
        },
    }


class Model(nn.Module):
    """Embeddings, two layers and a head, with the loss."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(_TOKENS, _WIDTH)
        self.first = nn.Linear(_WIDTH, 2 * _WIDTH)
        self.norm = nn.LayerNorm(2 * _WIDTH)
        self.second = nn.Linear(2 * _WIDTH, 2 * _WIDTH)
        self.head = nn.Linear(2 * _WIDTH, _TOKENS)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        """The loss of predicting each token from the one before it."""
        x = torch.tanh(self.norm(self.first(self.table(ids[:, :-1]))))
        logits = self.head(x + torch.tanh(self.second(x))).float()
        return nn.functional.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten())


def train(library: Callable[..., Any], case: Case, steps: int) -> Run:
    """Train with a library that has DeepSpeed's functions.

    Args:
      library: Its ``initialize``.
      case: What to train.
      steps: Updates.
    """
    torch.manual_seed(0)
    module = Model()
    engine = library(
        model=module,
        model_parameters=module.parameters(),
        config=configuration(case),
    )[0]
    rank, world = dist.get_rank(), dist.get_world_size()
    losses: list[float] = []
    rates: list[float] = []
    for step in range(steps):
        rates.append(float(engine.get_lr()[0]))
        total = torch.zeros((), dtype=torch.float64)
        for micro in range(case.accumulation):
            # A few batches, again and again: something to learn.
            seed = 1000 * (step % 2) + 10 * micro + rank
            generator = torch.Generator().manual_seed(seed)
            ids = torch.randint(0, _TOKENS, (_SAMPLES, 9), generator=generator)
            loss = engine(ids.to(engine.device))
            engine.backward(loss)
            engine.step()
            total += loss.detach().double().cpu()
        dist.all_reduce(total)
        losses.append(float(total) / world / case.accumulation)
    return Run(tuple(losses), tuple(rates))


def compare(case: Case, steps: int) -> Compared:
    """Train a case with DeepSpeed and with the bridge, on this rank of a job.

    Args:
      case: What to train.
      steps: Updates.
    """
    make_mesh({"data": dist.get_world_size()})
    library = _deepspeed()
    theirs, ours = train(library, case, steps), train(initialize, case, steps)
    bound = _FP32_BOUND
    if case.precision == "bf16":
        exact = train(library, case._replace(precision="fp32"), steps)
        bound = 2 * _apart(theirs, exact)
    return Compared(
        case,
        _apart(ours, theirs),
        bound,
        min(run.losses[0] - run.losses[-1] for run in (ours, theirs)),
        ours.rates == theirs.rates,
    )


def _doubles(run: Run) -> torch.Tensor:
    return torch.tensor(run.losses, dtype=torch.float64)


def _apart(a: Run, b: Run) -> float:
    """The largest difference, and NaN where there is one."""
    return float((_doubles(a) - _doubles(b)).abs().max())


def _deepspeed() -> Callable[..., Any]:
    # Its engine calls what torch has renamed since.
    warnings.filterwarnings("ignore", category=FutureWarning)
    with contextlib.redirect_stdout(io.StringIO()):  # it prints what it builds
        library: Any = importlib.import_module("deepspeed")
    logging.getLogger("DeepSpeed").setLevel(logging.ERROR)

    def make(**arguments: Any) -> Any:
        with contextlib.redirect_stdout(io.StringIO()):
            made = library.initialize(**arguments)
        _forget_the_first_step(made[0])
        return made

    return make


def _forget_the_first_step(engine: Any) -> None:
    """Undo the step that DeepSpeed's optimizer of stage 0 in bfloat16 takes when made.

    It makes the moments by stepping on gradients of zero, so all of Adam's corrections
    of bias are one step late, and weights have decayed once: its losses of these cases
    are up to 0.025 off those of its own stages 1 to 3.
    """
    wrapper = engine.optimizer
    if type(wrapper).__name__ != "FP16_UnfusedOptimizer":
        return
    wrapper.optimizer.state.clear()
    for masters, halves in zip(wrapper.fp32_groups, wrapper.fp16_groups, strict=True):
        for master, half in zip(masters, halves, strict=True):
            master.data.copy_(half.data)
