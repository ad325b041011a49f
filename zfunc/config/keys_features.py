# SPDX-License-Identifier: Apache-2.0
"""Keys of sections beside the training step: features, tools and logs."""

from __future__ import annotations

from typing import Any, Final

from zfunc.config.keys import (
    Key,
    meaningless,
    planned,
    refused,
    section,
)
from zfunc.config.kinds import (
    ANY_INTEGER,
    ANY_NUMBER,
    ANYTHING,
    BOOL,
    COUNT,
    LIST,
    NOT_NEGATIVE,
    POSITIVE,
    TEXT,
    Kind,
    one_of,
)


def _several(
    make: Any, prefix: str, note: str, *options: tuple[str, Kind, Any]
) -> tuple[Key, ...]:
    return tuple(
        make(f"{prefix}.{name}", kind, default, note) for name, kind, default in options
    )


_AIO: Final = "of NVMe offload"
_SAVING: Final = "zf.checkpoint writes what it has to"
_REMAT: Final = "not here; recompute a layer with zf.remat: type false"

_ENGINE: Final[tuple[Key, ...]] = (
    *_several(
        meaningless,
        "aio",
        _AIO,
        ("block_size", COUNT, 1_048_576),
        ("queue_depth", COUNT, 8),
        ("intra_op_parallelism", COUNT, 1),
        ("thread_count", COUNT, 1),
        ("single_submit", BOOL, False),
        ("overlap_events", BOOL, True),
        ("use_gds", BOOL, False),
    ),
    meaningless(
        "checkpoint.tag_validation",
        one_of("Warn", "Ignore", "Fail"),
        "Warn",
        "ranks always agree on the step of a checkpoint",
    ),
    meaningless(
        "checkpoint.load_universal", BOOL, False, "every checkpoint fits every mesh"
    ),
    planned(
        "checkpoint.use_node_local_storage",
        BOOL,
        False,
        "a checkpoint is one directory that all ranks see: type false",
    ),
    *_several(
        meaningless,
        "checkpoint",
        _SAVING,
        ("parallel_write.pipeline_stage", BOOL, False),
        ("checkpoint_serialization", BOOL, True),
        ("writer.type", one_of("fast", "python", "mock"), "FAST"),
        ("writer.decoupled", BOOL, False),
        ("writer.io_buffer_size", COUNT, 67_108_864),
        ("writer.io_buffer_double", BOOL, True),
        ("writer.show_statistics", BOOL, False),
        ("writer.data_parallel", one_of("replica", "socket", "machine"), None),
        ("writer.io_multiplier", COUNT, 1),
    ),
    *_several(
        meaningless,
        "timers.throughput",
        "of DeepSpeed's engine",
        ("enabled", BOOL, True),
        ("synchronized", BOOL, True),
    ),
    *_several(
        planned,
        "activation_checkpointing",
        _REMAT,
        ("partition_activations", BOOL, False),
        ("cpu_checkpointing", BOOL, False),
        ("contiguous_memory_optimization", BOOL, False),
    ),
    *_several(
        meaningless,
        "activation_checkpointing",
        "of DeepSpeed's checkpoint function, which models call; here it is zf.remat",
        ("number_checkpoints", COUNT, None),
        ("synchronize_checkpoint_boundary", BOOL, False),
        ("profile", BOOL, False),
    ),
    *_several(
        meaningless,
        "pipeline",
        "of DeepSpeed's PipelineModule",
        ("partition", TEXT, "best"),
        ("seed_layers", BOOL, False),
        ("activation_checkpoint_interval", COUNT, 0),
        ("pipe_partitioned", BOOL, True),
        ("grad_partitioned", BOOL, True),
    ),
    planned(
        "pipeline.stages",
        POSITIVE,
        "auto",
        "there is no pipeline yet: type 1",
        off=(1,),
    ),
    meaningless("compile.deepcompile", BOOL, False, "call `zf.jit(step)`"),
    meaningless("compile.debug_log", BOOL, False, "read `program.as_text()`"),
    *_several(
        meaningless,
        "compile",
        "of DeepCompile",
        ("autoep_non_moe", BOOL, False),
        ("free_activation_threshold", COUNT, 10_485_760),
        ("free_activation", BOOL, False),
        ("offload_activation_pin_memory", BOOL, True),
        ("double_buffer", BOOL, True),
        ("symmetric_memory", BOOL, False),
        ("sync_before_reduce", BOOL, False),
        ("sync_after_reduce", BOOL, False),
        ("sync_before_allgather", BOOL, False),
        ("sync_after_allgather", BOOL, False),
        ("keep_int_input_tensors", BOOL, True),
        ("keep_all_input_tensors", BOOL, False),
        ("passes", LIST, None),
    ),
    *_several(
        planned,
        "compile",
        "offload is not here yet: type false",
        ("offload_activation", BOOL, False),
        ("offload_opt_states", BOOL, False),
        ("offload_parameters", BOOL, False),
    ),
)

