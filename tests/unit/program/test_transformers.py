# SPDX-License-Identifier: Apache-2.0
"""Models of transformers are traced as they are: no patch, no explicit mask."""

import pytest
import torch
import transformers
from torch.func import functional_call

import zfunc as zf
from zfunc.core.tree import leaves_with_path
from zfunc.testing import differences

SIZES = {
    "vocab_size": 32,
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 32,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
WINDOW = 4
MODELS = {
    "gpt2": {
        "vocab_size": 32,
        "n_embd": 16,
        "n_layer": 2,
        "n_head": 4,
        "n_positions": 32,
        "attn_pdrop": 0.0,
        "embd_pdrop": 0.0,
        "resid_pdrop": 0.0,
        "bos_token_id": 1,
        "eos_token_id": 2,
    },
    "llama": SIZES,
    "mistral": {**SIZES, "sliding_window": WINDOW},
    "qwen2": SIZES,
}
BATCH, TOKENS = 2, 8


def model_of(name, tied):
    torch.manual_seed(0)
    config = transformers.AutoConfig.for_model(
        name, **MODELS[name], tie_word_embeddings=tied
    )
    return transformers.AutoModelForCausalLM.from_config(config)


def batch_of(tokens=TOKENS, mask=None):
    generator = torch.Generator().manual_seed(1)
    batch = {"input_ids": torch.randint(3, 32, (BATCH, tokens), generator=generator)}
    if mask is not None:
        batch["attention_mask"] = torch.ones(BATCH, tokens, dtype=torch.long)
        batch["attention_mask"][0, tokens - mask :] = 0
    return batch


def training(name, *, tied=True, use_cache=False, transforms=()):
    """A step of the model, and its state."""
    model = model_of(name, tied)
    params = {k: p.detach() for k, p in model.named_parameters()}
    buffers = dict(model.named_buffers())

    def loss_fn(params, batch):
        inputs = {**batch, "labels": batch["input_ids"], "use_cache": use_cache}
        return functional_call(model, (params, buffers), (), inputs).loss

    step = zf.train_step(loss_fn, zf.optim.sgd(0.1, momentum=0.9), *transforms)
    return step, zf.shard(params, zf.make_mesh({"data": 1}), tx=step.tx)


def run(step, state, batch):
    """Two steps of a copy, which may be donated."""
    state = zf.tree_map(torch.clone, state)
    for _ in range(2):
        state = step(state, batch)
    return state


def attention_calls(step, state, batch):
    graph = zf.jit(step, passes=()).lower(state, batch).graph
    target = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default
    return [n for n in graph.nodes if n.target is target]


@pytest.mark.parametrize("use_cache", [True, False])
@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("name", MODELS)
def test_without_a_mask(name, tied, use_cache):
    """The same bits, by SDPA's causal kernel: nothing of size tokens x tokens."""
    step, state = training(name, tied=tied, use_cache=use_cache)
    batch = batch_of(WINDOW - 1 if name == "mistral" else TOKENS)
    assert not differences(run(zf.jit(step), state, batch), run(step, state, batch))
    calls = attention_calls(step, state, batch)
    assert len(calls) == 2
    for call in calls:
        assert call.args[3:] == (0.0, True)  # dropout, is_causal
        assert "attn_mask" not in call.kwargs


@pytest.mark.parametrize("use_cache", [True, False])
def test_a_sliding_window_shorter_than_the_sequence(use_cache):
    step, state = training("mistral", use_cache=use_cache)
    batch = batch_of()
    assert not differences(run(zf.jit(step), state, batch), run(step, state, batch))
    assert all("attn_mask" in c.kwargs for c in attention_calls(step, state, batch))


@pytest.mark.parametrize("padding", [0, 3])
@pytest.mark.parametrize("use_cache", [True, False])
@pytest.mark.parametrize("name", MODELS)
def test_with_a_mask_in_the_batch(name, use_cache, padding):
    """Eager transformers looks whether anything is padded; the trace has a mask."""
    step, state = training(name, use_cache=use_cache)
    batch = batch_of(mask=padding)
    got, want = run(zf.jit(step), state, batch), run(step, state, batch)
    assert not differences(got, want, rtol=1e-6, atol=1e-6)


def test_one_program_for_all_masks():
    """The mask is an input: what is padded is not baked in."""
    step, state = training("llama")
    jitted = zf.jit(step, donate=False)
    for padding in (0, 1, 3):
        batch = batch_of(mask=padding)
        got, want = jitted(state, batch), step(state, batch)
        assert not differences(got, want, rtol=1e-6, atol=1e-6)
    assert differences(got, jitted(state, batch_of(mask=0)))


@pytest.mark.parametrize("name", MODELS)
def test_tied_weights_are_one_parameter(name):
    untied = {
        path for path, _ in leaves_with_path(training(name, tied=False)[1].params)
    }
    step, state = training(name, tied=True)
    paths = {path for path, _ in leaves_with_path(state.params)}
    assert len(untied - paths) == 1
    program = zf.jit(step).lower(state, batch_of())
    assert sum(path.startswith("params/") for path in program.inputs) == len(paths)


@pytest.mark.parametrize("name", MODELS)
def test_sharded_accumulated_and_in_bf16(name):
    transforms = (zf.partition(zero=3), zf.accumulate(2), zf.precision("bf16"))
    step, state = training(name, transforms=transforms)
    assert not differences(
        run(zf.jit(step), state, batch_of()), run(step, state, batch_of())
    )


def test_nothing_of_transformers_stays_changed():
    masking = transformers.masking_utils
    before = (masking.is_tracing, masking.find_packed_sequence_indices)
    step, state = training("llama")
    zf.jit(step).lower(state, batch_of())
    with pytest.raises(KeyError):
        zf.jit(step).lower(state, {})
    assert (masking.is_tracing, masking.find_packed_sequence_indices) == before
