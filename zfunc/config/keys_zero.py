# SPDX-License-Identifier: Apache-2.0
"""Keys of ``zero_optimization``."""

from __future__ import annotations

import sys
from typing import Final

from zfunc.config.keys import Key, meaningless, planned, refused, supported
from zfunc.config.kinds import (
    ANY_INTEGER,
    ANYTHING,
    BOOL,
    COUNT,
    DEVICE,
    LIST,
    POSITIVE,
    RATIO,
    TEXT,
    Kind,
    integer,
)

ZERO: Final = "zero_optimization."
OFFLOAD: Final = (
    'offload is not here yet: type "device": "none"; zfunc plan says what fits without'
)
_HOOKS: Final = "of DeepSpeed's hooks on modules; a loss here has none"
_BUFFERS: Final = "of DeepSpeed's gradient buffers"
_PROGRAM: Final = "the program of zf.jit decides"
_QUANTIZED: Final = "gathers and reductions are not quantized: type false"


def _key(make: object, name: str, kind: Kind, default: object, note: str) -> Key:
    return make(f"{ZERO}{name}", kind, default, note)  # type: ignore[operator,no-any-return]


_STAGES: Final[tuple[Key, ...]] = (
    _key(
        supported,
        "stage",
        integer(0, 3, example=2),
        0,
        "`zf.partition(zero=...)`; the state of stage 0 is whole (`spec=zf.P()`)",
    ),
    _key(
        supported,
        "reduce_bucket_size",
        POSITIVE,
        500_000_000,
        "elements; `bucket(bucket_bytes=...)` in the passes of `zf.jit` if it is given",
    ),
    _key(
        supported,
        "allgather_bucket_size",
        COUNT,
        500_000_000,
        "elements, at stages 1 and 2; one limit with `reduce_bucket_size`: the smaller",
    ),
    _key(
        supported,
        "stage3_prefetch_bucket_size",
        COUNT,
        50_000_000,
        "elements, at stage 3; one limit with `reduce_bucket_size`: the smaller; 0 is "
        "`prefetch(gathers=0)`",
    ),
    _key(
        supported,
        "stage3_param_persistence_threshold",
        COUNT,
        100_000,
        "`zf.partition(persistence_threshold=...)` at stage 3",
    ),
    _key(
        supported,
        "stage3_max_live_parameters",
        COUNT,
        1_000_000_000,
        "elements, at stage 3; `keep_small(small_bytes=...)` in the passes of `zf.jit` "
        "if it is given",
    ),
    _key(
        supported,
        "stage3_max_reuse_distance",
        COUNT,
        1_000_000_000,
        "one limit with `stage3_max_live_parameters`: the smaller",
    ),
)

_MACHINERY: Final[tuple[Key, ...]] = tuple(
    _key(meaningless, name, kind, default, note)
    for name, kind, default, note in (
        ("contiguous_gradients", BOOL, True, _BUFFERS),
        ("reduce_scatter", BOOL, True, "stages 1 to 3 always reduce-scatter"),
        ("use_multi_rank_bucket_allreduce", BOOL, True, _BUFFERS),
        ("allgather_partitions", BOOL, True, "gathers are never broadcasts"),
        ("overlap_comm", BOOL, None, "the order of the program of zf.jit overlaps"),
        ("compute_grad_norm", BOOL, True, "`state.metrics.grad_norm` is always there"),
        ("load_from_fp32_weights", BOOL, True, "a checkpoint is the fp32 state"),
        ("elastic_checkpoint", BOOL, False, "every checkpoint fits every mesh"),
        ("sub_group_size", COUNT, 1_000_000_000, "tiles of DeepSpeed's update"),
        ("ignore_unused_parameters", BOOL, True, "unused ones have gradient 0"),
        ("round_robin_gradients", BOOL, False, "of optimizer offload"),
        ("parameter_alignment", BOOL, False, _BUFFERS),
        ("memory_efficient_linear", BOOL, True, "replaces torch's linear"),
        ("pipeline_loading_checkpoint", BOOL, False, "of DeepSpeed's loading"),
        ("override_module_apply", BOOL, True, _HOOKS),
        ("log_trace_cache_warnings", BOOL, False, _HOOKS),
        ("enable_sanity_checks", BOOL, False, "of DeepSpeed's engine"),
        ("save_muon_momentum_buffer_in_memory", BOOL, False, "of NVMe offload"),
        (
            "stage3_model_persistence_threshold",
            COUNT,
            sys.maxsize,
            "no parameter stays gathered between steps",
        ),
        (
            "stage3_gather_16bit_weights_on_model_save",
            BOOL,
            False,
            "zf.unshard(state).params are the weights, on every rank",
        ),
        ("stage3_module_granularity_threshold", COUNT, 0, _HOOKS),
        ("stage3_use_all_reduce_for_fetch_params", BOOL, False, _PROGRAM),
        ("stage3_allgather_sequential", BOOL, False, _PROGRAM),
        ("leaf_module.classes", LIST, "Mixtral, Qwen2Moe, Qwen3Moe", _HOOKS),
        ("leaf_module.names", LIST, (), _HOOKS),
        ("leaf_module.name_suffixes", LIST, (), _HOOKS),
    )
)