_LOGS: Final[tuple[Key, ...]] = (
    *section(
        planned(
            "tensorboard.enabled",
            BOOL,
            False,
            "not here yet: type false and log `state.metrics`",
        ),
        ("output_path", TEXT, ""),
        ("job_name", TEXT, "DeepSpeedJobName"),
    ),
    *section(
        planned(
            "csv_monitor.enabled",
            BOOL,
            False,
            "not here yet: type false and log `state.metrics`",
        ),
        ("output_path", TEXT, ""),
        ("job_name", TEXT, "DeepSpeedJobName"),
    ),
    *section(
        planned(
            "wandb.enabled",
            BOOL,
            False,
            "not here yet: type false and log `state.metrics`",
        ),
        ("group", TEXT, None),
        ("team", TEXT, None),
        ("project", TEXT, "deepspeed"),
    ),
    *section(
        planned(
            "comet.enabled",
            BOOL,
            False,
            "not here yet: type false and log `state.metrics`",
        ),
        ("samples_log_interval", COUNT, 100),
        ("project", TEXT, None),
        ("workspace", TEXT, None),
        ("api_key", TEXT, None),
        ("experiment_name", TEXT, None),
        ("experiment_key", TEXT, None),
        ("online", BOOL, None),
        ("mode", TEXT, None),
    ),
    *section(
        planned(
            "comms_logger.enabled",
            BOOL,
            False,
            "type false and read `program.comm_analysis()`",
        ),
        ("verbose", BOOL, False),
        ("prof_all", BOOL, True),
        ("debug", BOOL, False),
        ("prof_ops", LIST, ()),
    ),
    *section(
        planned(
            "flops_profiler.enabled",
            BOOL,
            False,
            "type false and read `program.cost_analysis()`, or type zfunc plan",
        ),
        ("recompute_fwd_factor", NOT_NEGATIVE, 0.0),
        ("profile_step", COUNT, 1),
        ("module_depth", ANY_INTEGER, -1),
        ("top_modules", COUNT, 1),
        ("detailed", BOOL, True),
        ("output_file", TEXT, None),
    ),
    *section(
        planned(
            "autotuning.enabled",
            BOOL,
            False,
            "type false; zfunc plan --memory-gb suggests what fits",
        ),
        ("fast", BOOL, True),
        ("results_dir", TEXT, "autotuning_results"),
        ("exps_dir", TEXT, "autotuning_exps"),
        ("overwrite", BOOL, True),
        ("metric", TEXT, "throughput"),
        ("metric_path", TEXT, None),
        ("start_profile_step", COUNT, 3),
        ("end_profile_step", COUNT, 5),
        ("tuner_type", TEXT, "gridsearch"),
        ("tuner_early_stopping", COUNT, 5),
        ("tuner_num_trials", COUNT, 50),
        ("mp_size", COUNT, 1),
        ("num_tuning_micro_batch_sizes", COUNT, 3),
        ("max_train_batch_size", COUNT, None),
        ("min_train_batch_size", COUNT, 1),
        ("max_train_micro_batch_size_per_gpu", COUNT, 1024),
        ("min_train_micro_batch_size_per_gpu", COUNT, 1),
        ("arg_mappings", ANYTHING, None),
        ("model_info", ANYTHING, None),
        ("model_info_path", TEXT, None),
    ),
)

