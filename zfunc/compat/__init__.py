# SPDX-License-Identifier: Apache-2.0
"""The bridge for scripts that were written for DeepSpeed."""

from .bridge import add_config_arguments as add_config_arguments
from .bridge import init_distributed as init_distributed
from .bridge import initialize as initialize
from .engine import Engine as Engine
from .errors import CompatError as CompatError
