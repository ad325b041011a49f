# SPDX-License-Identifier: Apache-2.0
"""Starting the ranks of a job, stopping them, and saying how it ended."""

from .failures import LOST_PEER as LOST_PEER
from .failures import RankFailure as RankFailure
from .failures import root_cause as root_cause
from .job import Job as Job
from .job import current_job as current_job
from .job import guarded as guarded
from .job import leave as leave
from .signals import STOP_SIGNALS as STOP_SIGNALS
from .signals import StopRequest as StopRequest
from .torchrun import Outcome as Outcome
from .torchrun import torchrun as torchrun
