# SPDX-License-Identifier: Apache-2.0
"""Training parameters that are stored in bfloat16, without float32 copies of them.

Adding a small update to a bfloat16 number mostly gives that number again: updates below
1/512 of it are lost, all of them. Two wrappers of an optimizer keep them: one remembers
what was lost, the other rounds up or down at random, so that the mean is right.
"""

import hashlib
import math
from typing import Any, Final

import torch
from torch import Tensor

from zfunc.core.random import fold_in
from zfunc.core.sharding import Sharded, is_sharded
from zfunc.core.tree import (
    PyTree,
    check_floating,
    leaves_with_path,
    pytree,
    tree_flatten,
    tree_map,
    tree_unflatten,
)
from zfunc.core.update import added
from zfunc.optim.base import (
    LEAF,
    GradientTransformation,
    check_moments,
    check_updates,
    new_count,
    widen,
)
from zfunc.optim.checks import check_count

_DROPPED_BITS: Final = 16  # of a float32's 24, those that a bfloat16 has not
_KEPT: Final = -(1 << _DROPPED_BITS)


@pytree
class KahanMoments:
    """What ``kahan`` remembers: the optimizer's moments, and what roundings lost.

    Examples:
      >>> from zfunc.optim import sgd
      >>> kahan(sgd(0.1)).init(torch.ones(1, dtype=torch.bfloat16)).compensation
      tensor([0.], dtype=torch.bfloat16)
    """

    inner: PyTree
    compensation: PyTree


def kahan(tx: GradientTransformation) -> GradientTransformation:
    r"""Add the updates of ``tx`` with Kahan's compensation of the rounding.

    With the updates u of ``tx`` and the storage's rounding :math:`\mathrm{fl}`, from
    :math:`c_0 = 0`:

    .. math::
      y_t &= u_t + c_{t-1} \\
      p_{t+1} &= \mathrm{fl}(p_t + y_t) \\
      c_t &= \mathrm{fl}(y_t - (p_{t+1} - p_t))

    The parameters and the compensation together are the sum of all updates: with unit
    roundoff u (1/256 of bfloat16) a step loses at most about :math:`u^2 |p|`, not
    :math:`u |p|`. Memory: 2 bytes per parameter in bfloat16, where a float32 copy has
    4; what ``tx`` remembers stays in float32.

    Args:
      tx: The whole optimizer, down to the learning rate. Nothing that changes updates
        may come after it; a clip by global norm goes before it, as in
        ``chain(clip_by_global_norm(1.0), kahan(adamw(3e-4)))``, so that ``donate``
        still works leaf by leaf.

    Returns:
      A transformation with ``KahanMoments``: those of ``tx`` and one buffer like the
      parameters, in their dtype, whatever it is.

    Raises:
      TypeError: Something that is not a transformation.
      StructureError: (from ``update``) the moments of something else.

    Laws:
      Where the storage rounds nothing off, the updates are those of ``tx``. Padding
      stays zero.

    Examples:
      >>> from zfunc.optim import apply_updates, sgd
      >>> tx, p = kahan(sgd(1.0)), torch.tensor([256.0], dtype=torch.bfloat16)
      >>> moments = tx.init(p)
      >>> for _ in range(4):  # bfloat16 steps by 2 here, and 256.5 rounds to 256
      ...     updates, moments = tx.update(torch.tensor([-0.5]), moments, p)
      ...     p = apply_updates(p, updates)
      >>> p
      tensor([258.], dtype=torch.bfloat16)

    References:
      Kahan, `Further remarks on reducing truncation errors
      <https://doi.org/10.1145/363707.363723>`_, 1965; Zamirai et al., `Revisiting
      BFloat16 Training <https://arxiv.org/abs/2010.06192>`_, 2020, algorithm 1.

    Differs from:
      Zamirai et al. compute the compensation in bfloat16 arithmetic; here it is
      computed in float32 and rounded once. DeepSpeed's ``bf16`` keeps a float32 copy
      of the parameters.
    """
    _check_tx("kahan", tx)

    def init(params: PyTree) -> PyTree:
        check_floating(params, "params")
        return KahanMoments(tx.init(params), tree_map(torch.zeros_like, params))

    def update(
        updates: PyTree, moments: PyTree, params: PyTree
    ) -> tuple[PyTree, PyTree]:
        check_updates(params, updates)
        inner = getattr(moments, "inner", LEAF)
        check_moments("kahan", KahanMoments(inner, updates), moments)
        updates, inner = tx.update(updates, inner, params)
        wanted = tree_map(
            lambda u, c: widen(u) + widen(c), updates, moments.compensation
        )

        def lost(y: Tensor, p: Tensor) -> Tensor:
            moved = widen(added(p, y)) - widen(p)
            return (y - moved).to(p.dtype)

        return wanted, KahanMoments(inner, tree_map(lost, wanted, params))

    return GradientTransformation(
        init, update, leafwise=tx.leafwise, deterministic=tx.deterministic
    )


