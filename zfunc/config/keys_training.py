# SPDX-License-Identifier: Apache-2.0
"""Keys at the top of a configuration, and those of precision."""

from __future__ import annotations

from typing import Final

from zfunc.config.keys import (
    Key,
    meaningless,
    planned,
    refused,
    section,
    supported,
)
from zfunc.config.kinds import (
    ANYTHING,
    BOOL,
    COUNT,
    COUNT_OR_NEVER,
    DTYPE,
    LIST,
    NOT_NEGATIVE,
    POSITIVE,
    TEXT,
    integer,
    number,
    one_of,
)

BATCH: Final = (
    "train_batch_size",
    "train_micro_batch_size_per_gpu",
    "gradient_accumulation_steps",
)
_LOG: Final = "a step prints nothing; read `state.metrics`"

_TOP: Final[tuple[Key, ...]] = (
    supported(BATCH[0], POSITIVE, None, "`data.train_batch_size`, over all ranks"),
    supported(BATCH[1], POSITIVE, None, "`data.micro_batch_size`"),
    supported(BATCH[2], POSITIVE, None, "`zf.accumulate`, `data.accumulation_steps`"),
    refused(
        "managed_gradient_accumulation",
        BOOL,
        True,
        "one call of a step is one update: give it the whole batch and type true",
    ),
    supported(
        "gradient_clipping",
        NOT_NEGATIVE,
        1.0,
        "`zf.optim.clip_by_global_norm` before the optimizer; 0 clips nothing",
    ),
    supported(
        "communication_data_type",
        DTYPE,
        None,
        "`zf.partition(reduce_dtype=...)`; null is bf16 with bf16, and fp32 otherwise "
        "(DeepSpeed: fp16 with fp16; here sums are divided after they were sent)",
    ),
    supported(
        "prescale_gradients",
        BOOL,
        False,
        "the mean over ranks is the same; refused where gradients travel as fp16, "
        "which overflow otherwise",
    ),
    supported(
        "gradient_predivide_factor",
        number(1e-30, example=1.0),
        1.0,
        "the mean over ranks is the same; refused where gradients travel as fp16, "
        "which overflow otherwise",
    ),
    refused(
        "gradient_allreduce_op",
        one_of("mean", "sum"),
        "mean",
        'gradients are means over ranks: type "mean" and scale the learning rate',
    ),
    planned(
        "sequence_parallel_size",
        POSITIVE,
        1,
        "there is no sequence parallelism yet: type 1",
    ),
    meaningless(
        "seq_parallel_communication_data_type",
        DTYPE,
        "fp32",
        "there is no sequence parallelism yet",
    ),
    supported("dataloader_drop_last", BOOL, False, "`data.drop_last`"),
    meaningless("steps_per_print", COUNT_OR_NEVER, None, _LOG),
    meaningless("wall_clock_breakdown", BOOL, False, _LOG),
    meaningless(
        "memory_breakdown", BOOL, False, "read `program.memory_analysis()` instead"
    ),
    meaningless("dump_state", BOOL, False, "prints DeepSpeed's engine"),
    meaningless("log_level", TEXT, None, "of DeepSpeed's logger"),
    meaningless("disable_python_gc", BOOL, False, "of DeepSpeed's process"),
    meaningless("disable_allgather", BOOL, False, "of DeepSpeed's engine"),
    meaningless(
        "zero_allow_untested_optimizer", BOOL, False, "every optimizer here is tested"
    ),
    meaningless("zero_force_ds_cpu_optimizer", BOOL, True, "of optimizer offload"),
    meaningless("vocabulary_size", COUNT, None, "DeepSpeed only warns by it"),
    planned(
        "use_data_before_expert_parallelism",
        BOOL,
        False,
        "there is no expert parallelism yet: type false",
    ),
    refused(
        "fp32_allreduce",
        BOOL,
        False,
        'an old key, which DeepSpeed ignores: type "communication_data_type": "fp32"',
    ),
    refused(
        "sparse_gradients",
        BOOL,
        False,
        "gradients of embeddings travel dense: type false",
    ),
    refused(
        "graph_harvesting", BOOL, False, "DeepSpeed removed it: type false, use zf.jit"
    ),
    meaningless(
        "optimizer.legacy_fusion", BOOL, False, "how DeepSpeed's fp16 optimizer loops"
    ),
)

