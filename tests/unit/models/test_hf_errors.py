# SPDX-License-Identifier: Apache-2.0
"""What ``from_hf`` and its losses refuse, and what they say to type instead."""

import copy
import importlib.util

import pytest
import torch

import zfunc as zf
from tests.distributed.hf_families import batch_of, config_of, model_of
from zfunc.models import ModelError, from_hf


def causal(**changes):
    return from_hf(config_of("llama", **changes), task="causal-lm")


@pytest.mark.parametrize(
    ("family", "changes", "names"),
    [
        ("gpt2", {"attn_pdrop": 0.1}, ["attn_pdrop=0.1"]),
        ("bert", {"hidden_dropout_prob": 0.2}, ["hidden_dropout_prob=0.2"]),
        ("llama", {"attention_dropout": 0.3}, ["attention_dropout=0.3"]),
        ("t5", {"dropout_rate": 0.1}, ["dropout_rate=0.1"]),
        (
            "opt",
            {"dropout": 0.1, "layerdrop": 0.5},
            ["dropout=0.1", "layerdrop=0.5"],
        ),
        ("mixtral", {"router_jitter_noise": 0.1}, ["router_jitter_noise=0.1"]),
        (
            "bert-classifier",
            {"classifier_dropout": 0.1},
            ["classifier_dropout=0.1"],
        ),
    ],
)
def test_dropout_is_refused_by_the_names_of_its_keys(family, changes, names):
    model = model_of(family, **changes)
    with pytest.raises(ModelError) as error:
        from_hf(model)
    assert all(name in str(error.value) for name in names)
    assert "dropout='off'" in str(error.value)
    params, loss_fn = from_hf(model.train(), dropout="off")
    assert model.training
    batch = batch_of(family, 0)
    want = model.eval()(**batch).loss
    torch.testing.assert_close(loss_fn(params, batch).value(), want)


def test_rates_that_a_model_does_not_use_do_not_matter():
    assert config_of("gpt2").summary_first_dropout == 0.1
    assert config_of("gpt_neox").classifier_dropout == 0.1
    for family in ("gpt2", "gpt_neox"):
        from_hf(config_of(family), task="causal-lm")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"input_ids": [[1, 2]]}, "'input_ids'. is a list, expected a tensor"),
        ({"input_ids": torch.ones(2, 3)}, "'input_ids'. is torch.float32, .* .long"),
        ({"input_ids": torch.ones(3).long()}, r"shape \(3,\), .* ids\[None\]"),
        ({"labels": torch.ones(2, 3).int()}, "'labels'. is torch.int32, expected"),
        ({"labels": None}, r"no 'labels': to train on every token pass labels=input"),
        ({"lables": torch.ones(2)}, r"'lables'\] is not an input of LlamaForCausalLM"),
        ({"use_cache": True}, r"'use_cache'\] is not an input"),
        ({"segment_ids": torch.ones(2, 7)}, r"'segment_ids'\] is not an input"),
    ],
)
def test_batches(change, message):
    params, loss_fn = causal()
    batch = {**batch_of("llama", 0), **change}
    batch = {key: x for key, x in batch.items() if x is not None}
    with pytest.raises(ModelError, match=message):
        loss_fn(params, batch)


def test_other_batches():
    params, loss_fn = causal()
    with pytest.raises(
        ModelError, match=r"a batch is a dict of tensors .* got a Tensor"
    ):
        loss_fn(params, torch.ones(2, 3))
    params, loss_fn = from_hf(config_of("llama"), task="causal-lm", packed=True)
    batch = batch_of("llama", 0)
    with pytest.raises(ModelError, match=r"'attention_mask'.*with packed=True"):
        loss_fn(params, batch)
    del batch["attention_mask"]
    with pytest.raises(ModelError, match=r"no 'position_ids': .*zf.models.pack"):
        loss_fn(params, batch)
    for family, words in (("t5", "the target's"), ("bert", "tokens are masked")):
        params, loss_fn = from_hf(model_of(family))
        with pytest.raises(ModelError, match=words):
            loss_fn(params, {"input_ids": batch["input_ids"]})


