# SPDX-License-Identifier: Apache-2.0
"""Packing, LoRA, trained subsets, remat and modules that are not transformers'."""

import pytest
import torch
from torch.nn import functional as F
from torch.testing import assert_close

import zfunc as zf
from tests.distributed.hf_families import batch_of, config_of, model_of, task_of
from zfunc.models import ModelError, from_hf, from_module, lora, merge_lora, pack, split
from zfunc.models.hf.packing import PACKABLE
from zfunc.testing.memory import peak_live_bytes

DOCUMENTS = [[5, 6, 7, 8, 9], [10, 11], [12, 13, 14, 15, 16, 17], [18, 19, 20]]


def gradient(loss_fn, params, batch):
    return zf.value_and_grad(lambda p: loss_fn(p, batch).value())(params)


def assert_trees_close(a, b, **tolerance):
    assert a.keys() == b.keys()
    for name in a:
        assert_close(a[name], b[name], msg=name, **tolerance)


# --- packing ---------------------------------------------------------------------


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("family", sorted(PACKABLE))
def test_a_packed_batch_has_the_loss_of_its_documents(family, attention):
    config = config_of(family, attn_implementation=attention)
    options = {"task": "causal-lm", "key": 1}
    params, one_by_one = from_hf(config, **options)
    _, packed = from_hf(config, packed=True, **options)
    assert packed.config._attn_implementation == attention
    batch = pack(DOCUMENTS, 9)
    assert len(batch["input_ids"]) == 2  # several documents in a row, and padding

    def apart(p):
        ids = [torch.tensor([document]) for document in DOCUMENTS]
        means = [one_by_one(p, {"input_ids": x, "labels": x}) for x in ids]
        total = sum(mean.total for mean in means)
        return total / sum(mean.weight for mean in means)

    want, grads = zf.value_and_grad(apart)(params)
    got, packed_grads = gradient(packed, params, batch)
    assert_close(got, want, rtol=0, atol=1e-6)
    assert_trees_close(packed_grads, grads, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("family", ["llama", "qwen2"])
def test_a_packed_batch_jitted(family):
    params, loss_fn = from_hf(
        config_of(family), task="causal-lm", packed=True, remat=zf.remat
    )
    step = zf.train_step(
        loss_fn, zf.optim.sgd(0.1), zf.partition(zero=3), zf.accumulate(2)
    )
    mesh, batch = zf.make_mesh({"data": 1}), pack(DOCUMENTS, 9)
    eager, jitted = (s(zf.shard(params, mesh), batch) for s in (step, zf.jit(step)))
    assert torch.equal(eager.metrics.loss, jitted.metrics.loss)


@pytest.mark.parametrize("family", ["bloom", "bert", "t5"])
def test_families_that_cannot_keep_documents_apart_refuse_by_name(family):
    task, name = task_of(family), family.partition("-")[0]
    with pytest.raises(ModelError, match=rf"not supported for {name}: .*Pad instead"):
        from_hf(config_of(family), task=task, packed=True)
    with pytest.raises(ModelError, match="ALiBi"):
        from_hf(config_of("falcon", alibi=True), task="causal-lm", packed=True)


def test_packing_fills_the_first_row_with_room():
    batch = pack([[1] * 3, [2] * 4, [3]], 4, pad_id=9)
    assert batch["input_ids"].tolist() == [[1, 1, 1, 3], [2, 2, 2, 2]]
    assert pack([torch.tensor([4, 5])], 3, pad_id=9)["input_ids"].tolist() == [
        [4, 5, 9]
    ]
    batch = pack([[1, 2], [3]], 3, pad_id=9, rows=2)
    assert batch["input_ids"].tolist() == [[1, 2, 3], [9, 9, 9]]
    assert batch["labels"].tolist() == [[-100, 2, -100], [-100] * 3]
    assert batch["segment_ids"].tolist() == [[1, 1, 2], [0, 0, 0]]
    with pytest.raises(ModelError, match="take 2 rows of 2 tokens, and rows is 1"):
        pack([[1, 2], [3]], 2, rows=1)
    with pytest.raises(ModelError, match="rows is a number of rows >= 1, got 0"):
        pack([[1]], 2, rows=0)
    with pytest.raises(ModelError, match="sequence 1 has 5 tokens and a row 4"):
        pack([[1], [1] * 5], 4)
    with pytest.raises(ModelError, match="sequence 0 has 0 tokens"):
        pack([[]], 4)
    with pytest.raises(ModelError, match="no sequences"):
        pack([], 4)
    with pytest.raises(ModelError, match="length is a number of tokens"):
        pack([[1]], 0)


# --- LoRA ------------------------------------------------------------------------


def randomised(factors):
    generator = torch.Generator().manual_seed(0)
    return {
        name: x + 0.1 * torch.randn(x.shape, generator=generator)
        for name, x in factors.items()
    }


TARGETS = {
    "llama": ["*.q_proj.weight", "*.down_proj.weight"],
    "gpt2": ["*.c_attn.weight", "*.c_proj.weight"],  # Conv1D: [inputs, outputs]
    "t5": ["*.q.weight", "*.wo.weight"],
    "falcon": ["*.query_key_value.weight", "*.dense.weight"],
}


@pytest.mark.parametrize("remat", [None, zf.remat], ids=["plain", "remat"])
@pytest.mark.parametrize("family", TARGETS)
def test_the_gradient_of_the_factors_is_that_of_autograd(family, remat):
    params, loss_fn = from_hf(model := model_of(family), remat=remat)
    batch = batch_of(family, 0)
    factors, adapted = lora(
        params, loss_fn, rank=2, alpha=6, targets=TARGETS[family], key=1
    )
    assert torch.equal(adapted(factors, batch).total, loss_fn(params, batch).total)
    factors = randomised(factors)
    got, grads = gradient(adapted, factors, batch)

    leaves = {name: x.clone().requires_grad_() for name, x in factors.items()}
    weights = dict(model.named_parameters())
    for path in {name.rpartition(".")[0] for name in leaves}:
        delta = 3 * leaves[f"{path}.lora_B"] @ leaves[f"{path}.lora_A"]
        delta = delta.T if family == "gpt2" else delta
        weights[f"{path}.weight"] = weights[f"{path}.weight"] + delta
    want = torch.func.functional_call(model, weights, (), batch).loss
    want.backward()
    assert_close(got, want.detach())
    expected = {n: x.grad for n, x in leaves.items()}
    assert_trees_close(grads, expected, rtol=1e-4, atol=1e-6)
    merged = merge_lora(factors, adapted)
    assert merged.keys() == params.keys()
    assert_close(loss_fn(merged, batch).value(), want.detach())


def test_lora_trains_sharded_at_stage_3_as_it_does_alone():
    mesh, batch = zf.make_mesh({"data": 1}), batch_of("llama", 0)
    losses = []
    for placed in (False, True):
        given = mesh if placed else None
        params, loss_fn = from_hf(
            config_of("llama"), task="causal-lm", mesh=given, remat=zf.remat
        )
        factors, adapted = lora(params, loss_fn, rank=2, targets=TARGETS["llama"])
        if placed:
            with pytest.raises(zf.PlacementError, match="with_frozen"):
                adapted(zf.unshard(zf.shard(factors, mesh)).params, batch)
            # The factors are trained; what they add to is frozen.
            whole = zf.with_frozen(adapted, adapted.frozen)
        else:
            whole = adapted
        step = zf.train_step(whole, zf.optim.adamw(1e-2), zf.partition(zero=3))
        state, step = zf.shard(factors, mesh), zf.jit(step)
        for _ in range(3):
            state = step(state, batch)
        losses.append(state.metrics.loss)
        merged = merge_lora(
            state.params if placed else zf.unshard(state).params, adapted
        )
        if placed:
            merged = zf.unshard(zf.shard(merged, mesh)).params
        losses.append(loss_fn(merged, batch).value())
    assert_close(losses[0], losses[2])
    assert_close(losses[1], losses[3])
    assert losses[1] < losses[0]


def test_a_seed_means_the_same_factors_and_layers_have_their_own():
    params, loss_fn = from_hf(config_of("llama"), task="causal-lm")
    one, two, other = (
        lora(params, loss_fn, rank=2, targets=["*.q_proj.weight"], key=key)[0]
        for key in (0, 0, 1)
    )
    a, b = (n for n in one if n.endswith("lora_A"))
    assert a == "model.layers.0.self_attn.q_proj.lora_A"
    assert torch.equal(one[a], two[a])
    assert not torch.equal(one[a], other[a])
    assert not torch.equal(one[a], one[b])
    assert 0.1 < one[a].abs().max() <= 0.25  # 1 / sqrt(16)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"rank": 0}, r"rank is an int >= 1, got 0"),
        ({"rank": 2, "alpha": -1}, r"alpha is a number > 0 or None, got -1"),
        ({"rank": 2, "targets": ["*.qproj.*"]}, r"'\*.qproj.\*' matches none"),
        ({"rank": 2, "targets": lambda n: False}, r"targets chooses no parameter"),
        ({"rank": 2, "targets": ["*norm.weight"]}, r"is of a LlamaRMSNorm"),
        ({"rank": 2, "targets": ["*tokens.weight"]}, r"is shared with lm_head.weight"),
    ],
)
def test_what_lora_refuses(options, message):
    params, loss_fn = from_hf(config_of("llama"), task="causal-lm")
    with pytest.raises(ModelError, match=message):
        lora(params, loss_fn, **{"targets": ["*.q_proj.weight"], **options})
    with pytest.raises(ModelError, match="this loss has no factors"):
        merge_lora(params, loss_fn)


