# SPDX-License-Identifier: Apache-2.0
"""The table of all keys: what drives the check, the explanation and the page."""

from __future__ import annotations

from types import MappingProxyType
from typing import Final

from zfunc.config import keys_features, keys_training, keys_zero

KEYS: Final = MappingProxyType(
    {
        key.path: key
        for key in (*keys_training.KEYS, *keys_zero.KEYS, *keys_features.KEYS)
    }
)
SECTIONS: Final = frozenset(
    path.rpartition(".")[0]
    for key in KEYS
    for path in (key, key.rpartition(".")[0])
    if "." in path
) | {"optimizer", "scheduler"}

_DEPRECATED: Final = "deprecated"
_SHORT: Final = "DeepSpeed's own name"
# Other names of keys, and why they are not the names of the table.
ALIASES: Final = MappingProxyType(
    {
        "bfloat16": ("bf16", _DEPRECATED),
        f"{keys_zero.ZERO}stage3_gather_fp16_weights_on_model_save": (
            f"{keys_zero.ZERO}stage3_gather_16bit_weights_on_model_save",
            _DEPRECATED,
        ),
    }
    | {
        path.replace("stage3_", ""): (path, _SHORT)
        for path in KEYS
        if path.startswith(f"{keys_zero.ZERO}stage3_")
    }
)
