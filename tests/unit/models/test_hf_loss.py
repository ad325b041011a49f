# SPDX-License-Identifier: Apache-2.0
"""The loss of each family and its gradient, against transformers and autograd."""

import copy

import pytest
import torch
from torch.testing import assert_close

import zfunc as zf
from tests.distributed.hf_families import (
    CAUSAL,
    FAMILIES,
    batch_of,
    config_of,
    joined,
    model_of,
    task_of,
)
from zfunc.models import from_hf


def oracle(model, batch):
    """The loss of transformers, and its gradient by name."""
    loss = model(**batch).loss
    grads = torch.autograd.grad(loss, list(model.parameters()))
    return loss.detach(), dict(zip(dict(model.named_parameters()), grads, strict=True))


def assert_grads_equal(grads, want):
    assert grads.keys() == want.keys()
    for name, grad in want.items():
        assert_close(grads[name], grad, rtol=1e-5, atol=1e-6, msg=name)


@pytest.mark.parametrize("remat", [None, zf.remat], ids=["plain", "remat"])
@pytest.mark.parametrize("family", FAMILIES)
def test_the_loss_and_its_gradient_are_those_of_transformers(family, remat):
    model = model_of(family, key=3)
    batch = batch_of(family, 1, rows=3)
    want, grads = oracle(model, batch)
    params, loss_fn = from_hf(model, remat=remat)
    mean, got = zf.value_and_grad(lambda p: loss_fn(p, batch).value())(params)
    assert_close(mean, want, rtol=0, atol=1e-6)
    assert_grads_equal(got, grads)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_configuration_gives_the_model_of_transformers_bit_for_bit(family):
    model, state = model_of(family, key=7), torch.get_rng_state()
    params, loss_fn = from_hf(config_of(family), task=task_of(family), key=7)
    want = dict(model.named_parameters())
    assert list(params) == list(want)
    assert all(torch.equal(params[name], p) for name, p in want.items())
    assert {n: x.dtype for n, x in loss_fn.buffers.items()} == {
        n: x.dtype for n, x in model.named_buffers()
    }
    for name, b in model.named_buffers():
        assert torch.equal(loss_fn.buffers[name], b), name
    assert torch.equal(torch.get_rng_state(), state)  # torch's own numbers go on


def test_the_mean_is_exact_over_microbatches_of_unequal_length():
    params, loss_fn = from_hf(config_of("llama"), task="causal-lm")
    batch = joined([batch_of("llama", step, rows=1) for step in range(4)])
    whole = zf.train_step(loss_fn, zf.optim.sgd(0.1))
    parts = zf.train_step(loss_fn, zf.optim.sgd(0.1), zf.accumulate(4))
    mesh = zf.make_mesh({})
    a, b = (step(zf.shard(params, mesh), batch) for step in (whole, parts))
    assert_close(a.metrics.loss, b.metrics.loss)
    for x, y in zip(zf.tree_leaves(a.grads), zf.tree_leaves(b.grads), strict=True):
        assert_close(x, y, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize(
    ("family", "zero"),
    [("llama", 0), ("llama", 1), ("llama", 2), ("llama", 3), ("t5", 3)],
)
def test_every_stage_jitted_is_the_eager_step(family, zero):
    remat = zf.remat if zero == 3 else None
    params, loss_fn = from_hf(config_of(family), task=task_of(family), remat=remat)
    transforms = zf.partition(zero=zero), zf.accumulate(2), zf.precision("bf16")
    step = zf.train_step(loss_fn, zf.optim.adamw(1e-2), *transforms)
    batch = batch_of(family, 0, rows=4)
    spec = zf.P() if zero == 0 else None
    mesh = zf.make_mesh({"data": 1})
    states = [zf.shard(params, mesh, spec=spec) for _ in range(2)]
    eager, jitted = step(states[0], batch), zf.jit(step)(states[1], batch)
    assert torch.equal(eager.metrics.loss, jitted.metrics.loss)
    for a, b in zip(
        zf.tree_leaves(eager.params), zf.tree_leaves(jitted.params), strict=True
    ):
        assert torch.equal(a, b)
    exact = from_hf(config_of(family), task=task_of(family))[1](params, batch).value()
    assert_close(eager.metrics.loss, exact.detach(), rtol=0.01, atol=0)


@pytest.mark.parametrize(
    ("family", "changes"),
    [
        ("falcon", {}),
        ("falcon", {"attn_implementation": "eager"}),
        ("falcon", {"attn_implementation": "eager", "alibi": True}),
        ("mixtral", {}),
        ("bloom", {}),
        ("gpt2", {}),
    ],
)
def test_families_whose_code_writes_in_place_can_be_traced(family, changes):
    config = config_of(family, **changes)
    params, loss_fn = from_hf(config, task="causal-lm")
    step, batch = zf.train_step(loss_fn, zf.optim.sgd(0.1)), batch_of(family, 0)
    mesh = zf.make_mesh({})
    eager, jitted = (s(zf.shard(params, mesh), batch) for s in (step, zf.jit(step)))
    assert torch.equal(eager.metrics.loss, jitted.metrics.loss)
    model = model_of(family, **changes)
    model.load_state_dict(params, strict=False)
    assert_close(eager.metrics.loss, model(**batch).loss.detach())


@pytest.mark.parametrize("family", ["llama", "gpt2", "mistral"])
@pytest.mark.parametrize("keys", [(), ("attention_mask",)], ids=["ids", "left"])
def test_without_a_mask_and_with_padding_on_the_left(family, keys):
    model, batch = model_of(family), batch_of(family, 5, rows=3)
    batch = {key: x.flip(1) for key, x in batch.items()}
    if not keys:
        del batch["attention_mask"]
    want, grads = oracle(model, batch)
    params, loss_fn = from_hf(model)
    mean, got = zf.value_and_grad(lambda p: loss_fn(p, batch).value())(params)
    assert_close(mean, want)
    assert_grads_equal(got, grads)


@pytest.mark.parametrize(
    ("problem", "labels", "num_labels"),
    [
        ("regression", torch.tensor([0.5, -1.0, 2.0]), 1),
        ("regression", torch.randn(3, 2, generator=torch.Generator()), 2),
        (None, torch.tensor([0.5, -1.0, 2.0]), 1),
        (None, torch.tensor([1, 0, 1]), 2),
        ("multi_label_classification", torch.tensor([[1.0, 0.0]] * 3), 2),
    ],
)
@pytest.mark.parametrize("family", ["bert-classifier", "llama"])
def test_heads_of_classifiers(family, problem, labels, num_labels):
    import transformers

    config = config_of(family, num_labels=num_labels, problem_type=problem)
    auto = transformers.AutoModelForSequenceClassification
    model = auto.from_config(config).eval()
    ids = batch_of("llama", 0, rows=3)
    del ids["labels"]
    params, loss_fn = from_hf(model)
    mean = loss_fn(params, {**ids, "labels": labels})
    want = model(**ids, labels=labels).loss
    assert_close(mean.value(), want)
    assert mean.weight == 3
    assert loss_fn.config.problem_type == problem  # transformers writes to its own


def test_heads_of_tokens_do_not_count_what_is_not_labelled():
    import transformers

    auto = transformers.AutoModelForTokenClassification
    model = auto.from_config(config_of("bert", num_labels=4)).eval()
    batch = batch_of("llama", 0, rows=3)
    batch["labels"] = torch.where(batch["labels"] < 0, -100, batch["labels"] % 4)
    params, loss_fn = from_hf(model)
    assert_close(loss_fn(params, batch).value(), model(**batch).loss)


def test_a_batch_without_labelled_tokens_weighs_nothing():
    params, loss_fn = from_hf(config_of("llama"), task="causal-lm")
    batch = batch_of("llama", 0)
    batch["labels"] = torch.full_like(batch["labels"], -100)
    mean = loss_fn(params, batch)
    assert (mean.total, mean.weight, mean.value()) == (0, 0, 0)


@pytest.mark.parametrize("family", FAMILIES)
def test_the_model_is_left_alone(family):
    model = model_of(family)
    before = copy.deepcopy(model.state_dict())
    shown = repr(model), model.config.to_dict(), set(vars(model))
    params, loss_fn = from_hf(model, remat=zf.remat)
    zf.value_and_grad(lambda p: loss_fn(p, batch_of(family, 0)).value())(params)
    assert (repr(model), model.config.to_dict(), set(vars(model))) == shown
    assert all("forward" not in vars(part) for part in model.modules())
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name])
    assert all(p.is_meta for p in loss_fn.module.parameters())
    assert copy.deepcopy(loss_fn) is loss_fn


