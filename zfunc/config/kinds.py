# SPDX-License-Identifier: Apache-2.0
"""The kinds of values that keys have, each checked by pydantic."""

from __future__ import annotations

from types import MappingProxyType
from typing import Annotated, Any, Final, Literal, NamedTuple, TypeAlias

from pydantic import BeforeValidator, Field, TypeAdapter, ValidationError

from zfunc.config.errors import shown

_LARGEST: Final = 2**63 - 1  # sys.maxsize is a default of DeepSpeed


class Kind(NamedTuple):
    """What a value has to be: the check, and the words of the message.

    Examples:
      >>> COUNT.check(5e8)
      500000000
      >>> COUNT.check("5")
      Traceback (most recent call last):
      ValueError: an integer, 0 or more
    """

    adapter: Any
    words: str
    example: Any

    def check(self, value: Any) -> Any:
        """The value in the type that it is used in.

        Raises:
          ValueError: it is not of this kind; the message says what is.
        """
        try:
            return self.adapter.validate_python(value)
        except (ValidationError, OverflowError, RecursionError) as error:
            raise ValueError(self.words) from error


def _number(value: Any) -> Any:
    """What JSON has as numbers; pydantic would take true and "5" for them too."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise ValueError("no number")
    if isinstance(value, int) and abs(value) > _LARGEST:
        raise ValueError("too large")
    return value


def _text(value: Any) -> Any:
    if not isinstance(value, str):
        raise ValueError("no string")
    return value


def integer(low: int, high: int = _LARGEST, example: int | None = None) -> Kind:
    """Integers of an interval, also written as 5e8."""
    checked = Annotated[int, BeforeValidator(_number), Field(ge=low, le=high)]
    words = f"an integer, {low} or more"
    if high != _LARGEST:
        words = f"an integer from {low} to {high}"
    first = low if example is None else example
    return Kind(TypeAdapter(checked), words, first)


def number(
    low: float | None = None,
    high: float | None = None,
    *,
    below_high: bool = False,
    example: float = 0.1,
) -> Kind:
    """Finite numbers of an interval; ``high`` is included unless ``below_high``."""
    bounds: dict[str, Any] = {"allow_inf_nan": False}
    words = "a number"
    if low is not None:
        bounds["ge"] = low
        words = f"a number, {low:g} or more"
    if high is not None:
        bounds["lt" if below_high else "le"] = high
        words = f"a number of [{low:g}, {high:g}{')' if below_high else ']'}"
    checked = Annotated[float, BeforeValidator(_number), Field(**bounds)]
    return Kind(TypeAdapter(checked), words, example)


def one_of(*names: str) -> Kind:
    """One of some strings, in any case."""

    def lowered(value: Any) -> Any:
        by_case = {name.lower(): name for name in names}
        return by_case.get(_text(value).lower())

    checked: Any = Annotated[Literal[names], BeforeValidator(lowered)]
    quoted = [shown(name) for name in names]
    words = f"{', '.join(quoted[:-1])} or {quoted[-1]}" if names[1:] else quoted[0]
    return Kind(TypeAdapter(checked), words, names[0])


def _pair(value: Any) -> Any:
    if not isinstance(value, list | tuple):
        raise ValueError("no list")
    return tuple(value)


def _strict_bool(value: Any) -> Any:
    if not isinstance(value, bool):
        raise ValueError("no bool")
    return value


def _single(value: Any) -> Any:
    """DeepSpeed takes a list of one rate for each parameter group; here is one."""
    return value[0] if isinstance(value, list | tuple) and len(value) == 1 else value


def _dtype(value: Any) -> Any:
    return _DTYPES_BY_NAME.get(_text(value).lower().removeprefix("torch."))


def _names(*groups: tuple[str, ...]) -> dict[str, str]:
    return {name: group[0] for group in groups for name in group}


_DTYPES_BY_NAME: Final = MappingProxyType(
    _names(
        ("fp32", "float32", "float"),
        ("fp16", "float16", "half"),
        ("bf16", "bfloat16"),
    )
)
_BETA: TypeAlias = Annotated[float, BeforeValidator(_number), Field(ge=0, lt=1)]
_RATE: TypeAlias = Annotated[
    float,
    BeforeValidator(lambda value: _number(_single(value))),
    Field(ge=0, allow_inf_nan=False),
]

BOOL: Final = Kind(
    TypeAdapter(Annotated[bool, BeforeValidator(_strict_bool)]), "true or false", True
)
COUNT: Final = integer(0, example=0)
POSITIVE: Final = integer(1, example=8)
ANY_INTEGER: Final = integer(-_LARGEST - 1, example=-1)
ANY_NUMBER: Final = number(example=1.0)
NOT_NEGATIVE: Final = number(0, example=0.1)
RATIO: Final = number(0, 1, example=0.1)
BELOW_ONE: Final = number(0, 1, below_high=True, example=0.9)
RATE: Final = Kind(TypeAdapter(_RATE), "a number, 0 or more", 1e-3)
BETAS: Final = Kind(
    TypeAdapter(Annotated[tuple[_BETA, _BETA], BeforeValidator(_pair)]),
    "two numbers of [0, 1)",
    [0.9, 0.999],
)
# accelerate writes infinity for "never".
COUNT_OR_NEVER: Final = Kind(
    TypeAdapter(Annotated[float, BeforeValidator(_number), Field(ge=0)]),
    "a number, 0 or more",
    100,
)
TEXT: Final = Kind(
    TypeAdapter(Annotated[str, BeforeValidator(_text)]), "a string", "name"
)
DTYPE: Final = Kind(
    TypeAdapter(Annotated[Literal["fp32", "fp16", "bf16"], BeforeValidator(_dtype)]),
    '"fp32", "fp16" or "bf16"',
    "fp32",
)
DEVICE: Final = one_of("none", "cpu", "nvme")
# The content of a feature that is not here: its "enabled" is read and nothing else.
ANYTHING: Final = Kind(TypeAdapter(Any), "anything", None)
LIST: Final = Kind(
    TypeAdapter(Annotated[tuple[Any, ...], BeforeValidator(_pair)]), "a list", []
)
