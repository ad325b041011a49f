# SPDX-License-Identifier: Apache-2.0
"""Optimizers as chains of gradient transformations: pure functions on pytrees."""

from .adam import ScaleByAdamMoments as ScaleByAdamMoments
from .adam import adam as adam
from .adam import scale_by_adam as scale_by_adam
from .adamw import adamw as adamw
from .base import GradientTransformation as GradientTransformation
from .base import apply_updates as apply_updates
from .base import chain as chain
from .base import identity as identity
from .base import stateless as stateless
from .clip import clip_by_global_norm as clip_by_global_norm
from .clip import clip_by_value as clip_by_value
from .decay import Mask as Mask
from .decay import add_decayed_weights as add_decayed_weights
from .decay import decay_matrices as decay_matrices
from .schedule_join import join as join
from .schedule_join import scaled as scaled
from .schedule_one_cycle import OneCycle as OneCycle
from .schedule_one_cycle import one_cycle as one_cycle
from .schedule_range_test import lr_range_test as lr_range_test
from .schedule_warmup import warmup_cosine_lr as warmup_cosine_lr
from .schedule_warmup import warmup_decay_lr as warmup_decay_lr
from .schedule_warmup import warmup_lr as warmup_lr
from .schedule_wsd import wsd as wsd
from .schedules import ScaleByLearningRateMoments as ScaleByLearningRateMoments
from .schedules import Schedule as Schedule
from .schedules import constant as constant
from .schedules import cosine as cosine
from .schedules import scale_by_learning_rate as scale_by_learning_rate
from .schedules import warmup_cosine as warmup_cosine
from .schedules import warmup_linear as warmup_linear
from .sgd import TraceMoments as TraceMoments
from .sgd import sgd as sgd
from .sgd import trace as trace
