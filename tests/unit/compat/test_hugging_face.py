# SPDX-License-Identifier: Apache-2.0
"""Models of transformers through the bridge, by their loss and by their logits."""

import pytest
import torch
from torch import nn

from tests.unit.compat.cases import LR, engine_of
from zfunc.compat import CompatError


def model_of(name):
    import transformers

    torch.manual_seed(0)
    shape = {"vocab_size": 41, "hidden_size": 16, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 2, "intermediate_size": 24}
    match name:
        case "GPT2":
            config = transformers.GPT2Config(
                vocab_size=41, n_embd=16, n_layer=2, n_head=2, n_positions=16
            )
            return transformers.GPT2LMHeadModel(config)
        case "Bloom":
            config = transformers.BloomConfig(
                vocab_size=41, hidden_size=16, n_layer=2, n_head=2
            )
            return transformers.BloomForCausalLM(config)
        case "T5":
            config = transformers.T5Config(
                vocab_size=41, d_model=16, d_kv=8, d_ff=24, num_layers=2, num_heads=2
            )
            config.decoder_start_token_id = 0
            return transformers.T5ForConditionalGeneration(config)
        case "Bert":
            config = transformers.BertConfig(**shape, **heads, num_labels=3)
            return transformers.BertForSequenceClassification(config)
        case "Qwen3":
            config = transformers.Qwen3Config(
                **shape, **heads, num_key_value_heads=1, head_dim=8
            )
            return transformers.Qwen3ForCausalLM(config)


def batch_of(name, i):
    generator = torch.Generator().manual_seed(i)
    ids = torch.randint(1, 41, (3, 9), generator=generator)
    mask = torch.ones_like(ids)
    mask[1, 6:] = 0
    labels = torch.randint(0, 3, (3,), generator=generator) if name == "Bert" else ids
    return {"input_ids": ids, "attention_mask": mask, "labels": labels}


def losses(module, name, by_logits, back):
    found = []
    for i in range(4):
        torch.manual_seed(i)  # of the dropouts
        batch = batch_of(name, i)
        if by_logits:
            labels = batch.pop("labels")
            logits = module(**batch).logits
            logits = logits if name == "Bert" else logits[:, :-1].flatten(0, 1)
            targets = labels if name == "Bert" else labels[:, 1:].flatten()
            loss = nn.functional.cross_entropy(logits, targets)
        else:
            loss = module(**batch).loss
        back(loss)
        found.append(loss.item())
    return found


@pytest.mark.parametrize(
    ("name", "by_logits"),
    [
        ("GPT2", False),
        ("GPT2", True),
        ("Bloom", False),
        ("T5", False),
        ("Bert", True),
        ("Qwen3", False),
    ],
)
def test_losses_are_those_of_a_torch_loop(name, by_logits):
    plain = model_of(name).train()
    optimizer = torch.optim.AdamW(plain.parameters(), LR, weight_decay=0.01)

    def torch_back(loss):
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    want = losses(plain, name, by_logits, torch_back)
    engine = engine_of(model_of(name).train(), zero=3)

    def engine_back(loss):
        engine.backward(loss)
        engine.step()

    assert losses(engine, name, by_logits, engine_back) == pytest.approx(want, rel=1e-5)
    trained = engine.module
    for a, b in zip(trained.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-4)
    assert trained.state_dict().keys() == plain.state_dict().keys()


def test_a_cache_is_no_output_of_training():
    engine = engine_of(model_of("GPT2"))
    out = engine.train()(**batch_of("GPT2", 0))
    assert out.past_key_values is None
    assert type(out).__name__ == "CausalLMOutputWithCrossAttentions"
    out = engine.eval()(**batch_of("GPT2", 0))
    assert out.past_key_values is not None


def test_saved_for_transformers(tmp_path):
    engine = engine_of(model_of("GPT2"), zero=3)
    engine.module.save_pretrained(tmp_path)
    again = type(model_of("GPT2")).from_pretrained(tmp_path)
    for a, b in zip(again.parameters(), engine.module.parameters(), strict=True):
        assert torch.equal(a, b)


def test_what_torch_func_does_not_support():
    model = model_of("GPT2")
    model.activation_checkpointing_enable()
    with pytest.raises(CompatError, match="has activation checkpointing on"):
        engine_of(model)
