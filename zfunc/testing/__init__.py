# SPDX-License-Identifier: Apache-2.0
"""Prove that your own model trains the same sharded and unsharded."""

from .simulate import Simulation as Simulation
from .simulate import simulate as simulate
from .simulate import spmd as spmd