@pytree
class StochasticRoundingMoments:
    """What ``stochastic_rounding`` remembers: the optimizer's moments, and a count.

    Examples:
      >>> from zfunc.optim import identity
      >>> stochastic_rounding(identity()).init(torch.ones(1))
      StochasticRoundingMoments(inner=(), count=tensor(0))
    """

    inner: PyTree
    count: Tensor


def stochastic_rounding(
    tx: GradientTransformation, key: int = 0
) -> GradientTransformation:
    r"""Round parameters that are stored in bfloat16 up or down at random, without bias.

    Let :math:`s = p + u` in float32, between the neighbours :math:`a < b` in bfloat16.
    The new parameter is b with probability :math:`(s - a) / (b - a)`, else a, so that
    its mean is s; and s itself where bfloat16 has it. The updates that are returned
    lead exactly there. Memory: none that grows with the parameters.

    The 16 random bits of an element are a hash of the key, the number of updates so
    far, the path of the leaf and the element's index in the global tensor: they do not
    depend on the mesh, on which rank holds the element or on what other leaves there
    are.

    Args:
      tx: The whole optimizer, down to the learning rate. Nothing that changes updates
        may come after it; a clip by global norm goes before it.
      key: The seed, at least 0.

    Returns:
      A transformation with ``StochasticRoundingMoments``: those of ``tx``, and a count.
      Leaves of float32 and wider get the updates of ``tx`` as they are.

    Raises:
      TypeError: Something that is not a transformation, or a key that is not an int;
        (from ``init`` and ``update``) a leaf of float16.
      ValueError: A negative key.
      StructureError: (from ``update``) the moments of something else.

    Laws:
      The mean over keys of the new parameters is :math:`p + u`. They are the same bits
      on every mesh, given the same gradients. Padding stays zero.

    Examples:
      >>> from zfunc.optim import apply_updates, sgd
      >>> tx, p = stochastic_rounding(sgd(1.0)), torch.ones(4096, dtype=torch.bfloat16)
      >>> g = torch.full((4096,), -0.25 / 128)  # a quarter of the way to the next
      >>> after = apply_updates(p, tx.update(g, tx.init(p), p)[0])
      >>> after.unique(), bool(((after > 1).double().mean() - 0.25).abs() < 0.02)
      (tensor([1.0000, 1.0078], dtype=torch.bfloat16), True)

    References:
      Gupta et al., `Deep Learning with Limited Numerical Precision
      <https://arxiv.org/abs/1502.02551>`_, 2015; Zamirai et al., `Revisiting BFloat16
      Training <https://arxiv.org/abs/2010.06192>`_, 2020.

    Differs from:
      Elsewhere the bits come from a generator of the device, and so depend on how the
      tensor is divided. An update below :math:`2^{-24} |p|` is lost, as with float32
      parameters.
    """
    _check_tx("stochastic_rounding", tx)
    seed = check_count("stochastic_rounding: key", key, low=0, instead="key=0")

    def init(params: PyTree) -> PyTree:
        count = new_count(params)
        _check_dtypes(params)
        return StochasticRoundingMoments(tx.init(params), count)

    def update(
        updates: PyTree, moments: PyTree, params: PyTree
    ) -> tuple[PyTree, PyTree]:
        check_updates(params, updates)
        _check_dtypes(params)
        inner = getattr(moments, "inner", LEAF)
        expected = StochasticRoundingMoments(inner, LEAF)
        check_moments("stochastic_rounding", expected, moments)
        updates, inner = tx.update(updates, inner, params)
        base = fold_in(torch.full_like(moments.count, seed), moments.count)
        (leaves, spec), given = tree_flatten(params), tree_flatten(updates)[0]
        nodes = leaves_with_path(params, is_sharded)
        chosen = [
            _towards(p, u, fold_in(base, _number(path)), node)
            for (path, node), p, u in zip(nodes, leaves, given, strict=True)
        ]
        after = StochasticRoundingMoments(inner, moments.count + 1)
        return tree_unflatten(spec, chosen), after

    return GradientTransformation(
        init, update, leafwise=tx.leafwise, deterministic=tx.deterministic
    )


