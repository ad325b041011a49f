# SPDX-License-Identifier: Apache-2.0
"""Checkpoints that survive crashes, name what is damaged, and restore on any mesh."""

from .find import latest as latest
from .find import list_steps as list_steps
from .restore import Restored as Restored
from .restore import restore as restore
from .save import save as save
