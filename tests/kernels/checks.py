# SPDX-License-Identifier: Apache-2.0
"""What every kernel is put through: each transformation, and a wrong backward."""

from collections.abc import Callable
from typing import Any
from unittest import mock

import torch
from torch._subclasses import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx

EPS = {
    torch.float64: 2.0**-53,
    torch.float32: 2.0**-24,
    torch.float16: 2.0**-11,
    torch.bfloat16: 2.0**-8,
}


def close(got: Any, expected: Any, bound: float) -> None:
    """Within ``bound`` of the largest expected element, and of its shape."""
    got, expected = got.double(), expected.double()
    assert got.shape == expected.shape
    if got.numel() == 0:
        return
    scale = expected.abs().max().clamp(min=1.0)
    error = (got - expected).abs().max() / scale
    assert error <= bound, f"error {error:.3g}, bound {bound:.3g}"


def under_transforms(
    fn: Callable[..., torch.Tensor],
    reference: Callable[..., torch.Tensor],
    args: tuple[torch.Tensor, ...],
    bound: float,
) -> None:
    """``fn`` is ``reference`` under grad, vjp, vmap both ways around, and make_fx.

    Both take the tensors of ``args``, all floating and differentiable, to one tensor.
    """
    where = tuple(range(len(args)))
    out = reference(*args)
    cotangent = torch.linspace(-1, 1, out.numel()).reshape(out.shape).to(out.dtype)

    def scalar(f: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
        return lambda *xs: (f(*xs) * cotangent).sum()

    values = torch.func.grad_and_value(scalar(fn), where)
    grads, value = values(*args)
    expected, expected_value = torch.func.grad_and_value(scalar(reference), where)(
        *args
    )
    close(value, expected_value, bound * max(1, out.numel()))
    for got, want in zip(grads, expected, strict=True):
        close(got, want, bound)
    pulled = torch.func.vjp(fn, *args)[1](cotangent)
    same(pulled, grads)
    same(make_fx(values)(*args)(*args)[0], grads)
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        fakes = [mode.from_tensor(x) for x in args]
        traced = make_fx(values, _allow_non_fake_inputs=True)(*fakes)
    same(traced(*args)[0], grads)

    stacked = tuple(torch.stack([x, x * 0.5], dim=-1) for x in args)
    per_sample = torch.func.vmap(torch.func.grad(scalar(fn), where), in_dims=-1)
    want = torch.func.vmap(torch.func.grad(scalar(reference), where), in_dims=-1)
    for got, wanted in zip(per_sample(*stacked), want(*stacked), strict=True):
        close(got, wanted, bound)

    def total(f: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
        return lambda *xs: torch.func.vmap(scalar(f), in_dims=-1)(*xs).sum()

    around = torch.func.grad(total(fn), where)(*stacked)
    wanted_around = torch.func.grad(total(reference), where)(*stacked)
    for got, wanted in zip(around, wanted_around, strict=True):
        close(got, wanted, bound)


def same(got: Any, expected: Any) -> None:
    """Equal bit for bit."""
    for a, b in zip(got, expected, strict=True):
        assert torch.equal(a, b)


def backward_is_honoured(
    module: Any, name: str, fn: Callable[..., torch.Tensor], args: tuple[Any, ...]
) -> None:
    """A backward that is wrong on purpose shows in eager gradients and in traced ones.

    ``module.<name>`` is what the backward calls; its results are multiplied by 100.
    """
    right = getattr(module, name)

    def wrong(*xs: Any) -> Any:
        results = right(*xs)
        if isinstance(results, torch.Tensor):
            return 100 * results
        return tuple(None if x is None else 100 * x for x in results)

    gradient = torch.func.grad(lambda *xs: fn(*xs).float().sum())
    expected = 100 * gradient(*args)
    with mock.patch.object(module, name, wrong):
        torch.testing.assert_close(gradient(*args), expected)
        traced = make_fx(gradient)(*args)
    torch.testing.assert_close(traced(*args), expected)
