# SPDX-License-Identifier: Apache-2.0
"""After training: the loss on text not trained on, and text of the model's own."""

from __future__ import annotations

import hashlib
from typing import Any

import torch

import zfunc as zf
from zfunc.cli.config import TrainConfig
from zfunc.data import TokenDataset
from zfunc.models import gpt

MAX_VALIDATION_BATCHES = 8


@torch.no_grad()
def validation_loss(
    params: Any, config: TrainConfig, dataset: TokenDataset, mesh: zf.Mesh, rank: int
) -> float:
    """Mean loss over windows spread evenly over a dataset, in nats per byte.

    Args:
      params: In full.
      config: Of the run.
      dataset: The text; at most 8 global batches of it are read.
      mesh: Its ranks share the windows.
      rank: This one.

    Returns:
      The same value on every rank.
    """
    length = config.seq_len + 1
    windows = len(dataset) // length
    wanted = min(windows, MAX_VALIDATION_BATCHES * config.batch_size)
    mine = [i * windows // wanted * length for i in range(rank, wanted, config.nproc)]
    total = torch.zeros(2, dtype=torch.float64, device=mesh.device)
    size = config.batch_size // config.nproc // config.microbatches
    for first in range(0, len(mine), size):
        starts = mine[first : first + size]
        tokens = torch.stack([dataset.window(start, length) for start in starts])
        batch = {"tokens": tokens.to(mesh.device)}
        mean = gpt.loss(params, batch, config=config.model)
        total += torch.stack([mean.total, mean.weight])
    total = zf.psum(total, "data", mesh)
    return float(total[0] / total[1])


@torch.no_grad()
def sample_text(params: Any, config: TrainConfig, mesh: zf.Mesh) -> str:
    """Text that the model continues a line break with; unprintable bytes as dots."""
    prompt = torch.tensor([[ord("\n")]], device=mesh.device)
    tokens = gpt.sample(
        params,
        prompt,
        config.model,
        num_tokens=config.sample_tokens,
        temperature=config.temperature,
        seed=config.seed,
    )
    text = bytes(tokens[0, 1:].tolist()).decode("utf-8", errors="replace")
    return "".join(c if c.isprintable() or c in "\n\t" else "·" for c in text)


def sha256_of(params: Any) -> str:
    """Of all the bits of the parameters, in the order of their paths."""
    digest = hashlib.sha256()
    for leaf in zf.tree_leaves(params):
        flat = leaf.detach().cpu().contiguous().reshape(-1).view(torch.uint8)
        digest.update(flat.numpy().tobytes())
    return digest.hexdigest()
