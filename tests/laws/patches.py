# SPDX-License-Identifier: Apache-2.0
"""The mutants: functions that make the library wrong, given pytest's MonkeyPatch."""

import dataclasses
import functools
import importlib
import math
from types import SimpleNamespace

import torch

import zfunc as zf
from zfunc.core import collectives, sharding, step, update, wire
from zfunc.core.mesh import Mesh
from zfunc.core.tree import tree_flatten, tree_leaves, tree_map, tree_unflatten
from zfunc.testing import recipe as recipes

# Modules whose package exports a function of the same name.
accumulate, donation, fixed_order, gathered, partition, precision, remat = (
    importlib.import_module(f"zfunc.transforms.{name}")
    for name in (
        "accumulate",
        "donation",
        "fixed_order",
        "gathered",
        "partition",
        "precision",
        "remat",
    )
)
adafactor, clip, lamb, muon, orthogonal, scale_by_adam, trace, whole = (
    importlib.import_module(f"zfunc.optim.{name}")
    for name in (
        "adafactor",
        "clip",
        "lamb",
        "muon",
        "orthogonal",
        "scale_by_adam",
        "trace",
        "whole",
    )
)


def with_collectives(patch, **functions):
    """``partition`` sees other collectives; nobody else does."""
    shim = SimpleNamespace(**{**vars(collectives), **functions})
    patch.setattr(partition, "collectives", shim)


def tally_not_summed(patch):
    with_collectives(patch, psum=lambda tree, axis, mesh: tree)


def metrics_not_reduced(patch):
    def psum(tree, axis, mesh):
        def one(mine, summed):
            return zf.Mean(mine.total, summed.weight)

        return tree_map(
            one,
            tree,
            collectives.psum(tree, axis, mesh),
            is_leaf=lambda x: isinstance(x, zf.Mean),
        )

    with_collectives(patch, psum=psum)


def weight_forgotten(patch):
    """A mean over ranks instead of a weighted one."""

    def psum(tree, axis, mesh):
        summed = collectives.psum(tree, axis, mesh)
        equal = summed.loss.weight * 0 + mesh.axis_size(axis)
        return dataclasses.replace(summed, loss=zf.Mean(summed.loss.total, equal))

    with_collectives(patch, psum=psum)


def local_norm_in_clip(patch):
    def local(tree):
        return sum(x.square().sum() for x in tree_leaves(tree)).sqrt()

    patch.setattr(clip, "global_norm", local)


def padded_at_the_head(patch):
    def pad(x, dim, n):
        missing = -x.shape[dim] % n
        sides = [0, 0] * (x.dim() - 1 - dim) + [missing, 0]
        return torch.nn.functional.pad(x, sides)

    patch.setattr(sharding, "_pad", pad)


def padded_with_ones(patch):
    def pad(x, dim, n):
        missing = -x.shape[dim] % n
        sides = [0, 0] * (x.dim() - 1 - dim) + [0, missing]
        return torch.nn.functional.pad(x, sides, value=1.0)

    patch.setattr(sharding, "_pad", pad)


def scaled_gradient(patch, factor=1 + 1e-6):
    scatter = partition._Stage._scatter

    def scaled(self, grads):
        return tree_map(lambda g: g * factor, scatter(self, grads))

    patch.setattr(partition._Stage, "_scatter", scaled)


def stage_2_averages_and_multiplies_back(patch):
    scatter = partition._Stage._scatter

    def there_and_back(self, grads):
        summed = scatter(self, grads)
        return tree_map(lambda g: g / 3 * 3, summed) if self.zero == 2 else summed

    patch.setattr(partition._Stage, "_scatter", there_and_back)


def stale_gather(patch):
    """Each step computes with the parameters that the step before gathered."""
    enter, kept = partition._Stage._enter, []

    def stale(self, params):
        now = enter(self, params)
        leaves, spec = tree_flatten(now)
        level = torch._C._functorch.maybe_current_level()
        before = kept.pop() if kept else None
        kept.append([torch._C._functorch.get_unwrapped(x) for x in leaves])
        shapes = [x.shape for x in kept[0]]
        if self.zero == 0 or not before or [x.shape for x in before] != shapes:
            return now
        wrapped = [torch._C._functorch._add_batch_dim(x, 0, level) for x in before]
        return tree_unflatten(spec, wrapped)

    patch.setattr(partition._Stage, "_enter", stale)