def test_parameters_of_another_model():
    params, loss_fn = causal()
    params["extra"] = params.pop("model.norm.weight")
    with pytest.raises(zf.StructureError) as error:
        loss_fn(params, batch_of("llama", 0))
    assert "missing: model.norm.weight" in str(error.value)
    assert "not of this model: extra" in str(error.value)


def test_targets_of_which_nothing_says_how_they_begin():
    model = model_of("t5")
    model.config.decoder_start_token_id = None
    params, loss_fn = from_hf(model)
    with pytest.raises(ModelError, match=r"decoder_start_token_id=None.*or pass batch"):
        loss_fn(params, batch_of("t5", 0))
    batch = batch_of("t5", 0)
    batch["decoder_input_ids"] = torch.zeros_like(batch["labels"])
    want = model(**batch).loss
    torch.testing.assert_close(loss_fn(params, batch).value(), want)


def test_the_inputs_of_a_decoder_may_be_given_as_vectors():
    model, batch = model_of("t5"), batch_of("t5", 0)
    batch["decoder_inputs_embeds"] = torch.randn(2, 5, 16)
    want = model(**batch).loss
    params, loss_fn = from_hf(model)
    torch.testing.assert_close(loss_fn(params, batch).value(), want)


def test_targets_that_begin_in_another_way():
    import transformers

    config = transformers.MBartConfig(
        vocab_size=37, d_model=8, encoder_layers=1, decoder_layers=1,
        encoder_attention_heads=1, decoder_attention_heads=1, encoder_ffn_dim=8,
        decoder_ffn_dim=8, dropout=0.0, decoder_start_token_id=2,
    )  # fmt: skip
    model, batch = transformers.MBartForConditionalGeneration(config), batch_of("t5", 0)
    params, loss_fn = from_hf(model)
    with pytest.raises(ModelError, match=r"mbart makes .* pass batch\['decoder_input_"):
        loss_fn(params, batch)
    batch["decoder_input_ids"] = torch.ones_like(batch["labels"])
    want = model.eval()(**batch).loss
    torch.testing.assert_close(loss_fn(params, batch).value(), want)


def test_classes_that_compute_another_loss():
    import transformers

    sizes = {"d_model": 8, "n_layer": 1, "n_head": 2, "d_inner": 8, "dropout": 0.0}
    config = transformers.XLNetConfig(vocab_size=37, **sizes)
    for source in (config, transformers.XLNetLMHeadModel(config)):
        with pytest.raises(ModelError, match=r"XLNetLMHeadModel does not compute the"):
            from_hf(source, task="causal-lm")

    class SeesForConditionalGeneration(transformers.LlamaForCausalLM):
        pass

    with pytest.raises(ModelError, match="has no decoder that reads the labels"):
        from_hf(SeesForConditionalGeneration(config_of("llama")))
    model = model_of("llama")
    model.loss_function = lambda logits, labels, vocab_size, **_: logits.sum()
    with pytest.raises(ModelError, match="has a loss_function of its own"):
        from_hf(model)


def test_labels_are_one_per_token():
    params, loss_fn = causal()
    ids = batch_of("llama", 0)["input_ids"]
    for labels in (ids.T, ids.reshape(-1), ids[:, 1:]):
        with pytest.raises(
            ModelError, match=r"give one label per token, \(2, 7\), -100"
        ):
            loss_fn(params, {"input_ids": ids, "labels": labels})


def test_sources():
    with pytest.raises(TypeError, match=r"path of a checkpoint directory, got a int"):
        from_hf(3)
    with pytest.raises(TypeError, match=r"a Linear is no model of transformers"):
        from_hf(torch.nn.Linear(2, 2))
    with torch.device("meta"):
        empty = model_of("llama")
    with pytest.raises(ModelError, match=r"on the meta device.*pass model.config"):
        from_hf(empty)


def test_tasks_and_classes():
    import transformers

    config = config_of("llama")
    with pytest.raises(ModelError, match=r"names no architecture: pass task=, one of"):
        from_hf(config)
    with pytest.raises(ModelError, match=r"task='clm' is not one of causal-lm"):
        from_hf(config, task="clm")
    with pytest.raises(ModelError, match=r"task='masked-lm': transformers has no such"):
        from_hf(config, task="masked-lm")
    with pytest.raises(ModelError, match=r"LlamaForCausalLM \(causal-lm\), not masked"):
        from_hf(model_of("llama"), task="masked-lm")
    config.architectures = ["LlamaModel"]
    with pytest.raises(ModelError, match=r"architecture is LlamaModel, whose loss is"):
        from_hf(config)
    base = transformers.AutoModel.from_config(config)
    with pytest.raises(ModelError, match=r"is a LlamaModel, whose loss is not known"):
        from_hf(base)
    config.architectures = ["LlamaForCausalLM"]
    assert from_hf(config)[1].kind == "causal-lm"


