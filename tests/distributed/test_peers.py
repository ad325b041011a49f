# SPDX-License-Identifier: Apache-2.0
"""Step by step against engines we did not write: FSDP2, DDP and transformers."""

import copy

import pytest
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.func import functional_call
from torch.nn.parallel import DistributedDataParallel

import zfunc as zf

pytestmark = pytest.mark.distributed
STEPS = 10


def llama():
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=32,
        intermediate_size=88,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=101,
        max_position_embeddings=64,
        use_cache=False,
    )
    return LlamaForCausalLM(config)


def llama_batch(step, rank):
    generator = torch.Generator().manual_seed(1000 * step + rank)
    return torch.randint(0, 101, (4, 17), generator=generator)


def llama_loss(model, ids):
    return model(input_ids=ids, labels=ids).loss


class Mlp(torch.nn.Module):
    """Uneven sizes, a norm, a tied weight and a scalar: what breaks layouts."""

    def __init__(self):
        super().__init__()
        self.first = torch.nn.Linear(7, 13)
        self.norm = torch.nn.LayerNorm(13)
        self.middle = torch.nn.Linear(13, 13, bias=False)
        self.last = torch.nn.Linear(13, 5)

    def forward(self, x):
        x = torch.tanh(self.norm(self.first(x)))
        return self.last(torch.tanh(self.middle(self.middle(x))))


def mlp():
    torch.manual_seed(0)
    return Mlp()


def mlp_batch(step, rank):
    generator = torch.Generator().manual_seed(1000 * step + rank)
    return torch.randn(6, 7, generator=generator)


def mlp_loss(model, x):
    return (model(x) ** 2).mean()


MODELS = {"llama": (llama, llama_batch, llama_loss), "mlp": (mlp, mlp_batch, mlp_loss)}


def peer_run(name, engine, steps=STEPS):
    """(loss, grad norm) of each step, mean over ranks, and the final parameters."""
    make, batch, loss_of = MODELS[name]
    model, world, rank = make(), dist.get_world_size(), dist.get_rank()
    if engine == "fsdp2":
        mesh = init_device_mesh("cpu", (world,))
        for child in model.children():
            fully_shard(child, mesh=mesh)
        fully_shard(model, mesh=mesh)
        wrapped = model
    else:
        wrapped = DistributedDataParallel(model)
    optimizer = torch.optim.AdamW(wrapped.parameters(), lr=1e-3, weight_decay=0.1)
    history = []
    for step in range(steps):
        loss = loss_of(wrapped, batch(step, rank))
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(wrapped.parameters(), 0.5)
        optimizer.step()
        optimizer.zero_grad()
        mean = loss.detach().clone()
        dist.all_reduce(mean)
        full = norm.full_tensor() if hasattr(norm, "full_tensor") else norm
        history.append((mean.item() / world, full.item()))
    params = {}
    for path, p in model.named_parameters():
        whole = p.full_tensor() if hasattr(p, "full_tensor") else p
        params[path] = whole.detach().clone()
    return history, params


def zfunc_run(name, zero, microbatches=1, steps=STEPS):
    """The same with the model unmodified, called through functional_call."""
    make, batch, _ = MODELS[name]
    model, rank = make(), dist.get_rank()
    params = {k: p.detach() for k, p in model.named_parameters()}
    mesh = zf.make_mesh({"data": dist.get_world_size()})

    def loss_fn(params, x):
        if name == "llama":
            args = {"input_ids": x, "labels": x}
            return functional_call(model, params, (), args).loss
        return (functional_call(model, params, (x,)) ** 2).mean()

    tx = zf.optim.chain(
        zf.optim.clip_by_global_norm(0.5), zf.optim.adamw(1e-3, weight_decay=0.1)
    )
    train_step = zf.train_step(
        loss_fn, tx, zf.partition(zero=zero), zf.accumulate(microbatches)
    )
    state = zf.shard(params, mesh, spec=zf.P() if zero == 0 else None)
    history = []
    for step in range(steps):
        state = train_step(state, batch(step, rank))
        metrics = state.metrics
        history.append((metrics.loss.item(), metrics.grad_norm.item()))
    return history, zf.unshard(state).params


@pytest.mark.parametrize("zero", [0, 1, 2, 3])
@pytest.mark.parametrize("engine", ["fsdp2", "ddp"])
@pytest.mark.parametrize(("name", "world"), [("llama", 2), ("mlp", 3)])
def test_losses_norms_and_parameters_equal_the_engines(
    ranks, name, world, engine, zero
):
    theirs, their_params = ranks(world).run(peer_run, name, engine)[0]
    ours, our_params = ranks(world).run(zfunc_run, name, zero)[0]
    for step, (a, b) in enumerate(zip(ours, theirs, strict=True)):
        assert a == pytest.approx(b, rel=1e-6, abs=1e-6), f"step {step}"
    assert ours[-1][0] < ours[0][0]
    for path, value in their_params.items():
        torch.testing.assert_close(our_params[path], value, rtol=1e-4, atol=2e-6)


def test_every_rank_reports_the_same_numbers(ranks):
    histories = ranks(2).run(zfunc_run, "llama", 3, 2, 3)
    assert histories[0][0] == histories[1][0]
    for path, value in histories[0][1].items():
        assert torch.equal(value, histories[1][1][path]), path


def test_microbatches_equal_one_batch(ranks):
    whole, _ = ranks(2).run(zfunc_run, "llama", 2, 1, 4)[0]
    parts, _ = ranks(2).run(zfunc_run, "llama", 2, 4, 4)[0]
    assert parts == [pytest.approx(row, rel=1e-5) for row in whole]


def test_the_peers_do_train(ranks):
    """The oracle itself: FSDP2 and DDP agree with one process on the whole batch."""
    history, _ = ranks(3).run(peer_run, "mlp", "ddp")[0]
    model = copy.deepcopy(mlp())
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=0.1)
    for step in range(STEPS):
        loss = mlp_loss(model, torch.cat([mlp_batch(step, r) for r in range(3)]))
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 0.5)
        optimizer.step()
        assert history[step][0] == pytest.approx(loss.item(), rel=1e-5)
