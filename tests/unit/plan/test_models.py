# SPDX-License-Identifier: Apache-2.0
"""Presets, models by Python path, and what is refused."""

import pytest

from zfunc.core.tree import tree_leaves
from zfunc.plan import PlanError, Request, plan
from zfunc.plan.models import load
from zfunc.plan.presets import PRESETS


@pytest.mark.parametrize("preset", PRESETS, ids=lambda p: p.name)
def test_presets_have_as_many_parameters_as_they_say(preset):
    leaves = tree_leaves(load(preset.name).build(None, 128, None).params)
    assert sum(leaf.numel() for leaf in leaves) == preset.num_params
    assert all(leaf.is_meta for leaf in leaves)


@pytest.mark.parametrize(
    ("name", "num_params"),
    [
        ("llama-7b", 6_738_415_616),  # both as transformers counts them
        ("llama-70b", 68_976_648_192),
        ("hf-llama-7b", 6_738_415_616),
        ("small", 124_000_000),
        ("7.5b", 7_500_000_000),
        ("1t", 1_000_000_000_000),
    ],
)
def test_presets_are_the_models_they_are_named_after(name, num_params):
    found = next(p.num_params for p in PRESETS if p.name == name)
    assert found == pytest.approx(num_params, rel=0 if "llama" in name else 0.01)


def test_the_two_llamas_are_one():
    """What is sent and computed does not depend on who wrote the layers."""
    ours, theirs = (
        plan(Request(model=name, ranks=8, seq_len=64, layers=2), 3)
        for name in ("llama-7b", "hf-llama-7b")
    )
    assert ours.num_params == theirs.num_params
    assert ours.wire_elements == theirs.wire_elements
    assert ours.flops == pytest.approx(theirs.flops, rel=0.005)  # 64 and 63 targets
    assert ours.states == theirs.states


MODULE = """
import torch

def build(num_layers=3, seq_len=16, remat=None):
    params = [torch.empty(8, 8, device="meta") for _ in range(num_layers)]

    def layer(w, x):
        return torch.tanh(x @ w)

    layer = layer if remat is None else remat(layer)

    def loss_fn(params, x):
        for w in params:
            x = layer(w, x)
        return x.square().mean()

    return params, loss_fn, lambda samples, seq_len: torch.empty(samples, seq_len, 8)

def plain():
    return {"w": torch.empty(3, device="meta")}, lambda p, ids: (p["w"] * ids).mean()

def no_default(num_layers):
    return None

def one():
    return {"w": torch.empty(3)}

def integers():
    return {"w": {"a": torch.empty(3, dtype=torch.int64)}}, lambda p, b: None
"""


@pytest.fixture
def module(tmp_path, monkeypatch):
    (tmp_path / "my_planned_model.py").write_text(MODULE)
    monkeypatch.syspath_prepend(tmp_path)
    return "my_planned_model"


@pytest.mark.parametrize("remat", [False, True])
def test_a_model_of_yours(module, remat):
    request = Request(model=f"{module}:build", ranks=4, layers=20, remat=remat)
    stage = plan(request, 3)
    assert stage.num_params == 20 * 64
    assert stage.traced == (13, 14, 15)  # layers of one parameter


def test_a_model_without_layers(module):
    stage = plan(Request(model=f"{module}:plain", ranks=3, seq_len=3), 2)
    assert (stage.num_params, stage.traced) == (3, ())


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("7b", r"--model 7b: there is no preset .* \(did you mean 7.5b\?\); type one"),
        ("nowhere:f", r"cannot import nowhere .*; the path is your.module:function"),
        ("{}:f", r"my_planned_model has no function 'f'"),
        ("{}:no_default", r"the default of num_layers must be the model's own number"),
        ("{}:one", r"must return \(params, loss_fn\) or .*, it returned a dict"),
        ("{}:integers", r"params\['w.a'\] must be a floating tensor, .* torch.int64"),
    ],
)
def test_models_that_are_none(module, name, message):
    with pytest.raises(PlanError, match=message):
        plan(Request(model=name.format(module), ranks=2), 0)


def test_layers_of_a_model_without(module):
    with pytest.raises(
        PlanError, match=r"--layers 4: .* give it a parameter num_layer"
    ):
        load(f"{module}:plain", 4)


def test_remat_of_a_model_without(module):
    request = Request(model=f"{module}:plain", ranks=2, remat=True)
    with pytest.raises(PlanError, match=r"--remat: .* takes no parameter remat"):
        plan(request, 0)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"ranks": 0}, "--ranks 0: must be at least 1"),
        ({"seq_len": -1}, "--seq-len -1: must be at least 1"),
        ({"precision": "fp8"}, "--precision fp8: must be bf16 or fp32"),
        ({"reduce": "fp16"}, "--reduce fp16: must be bf16 or fp32"),
        ({"device": "b200"}, "--device b200: must be "),
        ({"wire_gb_per_s": 0.0}, "--wire-gb-per-s 0.0: must be positive"),
        (
            {"batch_size": 10, "microbatches": 2},
            "--batch-size 10: not a multiple of --ranks 4 x --microbatches 2; type 16",
        ),
    ],
)
def test_what_cannot_be_planned(options, message):
    with pytest.raises(PlanError, match=message):
        Request(**{"model": "tiny", "ranks": 4, **options})
