# SPDX-License-Identifier: Apache-2.0
"""Which parameters are trained: by a predicate on the name or by patterns."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from fnmatch import fnmatchcase
from typing import Any

from zfunc.models.hf.errors import ModelError

Chosen = Callable[[str], bool] | Sequence[str]


def split(
    params: Mapping[str, Any], trainable: Chosen
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Two dicts of parameters: those that are trained, and the others.

    Args:
      params: Leaves by name, plain or placed.
      trainable: A predicate on the name, or patterns as of ``fnmatch``: a name that one
        of them matches is trained.

    Returns:
      ``(trained, frozen)``; ``zf.with_frozen(loss_fn, frozen)`` takes the second.

    Raises:
      ModelError: a pattern that matches nothing, or nothing that is trained.

    Examples:
      >>> split({"a.weight": 1, "a.bias": 2, "head.weight": 3}, ["head.*", "*.bias"])
      ({'a.bias': 2, 'head.weight': 3}, {'a.weight': 1})
    """
    if not isinstance(params, Mapping):
        raise TypeError(
            f"split takes a dict of parameters by name, got a {type(params).__name__}"
        )
    is_trained = chooser(trainable, list(params), "trainable")
    trained = {name: leaf for name, leaf in params.items() if is_trained(name)}
    if not trained:
        raise ModelError(
            "trainable chooses no parameter: there would be nothing to train. The "
            f"names are such as {', '.join(list(params)[:3])}."
        )
    return trained, {name: x for name, x in params.items() if name not in trained}


def chooser(chosen: Chosen, names: Sequence[str], what: str) -> Callable[[str], bool]:
    """The predicate that patterns stand for; each of them has to match a name."""
    if callable(chosen):
        return chosen
    if isinstance(chosen, str) or not isinstance(chosen, Sequence):
        raise TypeError(
            f"{what} is a predicate on the name or a list of patterns such as "
            f"['*.bias'], got {chosen!r}"
        )
    for pattern in chosen:
        if not any(fnmatchcase(name, pattern) for name in names):
            raise ModelError(
                f"{what}: {pattern!r} matches none of the names, such as "
                f"{', '.join(list(names)[:3])}."
            )
    return lambda name: any(fnmatchcase(name, pattern) for pattern in chosen)