def test_a_loss_that_is_no_mean_over_tokens():
    with pytest.raises(ModelError, match="output_router_logits adds a balancing loss"):
        from_hf(config_of("mixtral", output_router_logits=True), task="causal-lm")


def test_a_rope_that_writes_to_a_buffer():
    rope = {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4}
    with pytest.raises(ModelError, match=r"rotary_emb has rope_type='dynamic'"):
        causal(rope_parameters=rope)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"mesh": {"data": 1}}, TypeError, r"mesh is made by zf.make_mesh"),
        ({"spec": zf.P()}, ModelError, r"pass mesh too"),
        ({"dtype": torch.int8}, TypeError, r"dtype is a floating torch.dtype"),
        ({"dtype": "bf16"}, TypeError, r"dtype is a floating torch.dtype"),
        ({"key": 0.5}, TypeError, r"key is an integer seed, got 0.5"),
        ({"remat": True}, TypeError, r"remat is zf.remat or None, got True"),
        ({"packed": 1}, TypeError, r"packed is True or False, got 1"),
        ({"dropout": 0.1}, ModelError, r"dropout is 'off' or None, got 0.1"),
        ({"new": ["*"]}, ModelError, r"new is for checkpoint directories"),
        ({"ignore": ["*"]}, ModelError, r"ignore is for checkpoint directories"),
        ({"ignore": "*"}, TypeError, r"ignore is a list of patterns"),
        ({"trainable": ["*.biass"]}, ModelError, r"'\*.biass' matches none"),
        ({"trainable": lambda n: False}, ModelError, r"would be nothing to train"),
    ],
)
@pytest.mark.parametrize("given", ["config", "model"])
def test_options(given, options, error, message):
    source = config_of("llama") if given == "config" else model_of("llama")
    with pytest.raises(error, match=message):
        from_hf(source, task="causal-lm", **options)


def test_specs_and_meshes():
    mesh, config = zf.make_mesh({"data": 1}), config_of("llama")
    with pytest.raises(TypeError, match=r"spec is a P such as .* got 'data'"):
        from_hf(config, task="causal-lm", mesh=mesh, spec="data")
    with pytest.raises(ModelError, match=r"spec\['w'\] is no parameter"):
        from_hf(config, task="causal-lm", mesh=mesh, spec={"w": zf.P()})
    with pytest.raises(ModelError, match=r"of kind 'abstract': leave mesh out"):
        from_hf(config, task="causal-lm", mesh=zf.AbstractMesh({"data": 4}))
    with pytest.raises(zf.MeshError, match=r"axis 'data' is not an axis"):
        from_hf(config, task="causal-lm", mesh=zf.make_mesh({"model": 1}))


def test_remat_of_a_model_without_layers():
    model = model_of("gpt2")
    model.transformer.h = torch.nn.ModuleList()
    with pytest.raises(ModelError, match="remat: found no list of layers"):
        from_hf(model, remat=zf.remat)


def test_without_transformers(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ModelError, match=r"pip install 'transformers>=5'"):
        from_hf("anywhere")


def test_a_constructor_that_looks_at_its_numbers():
    model = type(model_of("llama"))

    class Picky(model):
        def __init__(self, config):
            super().__init__(config)
            if float(self.lm_head.weight.sum()) > 1e9:
                raise ValueError

    class Hidden(model):
        def __init__(self, config):
            super().__init__(config)
            self.table = torch.arange(3)

    from zfunc.models.hf.birth import record

    config = copy.deepcopy(config_of("llama"))
    with pytest.raises(ModelError, match="looks at the numbers it draws"):
        record(lambda: Picky(config))
    with pytest.raises(ModelError, match="table is a tensor that is neither"):
        record(lambda: Hidden(config))
