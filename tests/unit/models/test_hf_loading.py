# SPDX-License-Identifier: Apache-2.0
"""Checkpoint directories and random births, whole and in the pieces of each rank."""

import json
import sys

import pytest
import torch
from safetensors.torch import load_file, save_file

import zfunc as zf
from tests.distributed.hf_families import FAMILIES, config_of, model_of, task_of
from zfunc.core.mesh import Mesh
from zfunc.models import ModelError, from_hf
from zfunc.models.hf import birth, files
from zfunc.testing.memory import peak_live_bytes


def rank_mesh(rank, world):
    """The mesh as rank ``rank`` of a job sees it; nothing here communicates."""
    return Mesh((("data", world),), "process", "cpu", rank, ("none",))


def pieced_together(source, world, spec=None, **options):
    """Full tensors from the pieces of every rank, whose paddings have to be zero."""
    ranks = [
        from_hf(source, mesh=rank_mesh(rank, world), spec=spec, **options)[0]
        for rank in range(world)
    ]
    full = {}
    for name, leaf in ranks[0].items():
        if not leaf.sharding.axes:
            full[name] = leaf.buffer
            continue
        dim = leaf.sharding.spec.index("data")
        joined = torch.cat([rank[name].buffer for rank in ranks], dim)
        size = leaf.global_shape[dim]
        full[name] = joined.narrow(dim, 0, size)
        assert not joined.narrow(dim, size, joined.shape[dim] - size).any()
    return full


def assert_same(params, model, dtype=None):
    want = dict(model.named_parameters())
    assert list(params) == list(want)
    for name, p in want.items():
        value = p.detach() if dtype is None else p.detach().to(dtype)
        assert params[name].dtype == value.dtype
        assert torch.equal(params[name], value), name


@pytest.fixture
def saved(tmp_path):
    def save(family, **options):
        model = model_of(family, key=4)
        model.save_pretrained(tmp_path, **options)
        return model, tmp_path

    return save


@pytest.mark.parametrize("family", FAMILIES)
def test_a_directory_gives_the_parameters_that_were_saved(saved, family):
    model, path = saved(family)
    params, loss_fn = from_hf(path)
    assert_same(params, model)
    assert loss_fn.kind == task_of(family)
    for name, b in model.named_buffers():
        assert torch.equal(loss_fn.buffers[name], b)


@pytest.mark.parametrize("family", ["llama", "mixtral", "t5"])
def test_every_rank_reads_its_pieces_of_several_files(saved, family):
    model, path = saved(family, max_shard_size="4KB")
    assert len(list(path.glob("*.safetensors"))) > 3
    assert_same(pieced_together(path, 2), model)
    assert_same(pieced_together(path, 5), model)  # more ranks than experts
    by_columns = pieced_together(path, 3, zf.P(None, "data"), dtype=torch.bfloat16)
    assert_same(by_columns, model, torch.bfloat16)


@pytest.mark.parametrize("family", FAMILIES)
def test_every_rank_draws_its_pieces_of_a_configuration(family):
    options = {"task": task_of(family), "key": 11}
    full = pieced_together(config_of(family), 3, **options)
    assert_same(full, model_of(family, key=11))


class Constants(torch.nn.Module):
    """Numbers that no operator makes: they are written in the code."""

    def __init__(self):
        super().__init__()
        self.scale = torch.nn.Parameter(torch.tensor([1.0, 2.0]))
        self.drawn = torch.nn.Parameter(torch.empty(3).normal_())
        self.register_buffer("changed", torch.tensor([3.0, 4.0]).mul_(2).add_(1))
        table = torch.tensor([5.0, 6.0])
        table[0] = 7
        self.register_buffer("table", table)