_PRECISION: Final[tuple[Key, ...]] = (
    supported(
        "fp16.enabled",
        BOOL,
        False,
        '`zf.precision("fp16")`; the state holds the fp32 master weights',
    ),
    supported(
        "fp16.auto_cast",
        BOOL,
        False,
        "floating leaves of the batch are always cast",
    ),
    supported(
        "fp16.loss_scale",
        NOT_NEGATIVE,
        0,
        "0 is `zf.DynamicLossScale`, others `zf.StaticLossScale`",
    ),
    supported(
        "fp16.initial_scale_power",
        integer(0, 100, example=16),
        16,
        "`zf.DynamicLossScale(initial_scale_power=...)`",
    ),
    supported(
        "fp16.loss_scale_window",
        POSITIVE,
        1000,
        "`zf.DynamicLossScale(loss_scale_window=...)`",
    ),
    supported(
        "fp16.hysteresis",
        POSITIVE,
        2,
        "`zf.DynamicLossScale(hysteresis=...)`; 1 at stage 0, where DeepSpeed does not "
        "read it",
    ),
    supported(
        "fp16.consecutive_hysteresis",
        BOOL,
        False,
        "`zf.DynamicLossScale(consecutive_hysteresis=...)`",
    ),
    supported(
        "fp16.min_loss_scale",
        POSITIVE,
        1,
        "`zf.DynamicLossScale(min_loss_scale=...)`; an overflow there is skipped, not "
        "raised",
    ),
    planned(
        "fp16.fp16_master_weights_and_grads",
        BOOL,
        False,
        "needs optimizer offload, which is not here yet: type false",
    ),
    supported(
        "bf16.enabled",
        BOOL,
        False,
        '`zf.precision("bf16")`; the state holds the fp32 master weights',
    ),
    meaningless(
        "bf16.immediate_grad_update", BOOL, False, "when DeepSpeed copies gradients"
    ),
    supported(
        "bf16.check_grad_overflow",
        BOOL,
        True,
        "`zf.skip_nonfinite()`; at stage 0 always, as DeepSpeed does",
    ),
    supported(
        "bf16.bf16_master_weights_and_grads",
        BOOL,
        False,
        "`zf.shard(..., dtype=torch.bfloat16)`; moments stay in fp32",
    ),
    refused(
        "bf16.bf16_optimizer_states",
        BOOL,
        False,
        "moments are fp32 at least: type false",
    ),
    *section(
        refused(
            "torch_autocast.enabled",
            BOOL,
            False,
            "dtypes of single operations are the loss function's own: type false and "
            '"bf16": {"enabled": true}',
        ),
        ("dtype", DTYPE, "bf16"),
        ("lower_precision_safe_modules", LIST, None),
    ),
    refused(
        "amp",
        ANYTHING,
        None,
        "Apex is not used, and DeepSpeed removed it: delete it and type "
        '"bf16": {"enabled": true}',
    ),
    supported(
        "data_types.grad_accum_dtype",
        DTYPE,
        None,
        "microbatches add up in fp32, whatever the precision; a smaller dtype is "
        "refused",
    ),
    supported(
        "data_types.param_dtype",
        DTYPE,
        None,
        "must be the dtype of `fp16` or `bf16`, which decide",
    ),
    refused(
        "data_types.buffer_dtype",
        DTYPE,
        None,
        "buffers belong to the loss function: delete it and cast them there",
    ),
    refused(
        "data_types.keep_in_fp32_modules",
        LIST,
        "auto",
        "the dtype of single modules is the loss function's own: delete it",
        off=((),),
    ),
)

KEYS: Final[tuple[Key, ...]] = (*_TOP, *_PRECISION)
