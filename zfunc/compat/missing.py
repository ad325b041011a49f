# SPDX-License-Identifier: Apache-2.0
"""What DeepSpeed's engine has and this one has not, and where it is."""

from __future__ import annotations

from types import MappingProxyType
from typing import Any, Final, NoReturn

from zfunc.compat.errors import CompatError

_RETURNED: Final = "initialize returned it beside the engine"
_OF_MODULE: Final = "engine.module has it; every rank has to ask for that"
_ELSEWHERE: Final = MappingProxyType(
    {
        "optimizer": _RETURNED,
        "lr_scheduler": _RETURNED,
        "training_dataloader": _RETURNED,
        "parameters": _OF_MODULE,
        "named_parameters": _OF_MODULE,
        "state_dict": _OF_MODULE,
        "config": _OF_MODULE,
        "generate": _OF_MODULE,
        "load_state_dict": "load it into the module before initialize",
        "no_sync": "each backward reduces; engine.step() counts the microbatches",
        "to": "initialize put it on engine.device",
        "half": "the configuration says the dtype",
        "bfloat16": "the configuration says the dtype",
    }
)


class MissingError(CompatError, AttributeError):
    """A name that the engine does not have; ``hasattr`` is False of it.

    Example:
      >>> raise MissingError("engine.no_sync: each backward reduces")
      Traceback (most recent call last):
      zfunc.compat.missing.MissingError: engine.no_sync: each backward reduces
    """


class Missing:
    """Says of a name that is not there where it is."""

    def __getattr__(self, name: str) -> Any:
        where = _ELSEWHERE.get(
            name,
            "the bridge does not have it; settings are in the configuration, and what "
            "belongs to the model is in engine.module",
        )
        raise MissingError(f"engine.{name}: {where}")


class ReadOnly(dict[str, Any]):
    """A group of an optimizer, to read from.

    Example:
      >>> ReadOnly(lr=0.1)["lr"]
      0.1
    """

    def __setitem__(self, name: str, value: Any) -> NoReturn:
        raise CompatError(
            f"param_groups: {name!r} cannot be written, since an update is a function "
            "of its step: write the schedule as the section scheduler, or give "
            "initialize an optimizer that is a function of zf.optim's schedules"
        )