def _towards(p: Tensor, u: Tensor, key: Tensor, node: Sharded | Tensor) -> Tensor:
    """The update from ``p`` to one of the two neighbours of ``p + u``.

    ``p`` plus the difference rounds to the neighbour: where that is much smaller than
    ``p``, the difference has as few bits as ``u`` and is exact; else what it is off by
    is far less than half a step of bfloat16.
    """
    if p.dtype != torch.bfloat16:
        return u
    total = (widen(p) + u).to(torch.float32)
    bits = (fold_in(key, _global_index(node)) >> 48) & (_KEPT ^ -1)
    # Sign and magnitude: what is added to the bits is added to the magnitude.
    moved = (total.view(torch.int32) + bits.to(torch.int32)) & _KEPT
    chosen = moved.view(torch.float32)
    return torch.where(total.isfinite(), chosen - widen(p), u.to(torch.float32))


def _global_index(leaf: Sharded | Tensor) -> Tensor:
    """Of each element of this rank's buffer, its row-major index in the whole leaf."""
    buffer = leaf.buffer if isinstance(leaf, Sharded) else leaf
    shape = leaf.global_shape if isinstance(leaf, Sharded) else tuple(leaf.shape)
    spec = tuple(leaf.sharding.spec) if isinstance(leaf, Sharded) else ()
    index = buffer.new_zeros((), dtype=torch.int64)
    for dim, size in enumerate(buffer.shape):
        position = torch.arange(size, device=buffer.device)
        axis = spec[dim] if dim < len(spec) else None
        if axis is not None and isinstance(leaf, Sharded):
            position = position + leaf.sharding.mesh.axis_index(axis) * size
        weighted = position * math.prod(shape[dim + 1 :])
        index = index + weighted.reshape(-1, *[1] * (buffer.dim() - dim - 1))
    return index


def _number(path: str) -> int:
    """A number of 64 bits for a leaf: a step that donates updates a few at a time."""
    digest = hashlib.blake2b(path.encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little")


def _check_tx(name: str, tx: Any) -> None:
    if not isinstance(tx, GradientTransformation):
        raise TypeError(
            f"{name}: tx is a {type(tx).__name__}, expected a GradientTransformation: "
            f"call its maker, as in {name}(adamw(3e-4))"
        )


def _check_dtypes(params: PyTree) -> None:
    for path, leaf in leaves_with_path(params):
        if leaf.dtype == torch.float16:
            raise TypeError(
                f"stochastic_rounding: params[{path!r}] is torch.float16, expected "
                "torch.bfloat16, or float32 and wider, which are added as they are; "
                "make the state with zf.shard(params, mesh, dtype=torch.bfloat16), or "
                "use kahan(tx)"
            )
