# SPDX-License-Identifier: Apache-2.0
"""Checkpoints that survive crashes, name what is damaged, and restore on any mesh."""

from .background import Pending as Pending
from .background import save_async as save_async
from .damage import DamagedError as DamagedError
from .find import latest as latest
from .find import list_steps as list_steps
from .keep import Keep as Keep
from .keep import remove_old as remove_old
from .newest import Damage as Damage
from .newest import Newest as Newest
from .newest import restore_newest as restore_newest
from .restore import Restored as Restored
from .restore import restore as restore
from .save import save as save
