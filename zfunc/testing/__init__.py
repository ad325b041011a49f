# SPDX-License-Identifier: Apache-2.0
"""Prove that your own model trains the same sharded and unsharded.

The hypothesis strategies are in ``zfunc.testing.strategies``, which is imported when it
is first used: training needs no hypothesis.
"""

import importlib
from typing import Any

from .equivalence import EquivalenceError as EquivalenceError
from .equivalence import assert_equivalent as assert_equivalent
from .equivalence import differences as differences
from .lockstep import Lockstep as Lockstep
from .lockstep import lockstep as lockstep
from .messages import LockstepError as LockstepError
from .messages import run_lockstep as run_lockstep
from .recipe import Recipe as Recipe
from .simulate import Simulation as Simulation
from .simulate import simulate as simulate
from .simulate import split_batch as split_batch
from .simulate import spmd as spmd
from .trees import random_batch as random_batch
from .trees import random_tree as random_tree
from .trees import tree_loss as tree_loss


def __getattr__(name: str) -> Any:
    if name == "strategies":
        return importlib.import_module(f"{__name__}.strategies")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