_FEATURES: Final[tuple[Key, ...]] = (
    *section(
        planned(
            "data_efficiency.enabled",
            BOOL,
            False,
            "curricula and random layer token drop are not here yet: type false",
        ),
        ("seed", COUNT, 1234),
        ("data_sampling", ANYTHING, None),
        ("data_routing", ANYTHING, None),
    ),
    *section(
        planned(
            "tensor_parallel.autotp_size",
            COUNT,
            0,
            "there is no tensor parallelism yet: type 0",
        )._replace(off=(1,)),
        ("preset_model", TEXT, None),
        ("tp_overlap_comm", BOOL, False),
        ("partition_config", ANYTHING, None),
        ("dtype", TEXT, "fp16"),
        ("vocab_parallel_lm_head", BOOL, None),
        ("vocab_parallel_ce_backend", TEXT, "torch"),
        ("tp", ANYTHING, None),
        ("tensor_parallel", ANYTHING, None),
        ("injection_policy_tuple", LIST, None),
        ("keep_module_on_host", BOOL, False),
        ("kernel_inject", BOOL, False),
        ("replace_with_kernel_inject", BOOL, False),
    ),
    planned(
        "expert_parallel",
        ANYTHING,
        None,
        "there is no expert parallelism yet: delete it",
    ),
    *section(
        planned(
            "hybrid_engine.enabled",
            BOOL,
            False,
            "a state trains and generates without an engine: type false",
        ),
        ("max_out_tokens", POSITIVE, 512),
        ("inference_tp_size", POSITIVE, 1),
        ("release_inference_cache", BOOL, False),
        ("pin_parameters", BOOL, True),
        ("tp_gather_partition_size", POSITIVE, 8),
        ("enable_cuda_graph", BOOL, False),
    ),
    *section(
        planned(
            "progressive_layer_drop.enabled",
            BOOL,
            False,
            "not here yet, and DeepSpeed removed it: type false",
        ),
        ("theta", ANY_NUMBER, 1.0),
        ("gamma", ANY_NUMBER, 0.001),
    ),
    *section(
        refused(
            "eigenvalue.enabled",
            BOOL,
            False,
            "DeepSpeed removed it: type false",
        ),
        ("verbose", BOOL, False),
        ("max_iter", COUNT, 100),
        ("tol", NOT_NEGATIVE, 0.01),
        ("stability", NOT_NEGATIVE, 1e-6),
        ("gas_boundary_resolution", COUNT, 1),
        ("layer_name", TEXT, "bert.encoder.layer"),
        ("layer_num", COUNT, 0),
    ),
    *section(
        planned(
            "elasticity.enabled",
            BOOL,
            False,
            "DeepSpeed removed it; a checkpoint fits every number of ranks: type false",
        ),
        ("max_train_batch_size", COUNT, 2000),
        ("micro_batch_sizes", LIST, (2, 4, 6)),
        ("min_gpus", COUNT, 1),
        ("max_gpus", COUNT, 10_000),
        ("min_time", COUNT, 0),
        ("prefer_larger_batch", BOOL, True),
        ("ignore_non_elastic_batch_info", BOOL, False),
        ("version", NOT_NEGATIVE, 0.2),
        ("num_gpus_per_node", COUNT, 1),
        ("model_parallel_size", COUNT, 1),
    ),
    *section(
        refused("nebula.enabled", BOOL, False, "DeepSpeed removed it: type false"),
        ("persistent_storage_path", TEXT, None),
        ("persistent_time_interval", COUNT, 100),
        ("num_of_version_in_retention", COUNT, 2),
        ("enable_nebula_load", BOOL, True),
    ),
    planned(
        "sparse_attention",
        ANYTHING,
        None,
        "not here yet, and DeepSpeed removed it: delete it",
    ),
    planned(
        "curriculum_learning",
        ANYTHING,
        None,
        "not here yet, and DeepSpeed removed it: delete it",
    ),
    refused(
        "quantize_training", ANYTHING, None, "not here, DeepSpeed removed it: delete it"
    ),
    refused(
        "compression_training",
        ANYTHING,
        None,
        "not here, and DeepSpeed removed it: delete it",
    ),
    refused("weight_quantization", ANYTHING, None, "of inference: delete it"),
    refused("datastates_ckpt", ANYTHING, None, "use zf.checkpoint: delete it"),
)

KEYS: Final[tuple[Key, ...]] = (*_ENGINE, *_LOGS, *_FEATURES)