_FEATURES: Final[tuple[Key, ...]] = (
    _key(refused, "legacy_stage1", BOOL, False, "DeepSpeed removed it: type false"),
    planned(
        f"{ZERO}zero_hpz_partition_size",
        COUNT,
        1,
        "there is no second partition inside of a node yet: type 1",
        off=(0,),
    ),
    _key(planned, "zero_quantized_weights", BOOL, False, _QUANTIZED),
    _key(planned, "zero_quantized_nontrainable_weights", BOOL, False, _QUANTIZED),
    _key(planned, "zero_quantized_gradients", BOOL, False, _QUANTIZED),
    _key(
        planned, "zeropp_loco_param", ANYTHING, None, "not here, DeepSpeed removed it"
    ),
    _key(
        planned,
        "mics_shard_size",
        ANY_INTEGER,
        -1,
        "not here, and DeepSpeed removed it: type -1",
    ),
    _key(
        planned,
        "mics_hierarchical_params_gather",
        BOOL,
        False,
        "not here, and DeepSpeed removed it: type false",
    ),
    _key(planned, "zenflow", ANYTHING, None, "not here yet: delete it"),
    *(
        planned(
            f"{ZERO}{name}",
            BOOL,
            None,
            f"deprecated for `{new}`; offload is not here yet: type false",
            off=(False,),
        )
        for name, new in (
            ("cpu_offload", "offload_optimizer"),
            ("cpu_offload_param", "offload_param"),
        )
    ),
    _key(meaningless, "cpu_offload_use_pin_memory", BOOL, None, "of offload"),
)


def _offload(name: str, *options: tuple[str, Kind, object]) -> tuple[Key, ...]:
    gate = planned(f"{ZERO}{name}.device", DEVICE, "none", OFFLOAD)
    note = f"an option of `{gate.path}`"
    return (
        gate,
        *(
            Key(
                f"{ZERO}{name}.{option}",
                kind,
                default,
                gate.status,
                note,
                gate=gate.path,
            )
            for option, kind, default in options
        ),
    )


_OFFLOAD_KEYS: Final[tuple[Key, ...]] = (
    *_offload(
        "offload_param",
        ("nvme_path", TEXT, None),
        ("buffer_count", COUNT, 5),
        ("buffer_size", COUNT, 100_000_000),
        ("max_in_cpu", COUNT, 1_000_000_000),
        ("pin_memory", BOOL, True),
    ),
    *_offload(
        "offload_optimizer",
        ("nvme_path", TEXT, None),
        ("buffer_count", COUNT, 4),
        ("pin_memory", BOOL, True),
        ("pipeline_read", BOOL, False),
        ("pipeline_write", BOOL, False),
        ("fast_init", BOOL, False),
        ("ratio", RATIO, 1.0),
        ("super_offload", BOOL, False),
        ("cpuadam_cores_perc", RATIO, 0.8),
    ),
)

KEYS: Final[tuple[Key, ...]] = (*_STAGES, *_MACHINERY, *_FEATURES, *_OFFLOAD_KEYS)
