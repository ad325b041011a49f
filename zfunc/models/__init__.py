# SPDX-License-Identifier: Apache-2.0
"""Models as functions of a parameter pytree."""

from . import gpt as gpt
from .attention import causal_attention as causal_attention
from .decoding import Decoder as Decoder
from .gpt_config import GPTConfig as GPTConfig
from .hf.decoder import decoder as decoder
from .hf.errors import ModelError as ModelError
from .hf.from_hf import from_hf as from_hf
from .hf.from_module import ModuleLoss as ModuleLoss
from .hf.from_module import from_module as from_module
from .hf.lora import lora as lora
from .hf.lora import merge_lora as merge_lora
from .hf.loss import HFLoss as HFLoss
from .hf.packing import pack as pack
from .hf.trainable import split as split
from .layers import layer_norm as layer_norm
from .layers import rms_norm as rms_norm
from .layers import rope_tables as rope_tables
from .layers import rotate as rotate
