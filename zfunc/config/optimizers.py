# SPDX-License-Identifier: Apache-2.0
"""The section ``optimizer``: DeepSpeed's optimizers and those of torch, by name."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any, Final, NamedTuple

import torch
from torch import Tensor

from zfunc.config.keys import Key, meaningless, refused, supported
from zfunc.config.kinds import (
    BELOW_ONE,
    BETAS,
    BOOL,
    NOT_NEGATIVE,
    RATE,
    Kind,
    number,
    one_of,
)
from zfunc.config.schedules import Rates
from zfunc.core.sharding import Sharded
from zfunc.optim.adafactor import adafactor
from zfunc.optim.adagrad import adagrad
from zfunc.optim.adam import adam
from zfunc.optim.adamw import adamw
from zfunc.optim.base import GradientTransformation, chain
from zfunc.optim.decay import add_decayed_weights
from zfunc.optim.lamb import _uncorrected, lamb
from zfunc.optim.lion import lion
from zfunc.optim.muon import muon
from zfunc.optim.rmsprop import rmsprop
from zfunc.optim.scale_by_adam import scale_by_adam
from zfunc.optim.schedule_values import as_float, value_at
from zfunc.optim.schedules import Schedule, scale_by_learning_rate
from zfunc.optim.sgd import sgd

PARAMS: Final = "optimizer.params."
Params = Mapping[str, Any]


class Optimizer(NamedTuple):
    """An optimizer of a configuration.

    Attributes:
      keys: Its parameters.
      make: From all parameters and the schedule (and, of Muon, that of the rest).
      has_betas: Whether ``OneCycle`` cycles its momentum in DeepSpeed.
    """

    keys: tuple[Key, ...]
    make: Callable[[Params, Rates, Schedule], GradientTransformation]
    has_betas: bool = False


def _options(*options: tuple[str, Kind, Any, str]) -> tuple[Key, ...]:
    return tuple(
        supported(f"{PARAMS}{name}", kind, default, note)
        for name, kind, default, note in options
    )


def _loops(*names: str) -> tuple[Key, ...]:
    note = "how the optimizer loops over tensors"
    return tuple(meaningless(f"{PARAMS}{name}", BOOL, None, note) for name in names)


def _never(name: str, default: Any, instead: str) -> Key:
    return refused(f"{PARAMS}{name}", BOOL, default, instead)


def _shared(lr: float, decay: float = 0.0) -> tuple[Key, ...]:
    return (
        *_options(
            ("lr", RATE, lr, "`learning_rate`"),
            ("weight_decay", NOT_NEGATIVE, decay, "`weight_decay`"),
        ),
        refused(
            f"{PARAMS}max_grad_norm",
            NOT_NEGATIVE,
            None,
            "DeepSpeed does not take it either: type gradient_clipping at the top",
            off=(0,),
        ),
    )


_TORCH: Final = (
    *_loops("foreach", "fused", "capturable", "differentiable", "set_grad_none"),
    _never("maximize", False, "type false, and negate the loss"),
)
_FP32_STATES: Final = _never(
    "fp32_optimizer_states", None, "moments are fp32"
)._replace(off=(True,))
_AMSGRAD: Final = _never("amsgrad", False, "there is no AMSGrad: type false")
_ADAM: Final = (
    *_shared(1e-3),
    *_options(
        ("betas", BETAS, (0.9, 0.999), "`b1`, `b2`"),
        ("eps", NOT_NEGATIVE, 1e-8, "`eps`"),
        (
            "adam_w_mode",
            BOOL,
            True,
            "true (also of `Adam`) is `zf.optim.adamw`, false `zf.optim.adam`",
        ),
        (
            "torch_adam",
            BOOL,
            False,
            "torch's AdamW, whose default `weight_decay` is 0.01",
        ),
        ("bias_correction", BOOL, True, "false leaves Adam's two means as they are"),
    ),
    _AMSGRAD,
    _FP32_STATES,
    *_TORCH,
)


def _adam(params: Params, rates: Rates, _: Schedule) -> GradientTransformation:
    b1, b2 = params["betas"]
    if rates.momentum is not None:
        b1, b2 = rates.momentum, 0.99  # OneCycle sets both
    decay, eps = params["weight_decay"], params["eps"]
    if not params["bias_correction"]:
        return _adam_uncorrected(params, b1, b2, rates.learning_rate)
    make = adamw if params["adam_w_mode"] else adam
    return make(rates.learning_rate, b1, b2, eps, decay)


def _adam_uncorrected(
    params: Params, b1: Any, b2: float, rate: Schedule
) -> GradientTransformation:
    if callable(b1):
        raise ValueError(
            "one_cycle: cycle_momentum is true and bias_correction false, expected one "
            'of them the other way; type "cycle_momentum": false'
        )
    eps, decay = params["eps"], add_decayed_weights(params["weight_decay"])
    means = scale_by_adam(b1, b2, eps)._replace(update=_uncorrected(b1, b2, eps))
    parts = (means, decay) if params["adam_w_mode"] else (decay, means)
    return chain(*parts, scale_by_learning_rate(rate))


def _lamb(params: Params, rates: Rates, _: Schedule) -> GradientTransformation:
    _check_no_momentum("Lamb", rates)
    b1, b2 = params["betas"]
    rate = rates.learning_rate
    if params["bias_correction"]:
        rate = _corrected(rate, b1, b2)
    return lamb(
        rate,
        b1,
        b2,
        params["eps"],
        params["weight_decay"],
        bias_correction=False,
        max_coeff=params["max_coeff"],
        min_coeff=params["min_coeff"],
    )


def _corrected(rate: Schedule, b1: float, b2: float) -> Schedule:
    """DeepSpeed's LAMB multiplies Adam's bias corrections into the rate."""

    def corrected(step: Tensor) -> Tensor:
        t = as_float(step) + 1
        factor = (1 - torch.pow(b2, t)).sqrt() / (1 - torch.pow(b1, t))
        return value_at("the schedule", rate, step).to(torch.float64) * factor

    return corrected


def _lion(params: Params, rates: Rates, _: Schedule) -> GradientTransformation:
    _check_no_momentum("Lion", rates)
    b1, b2 = params["betas"]
    return lion(rates.learning_rate, b1, b2, params["weight_decay"])


def _check_no_momentum(name: str, rates: Rates) -> None:
    if rates.momentum is not None:
        raise ValueError(
            f"one_cycle: cycle_momentum is true with {name}, expected false: only "
            'Adam has a schedule for its first beta; type "cycle_momentum": false'
        )


def _adagrad(params: Params, rates: Rates, _: Schedule) -> GradientTransformation:
    return adagrad(
        rates.learning_rate,
        params["lr_decay"],
        params["weight_decay"],
        params["initial_accumulator_value"],
        params["eps"],
    )


def _sgd(params: Params, rates: Rates, _: Schedule) -> GradientTransformation:
    momentum = params["momentum"]
    return sgd(
        rates.learning_rate,
        momentum,
        params["nesterov"],
        params["weight_decay"],
        params["dampening"] if momentum else 0.0,
    )


def _rmsprop(params: Params, rates: Rates, _: Schedule) -> GradientTransformation:
    names = ("alpha", "eps", "weight_decay", "momentum", "centered")
    return rmsprop(rates.learning_rate, *(params[name] for name in names))


def _adafactor(params: Params, rates: Rates, _: Schedule) -> GradientTransformation:
    return adafactor(
        rates.learning_rate,
        weight_decay=params["weight_decay"],
        b2_decay=-0.8,
        eps1=torch.finfo(torch.float32).eps,
        eps2=1e-3,
        clip=params["d"],
    )


def tagged_matrices(path: str, leaf: Sharded | Tensor) -> bool:
    """The parameters that DeepSpeed gives to Muon: matrices, embeddings and head not.

    Args:
      path: Where the leaf is.
      leaf: The parameter.

    Examples:
      >>> w = torch.ones(2, 2)
      >>> tagged_matrices("layers.0.up.weight", w), tagged_matrices("lm_head.weight", w)
      (True, False)
    """
    shape = leaf.global_shape if isinstance(leaf, Sharded) else leaf.shape
    words = ("embed", "lm_head")
    return len(shape) == 2 and not any(word in path.lower() for word in words)


def _muon(params: Params, rates: Rates, rest: Schedule) -> GradientTransformation:
    return muon(
        rates.learning_rate,
        params["momentum"],
        params["weight_decay"],
        adam_learning_rate=rest,
        b1=params["betas"][0],
        b2=params["betas"][1],
        eps=params["eps"],
        mask=tagged_matrices,
    )


OPTIMIZERS: Final[Mapping[str, Optimizer]] = MappingProxyType(
    {
        "Adam": Optimizer(_ADAM, _adam, has_betas=True),
        "AdamW": Optimizer(_ADAM, _adam, has_betas=True),
        "Lamb": Optimizer(
            (
                *_shared(1e-3),
                *_options(
                    ("betas", BETAS, (0.9, 0.999), "`b1`, `b2`"),
                    ("eps", NOT_NEGATIVE, 1e-8, "`eps`"),
                    (
                        "bias_correction",
                        BOOL,
                        True,
                        "a factor of the rate, as in DeepSpeed's kernel",
                    ),
                    ("max_coeff", NOT_NEGATIVE, 10.0, "`max_coeff`"),
                    ("min_coeff", NOT_NEGATIVE, 0.01, "`min_coeff`"),
                ),
                _never("eps_inside_sqrt", False, "eps is beside the root: type false"),
                _AMSGRAD,
            ),
            _lamb,
            has_betas=True,
        ),
        "Lion": Optimizer(
            (
                *_shared(1e-3),
                *_options(("betas", BETAS, (0.9, 0.999), "`b1`, `b2`")),
                _FP32_STATES,
                *_loops("set_grad_none"),
            ),
            _lion,
            has_betas=True,
        ),
        "Adagrad": Optimizer(
            (
                *_shared(1e-2),
                *_options(
                    ("lr_decay", NOT_NEGATIVE, 0.0, "`lr_decay`"),
                    ("initial_accumulator_value", NOT_NEGATIVE, 0.0, "the same"),
                    ("eps", NOT_NEGATIVE, 1e-10, "`eps`"),
                ),
                _AMSGRAD,
                _FP32_STATES,
                *_TORCH,
            ),
            _adagrad,
        ),
        "Muon": Optimizer(
            (
                *_shared(2e-2),
                *_options(
                    ("momentum", BELOW_ONE, 0.95, "`momentum`"),
                    ("muon_lr", RATE, None, "of matrices, instead of `lr`"),
                    ("adam_lr", RATE, None, "of the rest, instead of `lr` or 3e-4"),
                    ("betas", BETAS, (0.9, 0.95), "`b1`, `b2` of the rest"),
                    ("eps", NOT_NEGATIVE, 1e-10, "`eps` of the rest"),
                ),
                meaningless(
                    f"{PARAMS}ns_method",
                    one_of("gram", "standard"),
                    "gram",
                    "two orders of one product; it is computed in fp32 here",
                ),
                _never("adam_w_mode", True, "the rest decays decoupled: type true"),
                _never("per_head_muon", False, "whole matrices only: type false"),
                _FP32_STATES,
                *_loops("torch_adam", "foreach"),
            ),
            _muon,
        ),
        "SGD": Optimizer(
            (
                *_shared(1e-3),
                *_options(
                    ("momentum", NOT_NEGATIVE, 0.0, "`momentum`"),
                    ("dampening", NOT_NEGATIVE, 0.0, "`dampening`, with momentum"),
                    ("nesterov", BOOL, False, "`nesterov`"),
                ),
                *_TORCH,
            ),
            _sgd,
        ),
        "RMSprop": Optimizer(
            (
                *_shared(1e-2),
                *_options(
                    ("alpha", BELOW_ONE, 0.99, "`alpha`"),
                    ("eps", NOT_NEGATIVE, 1e-8, "`eps`"),
                    ("momentum", NOT_NEGATIVE, 0.0, "`momentum`"),
                    ("centered", BOOL, False, "`centered`"),
                ),
                *_TORCH,
            ),
            _rmsprop,
        ),
        "Adafactor": Optimizer(
            (
                *_shared(1e-2),
                *_options(("d", number(1, example=1.0), 1.0, "`clip`")),
                *_TORCH,
            ),
            _adafactor,
        ),
    }
)
_COMPRESSED: Final = (
    "compressed communication is not here yet, and DeepSpeed removed it"
)
# Names that are refused, and what to type.
REFUSED_NAMES: Final = MappingProxyType(
    {
        "OneBitAdam": (_COMPRESSED, "Adam"),
        "OneBitLamb": (_COMPRESSED, "Lamb"),
        "ZeroOneAdam": (_COMPRESSED, "Adam"),
        "MuAdam": ("muP's rates per layer are not here", "Adam"),
        "MuAdamW": ("muP's rates per layer are not here", "AdamW"),
        "MuSGD": ("muP's rates per layer are not here", "SGD"),
    }
)
# DeepSpeed's own names are read in any case, those of torch are not.
_ANY_CASE: Final = frozenset({"adam", "adamw", "lamb", "lion", "adagrad", "muon"})


def named(name: str) -> str:
    """The name in the table of an optimizer's ``type``, or the type as it is.

    Examples:
      >>> named("ADAMW"), named("sgd")
      ('AdamW', 'sgd')
    """
    if name.lower() in _ANY_CASE:
        return next(each for each in OPTIMIZERS if each.lower() == name.lower())
    return name
