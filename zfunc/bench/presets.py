# SPDX-License-Identifier: Apache-2.0
"""The models and batches that are measured, by name."""

from __future__ import annotations

import importlib
import importlib.util
from typing import Any, NamedTuple

import torch

from zfunc.bench.errors import BenchError

_DISTINCT = 4
INSTALL = 'pip install "zfunc-torch[bench]"'


class Preset(NamedTuple):
    """A Llama of transformers and the batch that each rank gives it.

    Attributes:
      name: What ``--model`` takes.
      hidden: Width of the residual stream.
      intermediate: Width of the MLP.
      layers: Number of decoder layers.
      heads: Attention heads, as many for keys and values.
      vocab: Number of tokens.
      batch: Sequences per rank and step.
      seq_len: Tokens per sequence.
      why: What it is there for, in a few words.
      nproc: Ranks, if no number is given.
    """

    name: str
    hidden: int
    intermediate: int
    layers: int
    heads: int
    vocab: int
    batch: int
    seq_len: int
    why: str
    nproc: int = 2


PRESETS = (
    Preset("small", 128, 344, 4, 4, 512, 8, 64, "sharded steps, latency counts"),
    Preset("medium", 384, 1024, 5, 6, 512, 8, 64, "10 times the parameters of small"),
    Preset("single", 256, 688, 6, 4, 512, 8, 256, "one process, arithmetic counts", 1),
    Preset(
        "launch-bound", 64, 176, 12, 4, 512, 1, 32, "one process, overhead counts", 1
    ),
    Preset("tiny", 32, 88, 2, 2, 64, 2, 16, "seconds, to try the command"),
)


def preset(name: str) -> Preset:
    """The preset of a name.

    Raises:
      BenchError: There is none of that name.

    Examples:
      >>> preset("small").hidden
      128
      >>> preset("huge")
      Traceback (most recent call last):
      zfunc.bench.errors.BenchError: there is no model 'huge'; there are small, ...
    """
    for candidate in PRESETS:
        if candidate.name == name:
            return candidate
    known = ", ".join(candidate.name for candidate in PRESETS)
    raise BenchError(f"there is no model {name!r}; there are {known}")


def check_installed() -> None:
    """Refuse to start without transformers.

    Raises:
      BenchError: It is not installed; the message says what to install.
    """
    if importlib.util.find_spec("transformers") is None:
        raise BenchError(
            f"the models that are measured come from transformers: {INSTALL}"
        )


def llama(preset: Preset, device: torch.device) -> Any:
    """The model of a preset: float32, no dropout, the same weights on every call.

    Args:
      preset: Its sizes.
      device: Where it goes; the weights are drawn on the CPU.

    Returns:
      A ``LlamaForCausalLM``, in training mode.
    """
    transformers = importlib.import_module("transformers")
    config = transformers.LlamaConfig(
        hidden_size=preset.hidden,
        intermediate_size=preset.intermediate,
        num_hidden_layers=preset.layers,
        num_attention_heads=preset.heads,
        num_key_value_heads=preset.heads,
        vocab_size=preset.vocab,
        max_position_embeddings=preset.seq_len,
        attention_dropout=0.0,
        use_cache=False,
    )
    with torch.random.fork_rng(devices=()):
        torch.manual_seed(0)
        model = transformers.LlamaForCausalLM(config)
    return model.float().to(device).train()


def batches(
    preset: Preset, steps: int, rank: int, device: torch.device
) -> list[torch.Tensor]:
    """What a rank is given at each step: token ids, which are the labels too.

    The same few in turn: what is seen again is learnt, so the losses fall, and show
    what a contender does to the weights.

    Args:
      preset: The sizes.
      steps: Number of batches.
      rank: Each rank draws its own.
      device: Where they go.

    Examples:
      >>> first = batches(preset("tiny"), 6, 0, torch.device("cpu"))
      >>> len(first), first[0].shape
      (6, torch.Size([2, 16]))
      >>> torch.equal(first[0], first[4])
      True
    """
    generator = torch.Generator().manual_seed(1 + rank)
    shape = (preset.batch, preset.seq_len)
    drawn = [
        torch.randint(0, preset.vocab, shape, generator=generator).to(device)
        for _ in range(_DISTINCT)
    ]
    return [drawn[step % _DISTINCT] for step in range(steps)]
