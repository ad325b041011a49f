# SPDX-License-Identifier: Apache-2.0
"""Tokens per second of ``zf.generate`` beside ``generate`` of transformers.

The same Llama, weights and prompt, in one process, in interleaved rounds; both greedy
with a cache, and their tokens are compared first.
"""

from __future__ import annotations

import functools
import importlib
import statistics
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import torch

from zfunc.bench.errors import BenchError
from zfunc.bench.presets import check_installed
from zfunc.inference import generate
from zfunc.models import decoder, from_hf


class DecodeModel(NamedTuple):
    """A Llama that is measured.

    Attributes:
      name: What ``--model`` takes.
      hidden: Width of the residual stream; heads are 64 wide.
      layers: Number of decoder layers.
      vocab: Number of tokens.
      why: What it is there for, in a few words.
    """

    name: str
    hidden: int
    layers: int
    vocab: int
    why: str


DECODE_MODELS = (
    DecodeModel("small", 256, 4, 8192, "overhead counts"),
    DecodeModel("large", 1024, 8, 32_000, "reading the weights counts"),
    DecodeModel("tiny", 64, 2, 256, "seconds, to try the command"),
)


class DecodePlan(NamedTuple):
    """What is measured.

    Attributes:
      model: Of ``DECODE_MODELS``.
      batch: Rows.
      prompt: Tokens of each row's prompt.
      tokens: New tokens per row.
      rounds: Timed runs of each contender.
      threads: Of torch.
    """

    model: DecodeModel
    batch: int
    prompt: int
    tokens: int
    rounds: int
    threads: int


class DecodeResult(NamedTuple):
    """What was found.

    Attributes:
      plan: What was asked for.
      ours_s: Seconds of each round of ``zf.generate``, prompt included.
      theirs_s: Those of transformers.
      trace_s: Seconds of our first call, which traces the step.
    """

    plan: DecodePlan
    ours_s: tuple[float, ...]
    theirs_s: tuple[float, ...]
    trace_s: float

    def tokens_per_s(self, times_s: tuple[float, ...]) -> float:
        """New tokens per second, of the median round.

        Examples:
          >>> plan = DecodePlan(DECODE_MODELS[0], 2, 16, 100, 3, 1)
          >>> DecodeResult(plan, (1.0, 2.0, 9.0), (4.0,), 0.0).tokens_per_s((2.0,))
          100.0
        """
        return self.plan.batch * self.plan.tokens / statistics.median(times_s)

    @property
    def ratios(self) -> tuple[float, float, float]:
        """Their seconds over ours: the median of the rounds, the least, the greatest.

        Examples:
          >>> plan = DecodePlan(DECODE_MODELS[0], 1, 16, 8, 2, 1)
          >>> DecodeResult(plan, (1.0, 1.0), (3.0, 1.0), 0.0).ratios
          (2.0, 1.0, 3.0)
        """
        each = [t / o for o, t in zip(self.ours_s, self.theirs_s, strict=True)]
        return statistics.median(each), min(each), max(each)


class TokensDifferError(BenchError):
    """The two generated other texts, so their times cannot be compared."""


def decode_model(name: str) -> DecodeModel:
    """The model of a name.

    Args:
      name: What ``--model`` was given.

    Raises:
      BenchError: There is none of that name.

    Examples:
      >>> decode_model("large").layers
      8
    """
    for model in DECODE_MODELS:
        if model.name == name:
            return model
    known = ", ".join(model.name for model in DECODE_MODELS)
    raise BenchError(f"there is no model {name!r}; there are {known}")


def run_decode(plan: DecodePlan, say: Callable[[str], None]) -> DecodeResult:
    """Measure; the number of torch's threads is as before afterwards.

    Args:
      plan: What.
      say: Is told what goes on.

    Raises:
      BenchError: transformers is not installed, or the tokens differ.
    """
    check_installed()
    before = torch.get_num_threads()
    torch.set_num_threads(plan.threads)
    try:
        return _run(plan, say)
    finally:
        torch.set_num_threads(before)


def _run(plan: DecodePlan, say: Callable[[str], None]) -> DecodeResult:
    say(f"making {plan.model.name}")
    ours, theirs = _contenders(plan)
    say("tracing, and comparing tokens")
    trace_s, first = _timed(ours)
    _, second = _timed(theirs)
    if first.shape != second.shape:
        raise TokensDifferError(
            f"one says {tuple(first.shape)} tokens and the other "
            f"{tuple(second.shape)}: the times cannot be compared"
        )
    if not torch.equal(first, second):
        where = int((first != second).any(0).nonzero()[0])
        raise TokensDifferError(
            f"the tokens differ from position {where} on: the times cannot be compared"
        )
    times: dict[str, list[float]] = {"ours": [], "theirs": []}
    for i in range(plan.rounds):
        say(f"round {i + 1} of {plan.rounds}")
        pair = [("ours", ours), ("theirs", theirs)]
        for name, run in pair if i % 2 else reversed(pair):
            times[name].append(_timed(run)[0])
    return DecodeResult(plan, tuple(times["ours"]), tuple(times["theirs"]), trace_s)


def _timed(run: Callable[[], torch.Tensor]) -> tuple[float, torch.Tensor]:
    begun_s = time.perf_counter()
    tokens = run()
    return time.perf_counter() - begun_s, tokens


def _contenders(
    plan: DecodePlan,
) -> tuple[Callable[[], torch.Tensor], Callable[[], torch.Tensor]]:
    """Both as functions to the tokens, prompt included."""
    model = _llama(plan)
    params, loss_fn = from_hf(model)
    generator = torch.Generator().manual_seed(0)
    shape = (plan.batch, plan.prompt)
    ids = torch.randint(plan.model.vocab, shape, generator=generator)
    one = decoder(loss_fn)

    def ours() -> torch.Tensor:
        return generate(one, params, ids, max_new_tokens=plan.tokens).ids

    theirs = functools.partial(
        model.generate,
        ids,
        attention_mask=torch.ones_like(ids),
        do_sample=False,
        max_new_tokens=plan.tokens,
        eos_token_id=None,
        pad_token_id=0,
        use_cache=True,
    )
    return ours, theirs


def _llama(plan: DecodePlan) -> Any:
    """The module, its weights drawn from a fixed seed."""
    transformers: Any = importlib.import_module("transformers")
    config = transformers.LlamaConfig(
        hidden_size=plan.model.hidden,
        intermediate_size=plan.model.hidden * 11 // 4,
        num_hidden_layers=plan.model.layers,
        num_attention_heads=plan.model.hidden // 64,
        num_key_value_heads=plan.model.hidden // 64,
        vocab_size=plan.model.vocab,
        max_position_embeddings=plan.prompt + plan.tokens,
        eos_token_id=None,
        bos_token_id=None,
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return transformers.LlamaForCausalLM(config).eval()
