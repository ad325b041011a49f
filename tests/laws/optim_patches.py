# SPDX-License-Identifier: Apache-2.0
"""Mutants of single optimizers: functions that make one wrong, as in ``patches``."""

import importlib

import torch

from zfunc.core.tree import leaves_with_path, tree_map

# Modules whose package exports a function of the same name.
adagrad, low_precision = (
    importlib.import_module(f"zfunc.optim.{name}")
    for name in ("adagrad", "low_precision")
)


def accumulator_starts_in_the_padding(patch):
    def full(params):
        return tree_map(lambda p: torch.full_like(p, 0.1), params)

    patch.setattr(adagrad, "zeros_wide", full)


def random_bits_by_the_local_index(patch):
    def local(leaf):
        buffer = getattr(leaf, "buffer", leaf)
        return torch.arange(buffer.numel()).reshape(buffer.shape)

    patch.setattr(low_precision, "_global_index", local)


def random_bits_by_the_place_of_a_leaf(patch):
    def counted(tree, is_leaf=None):
        pairs = leaves_with_path(tree, is_leaf)
        return [(str(i), leaf) for i, (_, leaf) in enumerate(pairs)]

    patch.setattr(low_precision, "leaves_with_path", counted)
