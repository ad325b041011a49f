# SPDX-License-Identifier: Apache-2.0
"""``accumulate``: the gradient of a batch from its microbatches."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from zfunc.core.step import GradFn, TrainStep, Transform
from zfunc.core.tally import Samples, named, sample_counts
from zfunc.core.tree import PyTree, tree_flatten, tree_map, tree_unflatten
from zfunc.core.update import widen
from zfunc.transforms import loop


def accumulate(num_microbatches: int) -> Transform:
    r"""Split the batch along dim 0 and add up the microbatches' gradients.

    :math:`\nabla \frac{\sum_i t_i}{\sum_i w_i}` over the microbatches i: exact for a
    loss that returns ``Mean(total, weight)``; a plain scalar weighs 1 each, which is
    the mean over equal microbatches. Activations of one microbatch are alive at a time;
    sums are in float32 at least. Nests: ``accumulate(a)`` and ``accumulate(b)`` make
    ``a * b`` microbatches.

    Args:
      num_microbatches: must divide dim 0 of every tensor of the rank's batch. 0-d
        tensors and other values are given to every microbatch as they are.

    Raises:
      ValueError: not a positive count; (when called) a batch that it does not divide.

    Laws: equal to the whole batch at once; ``accumulate(a)`` after ``accumulate(b)`` is
    ``accumulate(ab)``; commutes with partition and precision.

    Differs from DeepSpeed: no boundary flag and no ``backward`` to call n times; the
    batch is the whole step's.

    Example:
      >>> import zfunc as zf
      >>> step = zf.train_step(
      ...     lambda p, b: (p * b).mean(), zf.optim.sgd(1.0), zf.accumulate(2)
      ... )
      >>> state = zf.shard(torch.ones(()), zf.make_mesh({}))
      >>> step(state, torch.tensor([1.0, 2.0, 3.0, 6.0])).grads.buffer
      tensor(3.)
    """
    n = num_microbatches
    if isinstance(n, bool) or not isinstance(n, int) or n < 1:
        raise ValueError(f"accumulate: num_microbatches is an int >= 1, got {n!r}")

    def transform(step: TrainStep) -> TrainStep:
        outer = step.accumulate
        name = f"{getattr(outer, '__name__', 'accumulate')} . accumulate({n})"
        return step._replace(
            accumulate=named(lambda grad_fn: outer(microbatched(grad_fn, n)), name)
        )

    return named(transform, f"accumulate({n})")


@dataclass(frozen=True, eq=False)
class Microbatched:
    """A function of gradients, added up over ``n`` microbatches in order."""

    grad_fn: GradFn
    n: int

    def __call__(self, params: PyTree, batch: PyTree, samples: Samples) -> Any:
        """The sums of what ``grad_fn`` returns."""
        n, num_samples = self.n, len(samples.index)
        batches = _split(batch, n)
        if loop.is_tracing():
            return _traced(self.grad_fn, n, params, batch, samples)
        indices = samples.index.chunk(n) if num_samples else [samples.index] * n
        totals: list[torch.Tensor] = []
        spec: Any = None
        for microbatch, index in zip(batches, indices, strict=True):
            which = Samples(samples.key, index, samples.loss_scale)
            out = self.grad_fn(params, microbatch, which)
            leaves, spec = tree_flatten(out)
            del out
            _add_up(totals, leaves)
        return tree_unflatten(spec, totals)


def microbatched(grad_fn: GradFn, n: int) -> GradFn:
    """``Microbatched``, or the function itself for one microbatch."""
    return grad_fn if n == 1 else Microbatched(grad_fn, n)


def _traced(
    grad_fn: GradFn, n: int, params: PyTree, batch: PyTree, samples: Samples
) -> Any:
    """The same sum as one node of the traced program."""
    leaves, spec = tree_flatten((batch, samples.index))
    sliced = [
        i
        for i, x in enumerate(leaves)
        if isinstance(x, torch.Tensor) and x.dim() and x.shape[0]
    ]
    rest = [i for i, x in enumerate(leaves) if i not in sliced]
    tensors = [i for i in rest if isinstance(leaves[i], torch.Tensor)]
    weights, params_spec = tree_flatten((params, samples.key, samples.loss_scale))
    out_spec: list[Any] = []

    def one(operands: list[torch.Tensor]) -> list[torch.Tensor]:
        values = list(leaves)
        for i, x in zip(sliced + tensors, operands, strict=False):
            values[i] = x
        piece, index = tree_unflatten(spec, values)
        params, key, scale = tree_unflatten(
            params_spec, operands[len(sliced) + len(tensors) :]
        )
        outs, structure = tree_flatten(
            grad_fn(params, piece, Samples(key, index, scale))
        )
        out_spec.append(structure)
        return [widen(x) for x in outs]

    whole = [leaves[i] for i in tensors] + weights
    totals = loop.traced_sum(one, n, [leaves[i] for i in sliced], whole)
    return tree_unflatten(out_spec[-1], totals)


def _add_up(totals: list[torch.Tensor], leaves: list[torch.Tensor]) -> None:
    """Add the leaves to the totals, letting go of each on the way."""
    for i in range(len(leaves)):
        wide = widen(leaves[i])
        leaves[i] = wide.new_empty(0)
        if i == len(totals):
            totals.append(wide)
        else:
            totals[i] = totals[i] + wide
        del wide


def _split(batch: PyTree, n: int) -> list[PyTree]:
    sizes = sample_counts(batch, f"accumulate({n})")
    for path, size in sizes.items():
        if size % n:
            raise ValueError(
                f"accumulate({n}): batch[{path!r}] has {size} samples on this "
                f"rank, which {n} does not divide: give a multiple of {n}, or another "
                "num_microbatches."
            )

    def piece(i: int) -> PyTree:
        def one(x: Any) -> Any:
            if not isinstance(x, torch.Tensor) or not x.dim():
                return x
            size = x.shape[0] // n
            return x[i * size : (i + 1) * size]

        return tree_map(one, batch)

    return [piece(i) for i in range(n)]
