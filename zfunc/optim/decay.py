# SPDX-License-Identifier: Apache-2.0
"""Weight decay, for all leaves or for those that a mask picks."""

from collections.abc import Callable
from typing import Any

from torch import Tensor

from zfunc.core.sharding import Sharded, is_sharded
from zfunc.core.tree import (
    PyTree,
    leaves_with_path,
    tree_map,
    tree_structure,
    tree_unflatten,
)
from zfunc.optim.base import (
    GradientTransformation,
    check_updates,
    identity,
    stateless,
    widen,
)
from zfunc.optim.checks import check_number

Mask = Callable[[str, Any], bool]


def decay_matrices(path: str, leaf: Sharded | Tensor) -> bool:
    """The usual mask: decay what has two dims or more, not biases and norm scales.

    Args:
      path: Where the leaf is, as ``"layers/0/w"``.
      leaf: The parameter; of a ``Sharded`` one the global shape counts.

    Returns:
      Whether the leaf decays.

    Examples:
      >>> import torch
      >>> decay_matrices("w", torch.ones(2, 3)), decay_matrices("b", torch.ones(3))
      (True, False)

    Differs from:
      nanoGPT's rule is the same; Hugging Face's goes by the types and names of
      modules. A bias or scale that is stacked over layers has two dims: write a mask
      that looks at the path.
    """
    shape = leaf.global_shape if isinstance(leaf, Sharded) else leaf.shape
    return len(shape) >= 2


def add_decayed_weights(
    weight_decay: float, mask: Mask | None = None
) -> GradientTransformation:
    r"""Add :math:`\lambda p` to the update of each leaf that the mask picks.

    Before the moments it is an L2 penalty (``sgd``, ``adam``); after them, and before
    the learning rate, it is decoupled (``adamw``).

    Args:
      weight_decay: :math:`\lambda`, at least 0; 0 costs nothing.
      mask: ``(path, leaf) -> bool``; None picks every leaf. The path reads
        ``layers/0/w``, the leaf is the tensor or ``Sharded`` node. Must not depend on
        values.

    Returns:
      A transformation without moments.

    Raises:
      TypeError: A decay that is not a number; a mask that is not a function, or (from
        ``init`` and ``update``) that returns something else than a bool.
      ValueError: A negative decay.
      StructureError: (from ``update``) updates that are not like the parameters.

    Examples:
      >>> import torch
      >>> tx = add_decayed_weights(0.1, lambda path, leaf: not path.endswith("bias"))
      >>> params = {"bias": torch.ones(1), "w": torch.ones(1)}
      >>> zeros = {"bias": torch.zeros(1), "w": torch.zeros(1)}
      >>> tx.update(zeros, tx.init(params), params)[0]
      {'bias': tensor([0.]), 'w': tensor([0.1000])}

    References:
      Loshchilov and Hutter, `Decoupled Weight Decay Regularization
      <https://arxiv.org/abs/1711.05101>`_, 2019.

    Differs from:
      optax takes a tree of bools as the mask, or a function from the tree to one.
      ``torch.optim`` has parameter groups instead.
    """
    decay = check_number(
        "add_decayed_weights: weight_decay", weight_decay, instead="weight_decay=0.01"
    )
    if mask is not None and not callable(mask):
        raise TypeError(
            f"add_decayed_weights: mask is a {type(mask).__name__}, expected a "
            "function (path, leaf) -> bool; type for example mask=decay_matrices"
        )
    if decay == 0:
        return identity()

    def init(params: PyTree) -> PyTree:
        picked(mask, params)  # a wrong mask is found here, before any step
        return ()

    def add(updates: PyTree, params: PyTree) -> PyTree:
        check_updates(params, updates)
        return tree_map(
            lambda pick, u, p: widen(u) + decay * widen(p) if pick else widen(u),
            picked(mask, params),
            updates,
            params,
        )

    return stateless("add_decayed_weights", add)._replace(init=init)


def picked(mask: Mask | None, params: PyTree) -> PyTree:
    """A tree like ``params`` with the mask's bool in the place of each buffer.

    Args:
      mask: ``(path, leaf) -> bool``; None picks every leaf.
      params: Parameters.

    Raises:
      TypeError: The mask returned something else.

    Examples:
      >>> import torch
      >>> picked(decay_matrices, {"b": torch.ones(3), "w": torch.ones(2, 3)})
      {'b': False, 'w': True}
    """
    flags = []
    for path, leaf in leaves_with_path(params, is_sharded):
        flag = True if mask is None else mask(path, leaf)
        if not isinstance(flag, bool):
            raise TypeError(
                f"add_decayed_weights: mask({path!r}, leaf) returned a "
                f"{type(flag).__name__}, expected True or False; type for example "
                "lambda path, leaf: not path.endswith('bias')"
            )
        flags.append(flag)
    return tree_unflatten(tree_structure(params), flags)
