# SPDX-License-Identifier: Apache-2.0
"""Data (meshes, placements, the state) and functions (collectives, autodiff, steps)."""
