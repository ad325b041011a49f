# SPDX-License-Identifier: Apache-2.0
"""Transformations of a ``TrainStep``: each replaces a slot."""

from .accumulate import accumulate as accumulate
from .partition import partition as partition
from .precision import Policy as Policy
from .precision import precision as precision
from .remat import remat as remat