def test_numbers_of_the_code_itself_are_born_too():
    recording, made = birth.record(Constants), {}
    birth.replay(
        recording, list(recording.named), 3, lambda n, x: made.update({n: x.clone()})
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(3)
        want = Constants().state_dict()
    assert made.keys() == want.keys()
    for name, x in want.items():
        assert torch.equal(made[name], x), name


def test_stored_buffers_are_whole_on_every_rank(tmp_path):
    import transformers

    config = transformers.Glm4MoeConfig(
        **dict.fromkeys(("hidden_size", "intermediate_size", "head_dim"), 8),
        vocab_size=37,
        moe_intermediate_size=8,
        num_hidden_layers=1,
        num_attention_heads=1,
        num_key_value_heads=1,
        n_routed_experts=4,
        num_experts_per_tok=2,
        first_k_dense_replace=0,
        pad_token_id=0,
    )
    model = transformers.Glm4MoeForCausalLM(config)
    name = "model.layers.0.mlp.gate.e_score_correction_bias"
    model.get_buffer(name).normal_()
    model.save_pretrained(tmp_path)
    for rank in range(2):
        _, loss_fn = from_hf(tmp_path, mesh=rank_mesh(rank, 2), dtype=torch.bfloat16)
        assert torch.equal(loss_fn.buffers[name], model.get_buffer(name))


def test_a_model_is_cut_into_pieces_that_do_not_hold_the_whole():
    model = model_of("llama")
    assert_same(pieced_together(model, 4), model)
    params, _ = from_hf(model, mesh=rank_mesh(0, 4))
    for leaf in params.values():
        held = leaf.buffer.untyped_storage().nbytes()
        assert held == leaf.buffer.numel() * leaf.buffer.element_size()


def test_specs_by_name():
    name = "model.layers.0.mlp.up_proj.weight"
    spec = {name: zf.P(None, "data")}
    params, _ = from_hf(model_of("llama"), mesh=rank_mesh(0, 2), spec=spec)
    assert params[name].sharding.spec == zf.P(None, "data")
    assert params["model.norm.weight"].sharding.spec == zf.P("data")


def test_no_rank_reads_more_than_its_pieces(saved, monkeypatch):
    model, path = saved("llama")
    read = []

    def counted(stored, region=None, *, inner=files.Stored.read):
        tensor = inner(stored, region)
        read.append(tensor.numel())
        return tensor

    monkeypatch.setattr(files.Stored, "read", counted)
    from_hf(path, mesh=rank_mesh(1, 2))
    total = sum(p.numel() for p in model.parameters())
    assert sum(read) <= 0.51 * total


def test_no_rank_reads_the_experts_of_others(saved, monkeypatch):
    _, path = saved("mixtral")
    keys = []

    def noted(stored, region=None, *, inner=files.Stored.read):
        keys.append(stored.key)
        return inner(stored, region)

    monkeypatch.setattr(files.Stored, "read", noted)
    from_hf(path, mesh=rank_mesh(1, 3))
    experts = {key.split("experts.")[1][0] for key in keys if "experts." in key}
    assert experts == {"1"}


@pytest.mark.parametrize("source", ["config", "directory"])
def test_no_rank_ever_holds_the_whole_model(saved, source, monkeypatch):
    """The peak is the pieces and about one parameter, for a model of many layers."""
    config = config_of("llama", num_hidden_layers=12, hidden_size=32)
    model = model_of("llama", num_hidden_layers=12, hidden_size=32)
    model.save_pretrained(path := saved("gpt2")[1] / "deep")
    # What a constructor makes of fake tensors has sizes and no memory.
    recording = birth.record(lambda: type(model)(config))
    monkeypatch.setattr(
        sys.modules["zfunc.models.hf.from_hf"], "record", lambda make: recording
    )
    whole = sum(p.numel() * 4 for p in model.parameters())
    largest = max(p.numel() * 4 for p in model.parameters())
    given = config if source == "config" else path
    mesh = rank_mesh(0, 4)
    _, peak = peak_live_bytes(lambda: from_hf(given, task="causal-lm", mesh=mesh))
    assert whole / 4 <= peak <= whole / 4 + 3 * largest + 4096
    assert peak < whole / 2


def test_dtypes(saved):
    model, path = saved("llama")
    assert_same(from_hf(path, dtype=torch.float64)[0], model, torch.float64)
    half = model.to(torch.bfloat16)
    half.save_pretrained(path / "half")
    assert_same(from_hf(path / "half")[0], half)
    drawn, loss_fn = from_hf(
        config_of("llama"), task="causal-lm", key=4, dtype=torch.bfloat16
    )
    import transformers

    torch.manual_seed(4)
    auto = transformers.AutoModelForCausalLM
    assert_same(drawn, auto.from_config(config_of("llama"), dtype=torch.bfloat16))
    assert loss_fn.buffers["model.rotary_emb.inv_freq"].dtype == torch.float32


def test_a_base_model_gets_a_new_head(saved):
    model, path = saved("bert")
    task = {"task": "sequence-classification"}
    with pytest.raises(ModelError) as error:
        from_hf(path, **task)
    text = str(error.value)
    assert "does not hold the weights of BertForSequenceClassification" in text
    assert "missing: classifier.weight" in text
    assert "missing: bert.pooler.dense.bias" in text
    assert "not of the model: cls.predictions.bias" in text
    assert "new=[patterns]" in text
    new, ignore = ["classifier.*", "*.pooler.*"], ["cls.*"]
    params, _ = from_hf(path, **task, new=new, ignore=ignore, key=2)
    again, _ = from_hf(path, **task, new=new, ignore=ignore, key=2)
    old = dict(model.named_parameters())
    for name, leaf in params.items():
        assert torch.equal(leaf, old[name] if name in old else again[name])
    assert params["classifier.weight"].std() == pytest.approx(0.02, rel=0.5)


def test_names_without_the_prefix_of_the_base_model(saved):
    model, path = saved("gpt2")
    base = model.transformer
    base.save_pretrained(path / "base")
    params, _ = from_hf(path / "base", task="causal-lm")
    assert_same(params, model)


@pytest.mark.parametrize("keep", ["lm_head.weight", "model.embed_tokens.weight"])
def test_a_tied_weight_may_have_either_name(saved, keep):
    model, path = saved("llama")
    tensors = load_file(path / "model.safetensors")
    tensors[keep] = tensors.pop("model.embed_tokens.weight")
    save_file(tensors, path / "model.safetensors")
    assert_same(from_hf(path)[0], model)


def test_tied_weights_that_differ_are_refused(saved):
    _, path = saved("llama")
    tensors = load_file(path / "model.safetensors")
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"] + 1
    save_file(tensors, path / "model.safetensors")
    with pytest.raises(ModelError, match=r"are one parameter.*tie_word_embeddings"):
        from_hf(path)


def test_what_does_not_fit_is_one_error_with_all_names(saved):
    _, path = saved("llama")
    tensors = load_file(path / "model.safetensors")
    tensors["model.norm.weigth"] = tensors.pop("model.norm.weight")
    name = "model.layers.0.mlp.up_proj.weight"
    tensors[name] = tensors[name][:-1].contiguous()
    save_file(tensors, path / "model.safetensors")
    with pytest.raises(ModelError) as error:
        from_hf(path)
    text = str(error.value)
    assert "missing: model.norm.weight" in text
    assert "not of the model: model.norm.weigth" in text
    assert f"wrong shape: {name} is (23, 16) in the files and (24, 16)" in text


def test_what_older_versions_stored_is_not_missed(saved):
    model, path = saved("llama")
    tensors = load_file(path / "model.safetensors")
    tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(2)
    save_file(tensors, path / "model.safetensors")
    assert_same(from_hf(path)[0], model)


def test_pickles_are_refused(saved):
    _, path = saved("llama")
    (path / "model.safetensors").rename(path / "pytorch_model.bin")
    with pytest.raises(ModelError, match=r"pytorch_model.bin, a pickle.*can run code"):
        from_hf(path)


def test_files_that_are_missing_or_damaged(saved, tmp_path):
    _, path = saved("llama", max_shard_size="4KB")
    first = sorted(path.glob("model-*.safetensors"))[0]
    first.write_bytes(first.read_bytes()[:100])
    with pytest.raises(ModelError, match="cannot be read as safetensors"):
        from_hf(path)
    first.unlink()
    with pytest.raises(ModelError, match=r"are not in the directory"):
        from_hf(path)
    index = path / "model.safetensors.index.json"
    for name in ["../other/model.safetensors", str(first), 3]:
        index.write_text(json.dumps({"weight_map": {"model.norm.weight": name}}))
        with pytest.raises(ModelError, match=r"which is not a file beside it"):
            from_hf(path)
    index.write_text("[]")
    with pytest.raises(ModelError, match="is no index of safetensors files"):
        from_hf(path)
    index.unlink()
    with pytest.raises(ModelError, match=r"has no model.safetensors.*save_pretrained"):
        from_hf(path)
    with pytest.raises(ModelError, match=r"has no config.json.*Nothing is downloaded"):
        from_hf(tmp_path / "nowhere")
    with pytest.raises(ModelError, match=r"has no config.json"):
        from_hf("gpt2")


def test_quantized_weights_are_refused(saved):
    _, path = saved("llama")
    config = json.loads((path / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "fp8"}
    (path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ModelError, match="quantized"):
        from_hf(path)
    model = model_of("llama")
    model.config.quantization_config = {"quant_method": "bitsandbytes"}
    with pytest.raises(ModelError, match="the model's weights are quantized"):
        from_hf(model)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("{", "is not a valid JSON file"),
        ({"num_attention_heads": 3}, "not a multiple of the number of attention heads"),
        ({"model_type": "nothing"}, "does not recognize this architecture"),
        (
            {"model_type": "nothing", "auto_map": {"AutoConfig": "its_code.Config"}},
            "contains custom code",
        ),
    ],
)
def test_configurations_that_transformers_cannot_use(
    saved, change, message, monkeypatch
):
    monkeypatch.setattr("builtins.input", lambda *_: pytest.fail("asks on the console"))
    _, path = saved("llama")
    file = path / "config.json"
    config = json.loads(file.read_text())
    file.write_text(change if change == "{" else json.dumps({**config, **change}))
    with pytest.raises(ModelError, match=rf"cannot use .*config.json(.|\n)*{message}"):
        from_hf(path)


def test_what_was_read_does_not_change_with_the_file(saved):
    model, path = saved("llama")
    params, _ = from_hf(path)
    file, name = path / "model.safetensors", "model.norm.weight"
    whole = files.Stored(file, name, (16,)).read()
    file.write_bytes(b"\0" * file.stat().st_size)
    assert_same(params, model)
    assert torch.equal(whole, model.get_parameter(name))
