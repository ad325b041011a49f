# SPDX-License-Identifier: Apache-2.0
"""Models that can be planned by name."""

from __future__ import annotations

import difflib
from collections.abc import Iterator
from typing import NamedTuple

from zfunc.models import gpt
from zfunc.models.gpt_config import GPTConfig
from zfunc.plan.errors import PlanError


class Preset(NamedTuple):
    """The shape of a model and where it comes from.

    Attributes:
      name: What ``--model`` takes.
      config: Its shape; ``max_seq_len`` is set by the plan.
      why: What it is, in a few words.
      library: "zfunc" for ``zfunc.models.gpt``, "transformers" for the Llama there.
    """

    name: str
    config: GPTConfig
    why: str
    library: str = "zfunc"

    @property
    def num_params(self) -> int:
        """Number of parameters (elements)."""
        return gpt.num_params(self.config)


# GPT-2's vocabulary of 50,257 tokens, padded so that 1024 ranks divide it.
_GPT_VOCAB = 51_200
_LLAMA_VOCAB = 32_000


def _gpt(name: str, layers: int, width: int, heads: int, why: str) -> Preset:
    config = GPTConfig(
        vocab_size=_GPT_VOCAB,
        d_model=width,
        n_layers=layers,
        n_heads=heads,
        n_kv_heads=heads,
        d_ff=4 * width,
        norm="layer",
        mlp="gelu",
    )
    return Preset(name, config, why)


def _llama(
    size: str, layers: int, width: int, heads: int, kv_heads: int, d_ff: int
) -> tuple[Preset, Preset]:
    config = GPTConfig(
        vocab_size=_LLAMA_VOCAB,
        d_model=width,
        n_layers=layers,
        n_heads=heads,
        n_kv_heads=kv_heads,
        d_ff=d_ff,
        tie_embeddings=False,
    )
    return (
        Preset(f"llama-{size}", config, f"the shape of Llama 2 {size}"),
        Preset(
            f"hf-llama-{size}",
            config,
            "the same with the layers of transformers",
            "transformers",
        ),
    )


PRESETS = (
    _gpt("tiny", 4, 256, 4, "seconds, to try the command"),
    _gpt("small", 12, 768, 12, "GPT-2 small"),
    _gpt("medium", 24, 1024, 16, "GPT-2 medium"),
    _gpt("large", 36, 1280, 20, "GPT-2 large"),
    _gpt("xl", 48, 1600, 25, "GPT-2 XL"),
    _gpt("7.5b", 65, 3072, 24, "figure 1 of the ZeRO paper"),
    _gpt("13b", 40, 5120, 40, "GPT-3 13B"),
    _gpt("128b", 158, 8192, 64, "table 1 of the ZeRO paper"),
    _gpt("175b", 96, 12_288, 96, "GPT-3"),
    _gpt("1t", 127, 25_600, 160, "table 1 of the ZeRO paper"),
    *_llama("7b", 32, 4096, 32, 32, 11_008),
    *_llama("70b", 80, 8192, 64, 8, 28_672),
)


def preset(name: str) -> Preset:
    """The preset of a name.

    Raises:
      PlanError: There is none of that name.

    Examples:
      >>> preset("7.5b").num_params
      7518692352
      >>> preset("7b")
      Traceback (most recent call last):
      zfunc.plan.errors.PlanError: --model 7b: there is no preset of that name ...
    """
    for candidate in PRESETS:
        if candidate.name == name:
            return candidate
    names = [candidate.name for candidate in PRESETS]
    close = difflib.get_close_matches(name, names, 1)
    meant = f" (did you mean {close[0]}?)" if close else ""
    raise PlanError(
        f"--model {name}: there is no preset of that name{meant}; type one of "
        f"{', '.join(names)}, or your.module:function"
    )


def listed() -> Iterator[str]:
    """One line per preset: its name, its size and what it is."""
    for candidate in PRESETS:
        billions = candidate.num_params / 1e9
        yield f"{candidate.name:<14}{billions:>9.3f} B  {candidate.why}"
