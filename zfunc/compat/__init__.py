# SPDX-License-Identifier: Apache-2.0
"""The bridge for scripts that were written for DeepSpeed.

``Trainer``, for the one of transformers, is imported when it is first used.
"""

import importlib
from typing import Any

from .bridge import add_config_arguments as add_config_arguments
from .bridge import init_distributed as init_distributed
from .bridge import initialize as initialize
from .engine import Engine as Engine
from .errors import CompatError as CompatError


def __getattr__(name: str) -> Any:
    if name == "Trainer":
        return importlib.import_module(f"{__name__}.trainer").Trainer
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
