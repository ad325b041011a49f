# SPDX-License-Identifier: Apache-2.0
"""The bridge for scripts that were written for DeepSpeed."""

from .engine import Engine as Engine
from .errors import CompatError as CompatError
