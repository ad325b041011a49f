# SPDX-License-Identifier: Apache-2.0
"""Transformations of a ``TrainStep``: each replaces a slot."""

from .accumulate import accumulate as accumulate
from .frozen import with_frozen as with_frozen
from .loss_scale import DynamicLossScale as DynamicLossScale
from .loss_scale import LossScale as LossScale
from .loss_scale import StaticLossScale as StaticLossScale
from .partition import partition as partition
from .precision import Policy as Policy
from .precision import precision as precision
from .precision import skip_nonfinite as skip_nonfinite
from .recovery import Decision as Decision
from .recovery import Recovery as Recovery
from .recovery import Run as Run
from .recovery import recovering as recovering
from .remat import remat as remat