def test_tied_weights_are_one_leaf_in_both_places():
    params, loss_fn = from_hf(config_of("llama"), task="causal-lm")
    assert "lm_head.weight" not in params
    name, batch = "model.embed_tokens.weight", batch_of("llama", 0)
    _, grads = zf.value_and_grad(lambda p: loss_fn(p, batch).value())(params)
    unused = [i for i in range(37) if i not in batch["input_ids"]]
    assert grads[name][unused].abs().sum(1).all()  # the head's part of the gradient


def test_experts_are_all_computed_and_none_is_dropped():
    """The dense loop in the place of the routed kernel: the same function."""
    model = model_of("mixtral", num_local_experts=4, num_experts_per_tok=2)
    batch = batch_of("mixtral", 3, rows=5)
    params, loss_fn = from_hf(model)
    logits = loss_fn.apply(params, input_ids=batch["input_ids"]).logits
    assert_close(logits, model(input_ids=batch["input_ids"]).logits)


def test_adapters_are_told_apart_by_requires_grad():
    """A wrapper with small trained factors, as PEFT makes it."""

    class Scaled(torch.nn.Module):
        def __init__(self, inner):
            super().__init__()
            self.inner, self.scale = inner, torch.nn.Parameter(torch.ones(16))

        def forward(self, x):
            return self.inner(x) * self.scale

    class Adapter(torch.nn.Module):
        def __init__(self, model):
            super().__init__()
            self.base_model, self.config = model, model.config
            model.model.norm = Scaled(model.model.norm)

        def get_base_model(self):
            return self.base_model

        def forward(self, *args, **kwargs):
            return self.base_model(*args, **kwargs)

    model = model_of("llama").requires_grad_(False)
    wrapped, batch = Adapter(model), batch_of("llama", 0)
    params, loss_fn = from_hf(wrapped)
    assert set(params) == {"base_model.model.norm.scale"}
    assert len(loss_fn.frozen) == len(list(model.parameters())) - 1
    mean, grads = zf.value_and_grad(lambda p: loss_fn(p, batch).value())(params)
    want = model(**batch).loss
    want.backward()
    assert_close(mean, want.detach())
    assert_close(*grads.values(), model.model.norm.scale.grad)


@pytest.mark.parametrize("family", CAUSAL)
def test_frozen_parameters_have_no_gradient_and_are_used(family):
    model, batch = model_of(family), batch_of(family, 2)
    _, want = oracle(model, batch)
    params, loss_fn = from_hf(model, trainable=lambda n: "norm" in n or "ln_" in n)
    assert 0 < len(params) < len(want)
    assert params.keys() | loss_fn.frozen.keys() == want.keys()
    _, got = zf.value_and_grad(lambda p: loss_fn(p, batch).value())(params)
    assert_grads_equal(got, {name: want[name] for name in params})