# --- trained subsets -------------------------------------------------------------


def test_split_and_with_frozen_train_what_was_chosen():
    mesh, batch = zf.make_mesh({"data": 1}), batch_of("gpt2", 0)
    options = {"task": "causal-lm", "mesh": mesh}
    params, loss_fn = from_hf(config_of("gpt2"), **options)
    trained, frozen = split(params, ["*.bias"])
    again, subset = from_hf(config_of("gpt2"), **options, trainable=["*.bias"])
    assert again.keys() == trained.keys()
    assert subset.frozen.keys() == frozen.keys()
    states = []
    for parts, loss in ((trained, loss_fn), (again, subset)):
        step = zf.train_step(
            zf.with_frozen(loss, frozen), zf.optim.sgd(0.1), zf.partition(zero=3)
        )
        states.append(zf.jit(step)(zf.shard(parts, mesh), batch))
    a, b = (zf.unshard(state).params for state in states)
    assert all(torch.equal(a[name], b[name]) for name in a)
    with pytest.raises(zf.PlacementError, match=r"zf.with_frozen\(loss_fn, loss_fn"):
        subset(a, batch)
    with pytest.raises(zf.PlacementError, match=r"computed by a step"):
        loss_fn(params, batch)


def test_what_split_refuses():
    with pytest.raises(TypeError, match="a dict of parameters by name, got a list"):
        split([1], ["*"])
    with pytest.raises(ModelError, match=r"trainable: 'b\*' matches none"):
        split({"a": 1}, ["b*"])
    with pytest.raises(ModelError, match="would be nothing to train"):
        split({"a": 1}, lambda name: False)
    with pytest.raises(TypeError, match="list of patterns"):
        split({"a": 1}, "a")


