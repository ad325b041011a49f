# SPDX-License-Identifier: Apache-2.0
"""Models as functions of a parameter pytree."""

from . import gpt as gpt
from .attention import causal_attention as causal_attention
from .gpt_config import GPTConfig as GPTConfig
from .layers import layer_norm as layer_norm
from .layers import rms_norm as rms_norm
from .layers import rope_tables as rope_tables
from .layers import rotate as rotate
