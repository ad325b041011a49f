# SPDX-License-Identifier: Apache-2.0
"""Random parameters and batches, and a loss that fits any tree of parameters."""

from __future__ import annotations

from typing import Any

import torch

from zfunc.core.state import Mean
from zfunc.core.tree import PyTree, tree_leaves, tree_map
from zfunc.transforms.remat import remat as rematerialized

NUM_FEATURES = 3
NUM_CLASSES = 4


def random_tree(
    shapes: PyTree, seed: int, *, dtype: torch.dtype = torch.float64
) -> PyTree:
    """Normal numbers of these shapes (leaves of type ``torch.Size``), from a seed.

    The numbers do not depend on the dtype, other than by rounding.

    Example:
      >>> tree = random_tree({"w": torch.Size([2, 3]), "b": torch.Size([])}, seed=0)
      >>> tree["w"].shape, tree["b"].dtype
      (torch.Size([2, 3]), torch.float64)
    """
    generator = torch.Generator().manual_seed(seed)

    def one(shape: torch.Size) -> torch.Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)

    return tree_map(one, shapes, is_leaf=lambda s: isinstance(s, torch.Size))


def random_batch(
    num_samples: int, seed: int, *, dtype: torch.dtype = torch.float64
) -> dict[str, torch.Tensor]:
    """A batch for ``tree_loss``: floats, integers and a 0-d tensor.

    ``weight`` holds whole numbers from 0 to 3, as token counts do; 0 is padding.

    Example:
      >>> {name: tuple(x.shape) for name, x in random_batch(4, seed=0).items()}
      {'kind': (4,), 'scale': (), 'weight': (4,), 'x': (4, 3), 'y': (4,)}
    """
    g = torch.Generator().manual_seed(seed)
    batch = {
        "kind": torch.randint(NUM_CLASSES, (num_samples,), generator=g),
        "scale": 0.5 + torch.rand((), generator=g, dtype=torch.float64),
        "weight": torch.randint(4, (num_samples,), generator=g),
        "x": torch.randn(num_samples, NUM_FEATURES, generator=g, dtype=torch.float64),
        "y": torch.randn(num_samples, generator=g, dtype=torch.float64),
    }
    return {k: x.to(dtype) if x.is_floating_point() else x for k, x in batch.items()}


def tree_loss(
    params: PyTree, batch: PyTree, *, weighted: bool = False, remat: bool = False
) -> tuple[Any, PyTree]:
    r"""A differentiable loss for any tree of parameters; batches as ``random_batch``.

    Per sample :math:`h \leftarrow h + \sum_j \sin(p_j (1 + x + h/4) + j) / \sqrt{|p|}`
    for one leaf p after another, then again for every other leaf (a tied weight); the
    sample's loss is :math:`(h - y)^2` and a penalty on every leaf's mean square. So
    every element of every leaf has a gradient of its own, which depends on every
    sample and on the other leaves, and no two elements may be exchanged.

    Args:
      params: floating tensors of any shapes, also of no elements.
      batch: samples along dim 0.
      weighted: return a ``Mean`` weighted by ``batch["weight"]``, not a plain mean.
      remat: rematerialize each use of a leaf, one block each.

    Returns:
      The loss and the aux: a plain mean and a weighted one.

    Example:
      >>> loss, aux = tree_loss({"w": torch.ones(2, 2)}, random_batch(4, seed=0))
      >>> loss.shape, sorted(aux)
      (torch.Size([]), ['output', 'square'])
    """
    leaves = tree_leaves(params)
    block = rematerialized(_block) if remat else _block
    h = batch["x"].sum(1) * batch["scale"]
    for i, leaf in enumerate([*leaves, *leaves[::2]]):
        h = h + block(leaf, batch["x"][:, i % NUM_FEATURES], batch["kind"], h)
    penalty = sum((leaf.square().sum() / max(1, leaf.numel()) for leaf in leaves), 0.0)
    per_sample = (h - batch["y"]).square() + 0.1 * penalty
    weight = batch["weight"]
    aux = {"output": h.mean(), "square": Mean((weight * h * h).sum(), weight.sum())}
    if weighted:
        return Mean((weight * per_sample).sum(), weight.sum()), aux
    return per_sample.mean(), aux


def _block(
    leaf: torch.Tensor, x: torch.Tensor, kind: torch.Tensor, h: torch.Tensor
) -> torch.Tensor:
    """What one leaf adds to each sample; closed, as ``remat`` needs it."""
    flat = leaf.reshape(-1)
    position = torch.arange(len(flat), device=flat.device)
    phase = (position + kind.unsqueeze(1)).to(x.dtype)
    angle = flat * (1 + x + h / 4).unsqueeze(1) + phase
    value: torch.Tensor = angle.sin().sum(1) / max(1, len(flat)) ** 0.5
    return value
