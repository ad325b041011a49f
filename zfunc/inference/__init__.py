# SPDX-License-Identifier: Apache-2.0
"""Generation: a pure decode step, traced once and replayed."""

from zfunc.inference.generate import Generated as Generated
from zfunc.inference.generate import generate as generate