# --- remat -----------------------------------------------------------------------


def test_remat_keeps_the_inputs_of_layers_and_not_what_is_inside():
    peaks = []
    for remat in (None, zf.remat):
        config = config_of("llama", num_hidden_layers=8, intermediate_size=256)
        params, loss_fn = from_hf(config, task="causal-lm", remat=remat)
        batch = batch_of("llama", 0, rows=8, length=24)
        _, peak = peak_live_bytes(gradient, loss_fn, params, batch)
        peaks.append(peak)
    assert peaks[1] < 0.6 * peaks[0]


def test_every_layer_is_a_block():
    calls = []

    def remat(block):
        def counted(*args):
            calls.append(block.__name__)
            return block(*args)

        return counted

    params, loss_fn = from_hf(config_of("t5"), task="seq2seq-lm", remat=remat)
    loss_fn(params, batch_of("t5", 0))
    assert calls == ["T5Block"] * 4


# --- any module ------------------------------------------------------------------


class Net(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.up = torch.nn.Linear(4, 6)
        self.down = torch.nn.Linear(6, 6, bias=False)
        self.again = self.down  # used twice: one leaf
        self.register_buffer("shift", torch.full((6,), 0.5))

    def forward(self, x):
        return self.again(self.down(torch.tanh(self.up(x)))) + self.shift


def squares(call, batch):
    errors = (call(batch["x"]) - batch["y"]).square()
    return zf.Mean(errors.sum(), errors.numel())


def test_any_module_trains_as_it_does_alone():
    torch.manual_seed(0)
    net, batch = Net(), {"x": torch.randn(8, 4), "y": torch.randn(8, 6)}
    params, loss_fn = from_module(net, squares)
    assert list(params) == ["up.weight", "up.bias", "down.weight"]
    mesh = zf.make_mesh({"data": 1})
    step = zf.train_step(
        loss_fn, zf.optim.sgd(0.1), zf.partition(zero=3), zf.accumulate(2)
    )
    state, step = zf.shard(params, mesh), zf.jit(step)
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    for _ in range(3):
        loss = F.mse_loss(net(batch["x"]), batch["y"])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        state = step(state, batch)
        assert_close(state.metrics.loss, loss.detach())
    for name, value in zf.unshard(state).params.items():
        assert_close(value, net.get_parameter(name).detach())


def test_a_module_with_frozen_parts_and_pieces():
    net, mesh = Net(), zf.make_mesh({"data": 1})
    net.up.requires_grad_(False)
    params, loss_fn = from_module(net, squares, mesh=mesh, dtype=torch.bfloat16)
    assert set(params) == {"down.weight"}
    assert params["down.weight"].buffer.dtype == torch.bfloat16
    assert set(loss_fn.frozen) == {"up.weight", "up.bias"}
    only, _ = from_module(Net(), squares, trainable=["up.*"])
    assert set(only) == {"up.weight", "up.bias"}


class Counter(torch.nn.Linear):
    def __init__(self):
        super().__init__(4, 6)
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, x):
        self.calls.add_(1)
        return super().forward(x)