def replicated_leaves_not_summed(patch):
    def forgotten(self, grads):
        def one(leaf):
            whole = isinstance(leaf, partition.Whole)
            rest = (leaf.buffer, leaf.sharding, leaf.global_shape)
            return sharding.Sharded(*rest) if whole else leaf

        return tree_map(one, grads, is_leaf=partition._is_leaf)

    patch.setattr(partition._Stage, "_sum_rest", forgotten)


def scatter_without_sum(patch):
    def own_chunk(self, x):
        chunks = x.unflatten(1, (self.n, x.shape[1] // self.n))
        return torch.stack([chunks[r, r] for r in range(self.n)])

    patch.setattr(wire.PSumScatter, "simulate", own_chunk)


def ranks_reversed_in_gather(patch):
    gather = wire.AllGather.simulate
    patch.setattr(wire.AllGather, "simulate", lambda self, x: gather(self, x.flip(0)))


def reduced_in_bfloat16(patch):
    narrow = functools.partial(sharding.scatter_sum_buffers)

    def scatter(fulls, like, axis, *, reduce_dtype=None):
        return narrow(fulls, like, axis, reduce_dtype=torch.bfloat16)

    patch.setattr(partition, "scatter_sum_buffers", scatter)


def gathered_in_float32(patch):
    patch.setattr(gathered.Wire, "sent", lambda self, stored, wanted: torch.float32)


def over_microbatches(combine):
    """``accumulate``'s core with another way to combine (tally, gradients) pairs."""

    def microbatched(grad_fn, n):
        def summed(params, batch, samples):
            indices = (
                samples.index.chunk(n) if len(samples.index) else [samples.index] * n
            )
            pairs = [
                grad_fn(params, piece, step.Samples(samples.key, index))
                for piece, index in zip(
                    accumulate._split(batch, n), indices, strict=True
                )
            ]
            return functools.reduce(
                lambda a, b: tree_map(torch.add, a, b), combine(pairs)
            )

        return summed

    return microbatched


def mean_of_means(patch):
    def normalized(pair):
        tally, grads = pair
        weight = tally.loss.weight
        by = torch.where(weight == 0, 1, weight)
        mean = zf.Mean(tally.loss.total / by, torch.ones_like(by))
        return dataclasses.replace(tally, loss=mean), tree_map(lambda g: g / by, grads)

    wrong = over_microbatches(lambda pairs: map(normalized, pairs))
    patch.setattr(accumulate, "microbatched", wrong)


def last_microbatch_dropped(patch):
    wrong = over_microbatches(lambda pairs: pairs[:-1] or pairs)
    patch.setattr(accumulate, "microbatched", wrong)


def accumulate_in_the_slot_of_partition(patch):
    """Around autodiff instead of around the step's gradient."""

    def wrong(n):
        def transform(made):
            def grad(loss):
                return accumulate.microbatched(made.grad(loss), n)

            return made._replace(grad=grad)

        return transform

    patch.setattr(zf, "accumulate", wrong)
    patch.setattr(recipes, "accumulate", wrong)


def no_rank_in_the_sample_index(patch):
    with_collectives(patch, axis_index=lambda axis, mesh: torch.tensor(0))


def microbatch_samples_counted_from_0(patch):
    def samples(key, index, loss_scale=None):
        return step.Samples(key, torch.arange(len(index)), loss_scale)

    patch.setattr(accumulate, "Samples", samples)


def keys_from_a_hidden_counter(patch):
    fold_in, calls = step.fold_in, []

    def counted(key, data):
        if data.dim() == 0:
            calls.append(1)
            return fold_in(key, data * 0 + len(calls))
        return fold_in(key, data)

    patch.setattr(step, "fold_in", counted)


def one_key_for_all_steps(patch):
    fold_in = step.fold_in
    patch.setattr(
        step, "fold_in", lambda key, data: fold_in(key, data) if data.dim() else key
    )


def ranks_added_up_in_a_chain(patch):
    patch.setattr(wire, "first_half", lambda num_parts: num_parts - 1)


def virtual_shards_added_up_in_a_chain(patch):
    """Microbatches of one level, as ``accumulate`` has them."""
    microbatched = fixed_order.microbatched

    def flat(grad_fn, n):
        while isinstance(grad_fn, accumulate.Microbatched):
            grad_fn, n = grad_fn.grad_fn, n * grad_fn.n
        return microbatched(grad_fn, n)

    patch.setattr(fixed_order, "microbatched", flat)


def norm_by_pieces_in_a_deterministic_clip(patch):
    patch.setattr(clip, "tree_ordered_norm", zf.global_norm)


def update_kept_after_an_overflow(patch):
    patch.setattr(update, "_chosen", lambda finite, owned, old: owned.pop())


def overflow_judged_by_each_rank(patch):
    def local(tree):
        return sum(x.square().sum() for x in tree_leaves(tree)).sqrt()

    patch.setattr(step, "global_norm", local)


def scale_left_in_the_gradients(patch):
    """Of a loss scale the step divides by its root only."""
    gradients = step.TrainStep.gradients

    def wrong(self, state, batch):
        metrics, grads, finite = gradients(self, state, batch)
        if finite is not None:
            root = self.loss_scale_of(state).scale.sqrt()
            grads = tree_map(lambda g: g * root.to(g.dtype), grads)
        return metrics, grads, finite

    patch.setattr(step.TrainStep, "gradients", wrong)


def moments_in_another_leaf_order(patch):
    def reversed_zeros(params):
        leaves, spec = tree_flatten(params)
        return tree_unflatten(spec, [torch.zeros_like(x) for x in reversed(leaves)])

    patch.setattr(scale_by_adam, "zeros_wide", reversed_zeros)
    patch.setattr(trace, "zeros_wide", reversed_zeros)


def donation_leaves_the_old_state_alive(patch):
    patch.setattr(donation, "_consume", lambda **trees: list(trees.values()))


def donation_forgets_the_last_group(patch):
    groups = update._groups
    patch.setattr(
        update, "_groups", lambda leaves: groups(leaves)[:-1] or groups(leaves)
    )


def donation_writes_in_place(patch):
    def in_place(tx, grads, owned, finite=None):
        params, moments = owned
        updates, moments = tx.update(grads, moments, params)
        return tree_map(torch.Tensor.add_, params, updates), moments

    patch.setattr(donation, "consuming_update", in_place)


def pure_step_writes_in_place(patch):
    patch.setattr(update, "added", torch.Tensor.add_)


def remat_from_a_stale_input(patch):
    save = remat._Remat.setup_context

    def stale(ctx, inputs, output):
        call, rank, *tensors = inputs
        old = [t * (1 - 1e-3) if t.is_floating_point() else t for t in tensors]
        save(ctx, (call, rank, *old), output)

    patch.setattr(remat._Remat, "setup_context", staticmethod(stale))


def rank_is_identity(patch):
    def same(a, b):
        return (a.axes, a.kind, a.rank) == (b.axes, b.kind, b.rank)

    patch.setattr(Mesh, "__eq__", same)


def update_rounded_to_bfloat16(patch):
    def rounded(p, u):
        return (p + u).bfloat16().to(p.dtype)

    patch.setattr(update, "added", rounded)


def loss_scaled_by_precision(patch):
    """The cast of the loss multiplies by the weight that the step divides by."""
    in_precision = precision._in_precision

    def scaled(loss, policy):
        inner = in_precision(loss, policy)

        def wrong(params, batch, samples):
            tally = inner(params, batch, samples)
            total = tally.loss.total * tally.loss.weight
            return dataclasses.replace(tally, loss=zf.Mean(total, tally.loss.weight))

        return wrong

    patch.setattr(precision, "_in_precision", scaled)


def local_norms_in_lamb(patch):
    patch.setattr(lamb, "sum_over_ranks", lambda parts: [p.value for p in parts])


def pieces_orthogonalized_in_muon(patch):
    def each(leaves, num_steps, dtype):
        buffers = [leaf.buffer for leaf in leaves]
        return [
            orthogonal.orthogonalized(x, num_steps, dtype) if x.numel() else x
            for x in buffers
        ]

    patch.setattr(muon, "orthogonalized_leaves", each)


def padding_counted_in_adafactor(patch):
    def padded(leaf, *dims):
        sizes = [
            leaf.buffer.shape[dim] * (leaf.sharding.mesh.axis_size(axis) if axis else 1)
            for dim, axis in enumerate(whole.spec_of(leaf))
        ]
        return max(math.prod(sizes[dim] for dim in dims), 1)

    patch.setattr(adafactor, "_num_elements", padded)


def local_means_in_adafactor(patch):
    patch.setattr(adafactor, "sum_over_ranks", lambda parts: [p.value for p in parts])
