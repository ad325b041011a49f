# SPDX-License-Identifier: Apache-2.0
"""The command line: ``zfunc train`` and its options."""

from .app import main as main