@pytest.mark.parametrize(
    ("module", "message"),
    [
        (lambda: torch.nn.BatchNorm1d(4), r"running_mean'.*module.eval\(\)"),
        (lambda: torch.nn.Dropout(0.1), r"p=0.1.*dropout='off'"),
    ],
)
def test_modules_that_keep_state_are_refused(module, message):
    net = torch.nn.Sequential(torch.nn.Linear(4, 6), module())
    with pytest.raises(ModelError, match=message):
        from_module(net, squares)
    from_module(net.eval(), squares)


def test_dropout_is_left_out_when_asked_to():
    net = torch.nn.Sequential(torch.nn.Linear(4, 6), torch.nn.Dropout(0.9))
    params, loss_fn = from_module(net, squares, dropout="off")
    batch = {"x": torch.ones(2, 4), "y": torch.ones(2, 6)}
    want = F.mse_loss(net.eval()(batch["x"]), batch["y"])
    assert_close(loss_fn(params, batch).total / 12, want)
    with pytest.raises(ModelError, match="dropout is 'off' or None, got 'on'"):
        from_module(net, squares, dropout="on")


def test_a_module_that_writes_to_a_buffer_in_the_forward():
    params, loss_fn = from_module(Counter(), squares)
    batch = {"x": torch.ones(2, 4), "y": torch.ones(2, 6)}
    with pytest.raises(ModelError, match="writes to its buffer 'calls'"):
        loss_fn(params, batch)


def test_hooks_and_patched_forwards_are_refused():
    net = Net()
    handle = net.up.register_forward_hook(lambda module, args, out: out + 1)
    with pytest.raises(ModelError, match=r"up has the hook .*hook.remove\(\)"):
        from_module(net, squares)
    handle.remove()
    net.down.forward = lambda x: x
    with pytest.raises(ModelError, match="has a forward of its own"):
        from_module(net, squares)
    model = model_of("llama")
    model.model.norm.register_forward_pre_hook(lambda module, args: args)
    with pytest.raises(ModelError, match=r"model.norm has the hook"):
        from_hf(model)


def test_what_from_module_refuses():
    with pytest.raises(TypeError, match=r"takes a torch.nn.Module, got 3"):
        from_module(3, squares)
    with pytest.raises(TypeError, match=r"loss is a function of \(call, batch\)"):
        from_module(Net(), None)
    params, loss_fn = from_module(Net(), squares)
    del params["up.bias"]
    with pytest.raises(zf.StructureError, match=r"missing: up.bias"):
        loss_fn(params, {"x": torch.ones(2, 4), "y": torch.ones(2, 6)})
