# SPDX-License-Identifier: Apache-2.0
"""The optimizers that are measured, on a GPU and on a CPU: tensors, peers and bars."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.optim.adamw import adamw as torch_adamw
from torch.optim.sgd import sgd as torch_sgd

from zfunc.bench.kernel_case import OURS, Bar, Case, Way, public

LR, B1, B2, EPS, DECAY, STEPS = 1e-4, 0.9, 0.95, 1e-8, 0.1, 3
# A parameter of a model's matrices; the last tensor is what is left.
_MATRIX = 1 << 24
# Tensors of the case that has many small ones, as BERT-large has them.
_MANY = 398
_Make = Callable[[torch.device], Any]


class Lists(NamedTuple):
    """What an optimizer reads and writes.

    Attributes:
      params: float32.
      grads: Of the dtype that was asked for.
      mu: float32.
      nu: float32.
      copies: The parameters in the dtype of the gradients.
      steps: 0-d float32 on the device, one per tensor, as torch counts.
      coefficient: 0-d: of a clip.
      rates: 0-d: the learning rate and the two bias corrections.
    """

    params: list[Tensor]
    grads: list[Tensor]
    mu: list[Tensor]
    nu: list[Tensor]
    copies: list[Tensor]
    steps: list[Tensor]
    coefficient: Tensor
    rates: tuple[Tensor, Tensor, Tensor]


def lists(device: torch.device, total: int, size: int, dtype: torch.dtype) -> Lists:
    """Parameters, gradients and moments of so many elements.

    Args:
      device: Where.
      total: Elements of all tensors together.
      size: Of one tensor.
      dtype: Of the gradients and of the copies.
    """
    sizes = [min(size, total - at) for at in range(0, total, size)]

    def filled(value: float, dtype: torch.dtype) -> list[Tensor]:
        return [torch.full((n,), value, device=device, dtype=dtype) for n in sizes]

    wide = torch.float32
    rates = (LR, 1 - B1**STEPS, 1 - B2**STEPS)
    return Lists(
        filled(0.5, wide),
        filled(1e-3, dtype),
        filled(1e-4, wide),
        filled(1e-6, wide),
        filled(0.5, dtype) if dtype != wide else [],
        [torch.full((), float(STEPS), device=device) for _ in sizes],
        torch.full((), 0.5, device=device),
        tuple(torch.full((), rate, device=device) for rate in rates),  # type: ignore[arg-type]
    )


def optimizer_cases(num_params: int) -> Iterator[Case]:
    """Every case of a GPU.

    Args:
      num_params: Elements of all tensors together.
    """
    size = min(_MATRIX, max(1, num_params // 3))
    half = torch.bfloat16
    few = f"{num_params}in{size}"
    many = num_params // min(_MANY, max(4, num_params // 1000))

    def made(size: int, dtype: torch.dtype) -> _Make:
        return lambda device: lists(device, num_params, size, dtype)

    yield Case(
        f"adamw/mixed/bfloat16/{few}",
        28 * num_params,
        _then(made(size, half), adamw_mixed),
        (Bar("roof", 0.92),),
    )
    yield Case(
        f"adamw/same/float32/{few}",
        28 * num_params,
        _then(made(size, torch.float32), adamw_same),
        (Bar("faster", 1.0, "fused"),),
    )
    for name, each in ((few, size), (f"{num_params}in{many}", many)):
        yield Case(
            f"lamb/mixed/float32/{name}",
            40 * num_params,
            _then(made(each, torch.float32), lamb),
            (Bar("roof", 0.85),) if each == size else (),
        )
    yield Case(
        f"lion/mixed/bfloat16/{few}",
        20 * num_params,
        _then(made(size, half), lion),
    )
    yield Case(
        f"sgd/same/float32/{few}",
        20 * num_params,
        _then(made(size, torch.float32), sgd),
    )
    yield Case(
        f"global_norm/bfloat16/{few}",
        2 * num_params,
        _then(made(size, half), global_norm),
        bound=1e-2,
    )


def _then(
    make: _Make, ways: Callable[[Lists], dict[str, Way | str]]
) -> Callable[[torch.device], dict[str, Way | str]]:
    return lambda device: ways(make(device))


def adamw_mixed(x: Lists, kernel: str = "triton") -> dict[str, Way | str]:
    """Low-precision gradient in, clip, float32 update, low-precision copy out.

    Args:
      x: The tensors; all ways write over them.
      kernel: Of ours.
    """

    def chain(*_: Any) -> None:
        grads = [g.float() for g in x.grads]
        torch._foreach_mul_(grads, x.coefficient)
        _fused(x, grads)
        torch._foreach_copy_(x.copies, x.params)

    wide = [g.float() for g in x.grads]

    def fused(*_: Any) -> None:
        _fused(x, wide)

    return {
        OURS: Way(_ours(x, kernel, coefficient=x.coefficient, copies=x.copies), x),
        "chain": Way(chain, x),
        "fused": Way(fused, x),
    }


def adamw_same(x: Lists, kernel: str = "triton") -> dict[str, Way | str]:
    """float32 gradient, no copy: what torch's own does.

    Args:
      x: The tensors; all ways write over them.
      kernel: Of ours.
    """

    def foreach(*_: Any) -> None:
        torch_adamw(
            x.params, x.grads, x.mu, x.nu, [], x.steps,
            foreach=True, capturable=x.params[0].is_cuda, amsgrad=False, beta1=B1,
            beta2=B2, lr=LR, weight_decay=DECAY, eps=EPS, maximize=False,
        )  # fmt: skip

    return {
        OURS: Way(_ours(x, kernel), x),
        "fused": Way(lambda *_: _fused(x, x.grads), x),
        "foreach": Way(foreach, x),
        "compile": compiled(foreach, x),
    }


def compiled(run: Callable[..., None], x: Lists) -> Way | str:
    """An update by ``torch.compile``, on GPUs.

    Args:
      run: The update.
      x: Its tensors.
    """
    if not x.params[0].is_cuda:
        return "torch.compile is measured on GPUs"
    torch._dynamo.reset()
    return Way(torch.compile(run), x)


def _ours(x: Lists, kernel: str, **options: Any) -> Callable[..., Any]:
    fn = public("adamw", "adamw")
    rate, weight1, weight2 = x.rates

    def run(*_: Any) -> Any:
        return fn(
            x.params, x.grads, x.mu, x.nu,
            learning_rate=rate, weight1=weight1, weight2=weight2, b1=B1, b2=B2,
            eps=EPS, weight_decay=DECAY, donate=True, kernel=kernel, **options,
        )  # fmt: skip

    return run


def _fused(x: Lists, grads: list[Tensor]) -> None:
    torch._fused_adamw_(
        x.params, grads, x.mu, x.nu, [], x.steps,
        lr=LR, beta1=B1, beta2=B2, weight_decay=DECAY, eps=EPS, amsgrad=False,
        maximize=False,
    )  # fmt: skip


def lamb(x: Lists) -> dict[str, Way | str]:
    """Ours and the formula tensor by tensor; torch has none.

    Args:
      x: The tensors; all ways write over them.
    """
    fn, (rate, weight1, weight2) = public("lamb", "lamb"), x.rates

    def run(kernel: str) -> Callable[..., Any]:
        return lambda *_: fn(
            x.params, x.grads, x.mu, x.nu,
            learning_rate=rate, weight1=weight1, weight2=weight2, b1=B1, b2=B2,
            weight_decay=DECAY, donate=True, kernel=kernel,
        )  # fmt: skip

    return {OURS: Way(run("triton"), x), "eager": Way(run("reference"), x)}


def lion(x: Lists) -> dict[str, Way | str]:
    """Ours and the formula tensor by tensor; torch has none.

    Args:
      x: The tensors; all ways write over them.
    """
    fn = public("lion", "lion")

    def run(kernel: str) -> Callable[..., Any]:
        return lambda *_: fn(
            x.params, x.grads, x.mu,
            learning_rate=x.rates[0], b1=B1, b2=B2, weight_decay=DECAY,
            coefficient=x.coefficient, copy_dtype=x.grads[0].dtype, donate=True,
            kernel=kernel,
        )  # fmt: skip

    return {OURS: Way(run("triton"), x), "eager": Way(run("reference"), x)}


def sgd(x: Lists) -> dict[str, Way | str]:
    """Momentum, ours and torch's.

    Args:
      x: The tensors; all ways write over them.
    """
    fn = public("sgd", "sgd")

    def ours(*_: Any) -> Any:
        return fn(
            x.params, x.grads, x.mu,
            learning_rate=x.rates[0], momentum=B1, weight_decay=DECAY, donate=True,
            kernel="triton",
        )  # fmt: skip

    def peer(**how: Any) -> Callable[..., None]:
        return lambda *_: torch_sgd(
            x.params, x.grads, x.mu,  # type: ignore[arg-type]
            weight_decay=DECAY, momentum=B1, lr=LR, dampening=0.0, nesterov=False,
            maximize=False, **how,
        )  # fmt: skip

    return {
        OURS: Way(ours, x),
        "fused": Way(peer(fused=True), x),
        "foreach": Way(peer(foreach=True), x),
    }


def global_norm(x: Lists) -> dict[str, Way | str]:
    """The norm of all gradients; ours knows whether they are finite too.

    Args:
      x: The tensors.
    """
    fn = public("global_norm", "global_norm")
    return {
        OURS: Way(lambda *grads: fn(list(grads), kernel="triton").norm, (*x.grads,)),
        "eager": Way(lambda *grads: torch.nn.utils.get_total_norm(grads), (*x.grads,)),
    }
