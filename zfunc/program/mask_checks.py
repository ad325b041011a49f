# SPDX-License-Identifier: Apache-2.0
"""Telling transformers that it is being traced.

Its mask code looks at values (is anything padded? are sequences packed?) unless it is
being traced, which it asks of each tensor; it does not see a fake tensor inside the
wrappers of torch.func.
"""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator
from typing import Any

import torch
from torch.fx.experimental import proxy_tensor


@contextlib.contextmanager
def told_of_tracing() -> Iterator[None]:
    """Answer transformers' questions for tensors of this trace; then all is as it was.

    A check on positions that are the same whatever the batch (``arange``) is answered
    by computing it, so that no explicit mask takes the place of SDPA's causal path.
    """
    masking: Any = sys.modules.get("transformers.masking_utils")
    if masking is None:
        yield
        return
    is_tracing, packed = masking.is_tracing, masking.find_packed_sequence_indices

    def asked(tensor: Any = None) -> Any:
        inner = _innermost(tensor)
        return is_tracing(inner) or isinstance(inner, torch._subclasses.FakeTensor)

    def find_packed(position_ids: torch.Tensor) -> Any:
        value = _constant(position_ids)
        if value is not None and not _any_packed(value):
            return None
        return packed(position_ids)

    masking.is_tracing, masking.find_packed_sequence_indices = asked, find_packed
    try:
        yield
    finally:
        masking.is_tracing, masking.find_packed_sequence_indices = is_tracing, packed


def _any_packed(position_ids: torch.Tensor) -> bool:
    """True where positions do not rise by one: several sequences in a row."""
    with _for_real():
        return bool((position_ids.diff(dim=-1) != 1).any())


@contextlib.contextmanager
def _for_real() -> Iterator[None]:
    """Run operators on the tensors themselves: no fakes, no trace, no torch.func."""
    modes = torch.utils._python_dispatch._disable_current_modes
    with modes(), torch._C._DisableFuncTorch():
        yield


def _innermost(tensor: Any) -> Any:
    while isinstance(
        tensor, torch.Tensor
    ) and torch._C._functorch.is_functorch_wrapped_tensor(tensor):
        tensor = torch._C._functorch.get_unwrapped(tensor)
    return tensor


def _constant(tensor: torch.Tensor) -> Any:
    """The tensor's value where the trace computes it from no input, else None."""
    tracer = proxy_tensor._CURRENT_MAKE_FX_TRACER
    inner = _innermost(tensor)
    if tracer is None or not isinstance(inner, torch._subclasses.FakeTensor):
        return None
    fx_tracer = proxy_tensor.get_proxy_mode().tracer  # type: ignore[union-attr]
    proxy = proxy_tensor.get_proxy_slot(inner, fx_tracer, None, lambda p: p.proxy)
    if proxy is None:
        return None
    return _computed(proxy.node, {})


def _computed(node: Any, known: dict[Any, Any]) -> Any:
    """Run a node's ancestors for real; None where one is an input."""
    if node in known:
        return known[node]
    if node.op != "call_function":
        return None
    values = {n: _computed(n, known) for n in node.all_input_nodes}
    if any(value is None for value in values.values()):
        known[node] = None
        return None
    args, kwargs = torch.fx.map_arg((node.args, node.kwargs), values.__getitem__)
    with _for_real():
        known[node] = node.target(*args, **kwargs)
    return known[node]
