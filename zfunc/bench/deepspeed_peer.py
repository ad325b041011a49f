# SPDX-License-Identifier: Apache-2.0
"""DeepSpeed's stages 1 to 3, on the process group that is there already."""

from __future__ import annotations

import contextlib
import importlib
import importlib.util
import io
import logging
from typing import Any, Literal

import torch

from zfunc.bench.setup import Setup, Step


def is_installed() -> bool:
    """Whether DeepSpeed can be measured."""
    return importlib.util.find_spec("deepspeed") is not None


def deepspeed(setup: Setup, stage: Literal[1, 2, 3]) -> Step:
    """DeepSpeed's engine around torch's fused AdamW.

    Args:
      setup: What all contenders share.
      stage: Of ZeRO.
    """
    with contextlib.redirect_stdout(io.StringIO()):  # it prints what it builds
        library: Any = importlib.import_module("deepspeed")
        logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
        model = setup.model()
        size = sum(p.numel() for p in model.parameters())
        engine = library.initialize(
            model=model,
            optimizer=setup.optimizer(model),
            config=config(stage, setup.preset.batch, size),
        )[0]

    def step(ids: torch.Tensor) -> torch.Tensor:
        loss: torch.Tensor = engine(input_ids=ids, labels=ids).loss
        engine.backward(loss)
        engine.step()
        return loss.detach()

    return step


def config(stage: int, batch: int, num_params: int) -> dict[str, Any]:
    """DeepSpeed's configuration.

    Args:
      stage: Of ZeRO.
      batch: Sequences per rank.
      num_params: Of the model.

    Examples:
      >>> config(3, 8, 1000)["zero_optimization"]["stage"]
      3
    """
    return {
        "train_micro_batch_size_per_gpu": batch,
        "gradient_clipping": 0.0,  # its default clips at 1
        "zero_allow_untested_optimizer": True,  # torch's own AdamW
        "steps_per_print": 10**9,
        "zero_optimization": {
            "stage": stage,
            # The default allocates 2 GB, whatever the size of the model.
            "reduce_bucket_size": num_params,
            # Replaces torch.nn.functional.linear for the whole process, other
            # contenders included; without it DeepSpeed is no slower on these models.
            "memory_efficient_linear": False,
        },
    }
