# SPDX-License-Identifier: Apache-2.0
"""At stage 3 a parameter behaves as the tensor it stands for, however it is used.

Each use is a loss; the gradient must be the one of a rank that has all the parameters.
"""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.func import functional_call, grad, jvp, vjp, vmap
from torch.nn.utils import parametrizations

import zfunc as zf
from tests.unit.core.common import (
    F64,
    assert_same_gradient,
    example_batch,
    example_params,
    on_mesh,
    one_rank,
    randn,
    reference,
    traffic,
)
from zfunc.core.errors import PlacementError
from zfunc.transforms.gathered import GatherOnUse

RANKS = [1, 2]


def affine(p, b):
    return b["x"] @ p["w"] + p["b"]


def no_grad_first(p, b):
    with torch.no_grad():
        norm = p["w"].norm()
    return affine(p, b) / norm


def no_grad_later(p, b):
    y = affine(p, b)
    with torch.no_grad():
        norm = p["w"].norm()
    return y / norm


def no_grad_between(p, b):
    y = b["x"] @ p["w"]
    with torch.no_grad():
        shift = p["b"].mean() + p["w"].mean()
    return y + p["b"] * shift


def written_copy(p, b):
    w = p["w"].clone()
    w.mul_(2.0)
    w[0] = 1.0
    return b["x"] @ w + p["b"]


def written_result(p, b):
    w = p["w"] * 1
    w += 1
    w[0] += p["b"]
    return b["x"] @ w


def unpacked(p, b):
    first, *rest = p["w"]
    return affine(p, b) + first * sum(rest)


def per_sample(p, x):
    return torch.tanh(x @ p["w"] + p["b"]).square().sum()


# What the loss makes of parameters and batch: [samples, 4], compared with y.
USES = {
    "linear": affine,
    "matmul left": lambda p, b: (p["v"] @ p["w"]).sum(0) + affine(p, b),
    "row": lambda p, b: affine(p, b) + p["w"][0],
    "new axis": lambda p, b: affine(p, b) + p["w"][None].sum((0, 1)),
    "ellipsis": lambda p, b: affine(p, b) + p["w"][..., 1:].sum(),
    "mask": lambda p, b: affine(p, b) + p["w"][torch.arange(5) > 2].sum(0),
    "list index": lambda p, b: affine(p, b) + p["w"][[0, 2], :].sum(0),
    "tensor index": lambda p, b: p["v"][b["index"]] @ p["w"],
    "T": lambda p, b: (p["w"].T @ b["x"].T).T + p["b"],
    "mT": lambda p, b: (p["w"].mT @ b["x"].mT).mT + p["b"],
    "stack": lambda p, b: affine(p, b) + torch.stack([p["w"], p["w"]]).sum((0, 1)),
    "cat": lambda p, b: affine(p, b) + torch.cat((p["w"], p["v"].T[:, :4])).sum(0),
    "iterate": lambda p, b: affine(p, b) + sum(i * r for i, r in enumerate(p["w"])),
    "unpack": unpacked,
    "len": lambda p, b: affine(p, b) / len(p["w"]),
    "sizes": lambda p, b: affine(p, b) / p["w"].numel() / p["w"].shape[1],
    "einsum": lambda p, b: torch.einsum("bi,ij->bj", b["x"], p["w"]) + p["b"],
    "F.linear": lambda p, b: F.linear(b["x"], p["w"].T, p["b"]),
    "addmm": lambda p, b: torch.addmm(p["b"], b["x"], p["w"]),
    "embedding": lambda p, b: F.embedding(b["index"], p["v"]) @ p["w"] + p["b"],
    "layer_norm": lambda p, b: F.layer_norm(affine(p, b), (4,), p["b"], p["b"]),
    "where": lambda p, b: b["x"] @ torch.where(p["w"] > 0, p["w"], 0.1 * p["w"]),
    "clamp": lambda p, b: b["x"] @ p["w"].clamp(min=p["b"]),
    "reflected": lambda p, b: b["x"] @ (2.0 - (1.0 / (3.0 + p["w"] ** 2))),
    "comparison": lambda p, b: affine(p, b) * (p["w"] > 0).to(F64).mean(),
    "to device": lambda p, b: b["x"] @ p["w"].to("cpu") + p["b"],
    "to like": lambda p, b: b["x"] @ p["w"].to(b["x"]) + p["b"],
    "to itself": lambda p, b: b["x"] @ p["w"].to(F64) + p["b"].double(),
    "clone": lambda p, b: b["x"] @ p["w"].clone() + p["b"],
    "detach": lambda p, b: affine(p, b) / p["w"].detach().norm(),
    "data": lambda p, b: affine(p, b) * p["w"].data.mean(),
    "copy of the tree": lambda p, b: affine(dict(p), b),
    "zeros like": lambda p, b: affine(p, b) + torch.zeros_like(p["b"]),
    "new zeros": lambda p, b: affine(p, b) + p["w"].new_zeros(4),
    "split": lambda p, b: affine(p, b) + p["w"].split(2)[0].sum(0),
    "unbind": lambda p, b: affine(p, b) + p["w"].unbind(0)[2],
    "broadcast": lambda p, b: b["x"] @ torch.broadcast_tensors(p["b"], p["w"])[1],
    "gather": lambda p, b: affine(p, b) + p["w"].gather(0, torch.zeros(1, 4).long()),
    "cumsum": lambda p, b: b["x"] @ p["w"].cumsum(0).flip(0).roll(1, 1),
    "svd": lambda p, b: affine(p, b) + torch.linalg.svdvals(p["w"]),
    "attention": lambda p, b: b["x"] @ (p["w"] @ (p["w"].T @ p["w"]).softmax(-1)),
    "in place on a result": lambda p, b: (b["x"] @ p["w"]).add_(p["b"]).mul_(2.0),
    "in place on a copy": written_copy,
    "in place on a product": written_result,
    "no_grad first": no_grad_first,
    "no_grad later": no_grad_later,
    "no_grad between": no_grad_between,
    "unused": lambda p, b: b["x"] @ p["w"],
    "two leaves, one use": lambda p, b: (
        b["x"] @ torch.block_diag(p["w"], p["b"])[:5, :4]
    ),
    "vmap over samples": lambda p, b: vmap(lambda x: affine(p, {"x": x}))(b["x"]),
    "vmap with None": lambda p, b: vmap(torch.mv, (None, 0))(p["w"].T, b["x"]),
    "grad by x": lambda p, b: grad(lambda x: (x @ p["w"]).sin().sum())(b["x"]) @ p["w"],
    "jvp by x": lambda p, b: jvp(lambda x: (x @ p["w"]).sin(), (b["x"],), (b["x"],))[1],
    "jvp by w": lambda p, b: b["x"] @ jvp(torch.sin, (p["w"],), (p["w"] * 2,))[1],
    "hessian by x": lambda p, b: vmap(torch.func.hessian(lambda x: per_sample(p, x)))(
        b["x"]
    ).sum(1)[:, :4],
    "clone, then grad by w": lambda p, b: (
        b["x"] @ grad(lambda w: w.sin().sum())(p["w"].clone())
    ),
    "clone, then vmap over w": lambda p, b: (
        affine(p, b) + vmap(torch.sum)(p["w"].clone()).sum()
    ),
    "vjp by a function of w": lambda p, b: (
        b["x"] @ vjp(torch.sin, 1 * p["w"])[1](torch.ones(5, 4, dtype=F64))[0]
    ),
    "value_and_grad by w": lambda p, b: (
        b["x"] @ zf.value_and_grad(lambda w: w.sin().sum())(p["w"])[1]
    ),
    "value_and_grad by the tree": lambda p, b: (
        b["x"]
        @ zf.value_and_grad(lambda q: q["w"].sin().sum() * q["b"].sum())(p)[1]["w"]
    ),
}


def squared_error(output):
    def loss(params, batch):
        return (output(params, batch) - batch["y"]).square().mean()

    return loss


@pytest.mark.parametrize("ranks", RANKS)
@pytest.mark.parametrize("use", USES)
def test_every_use_has_the_gradient_of_the_whole_parameter(use, ranks):
    loss, params, batch = squared_error(USES[use]), example_params(), example_batch()
    got = on_mesh(loss, params, batch, zero=3, ranks=ranks)
    assert_same_gradient(got, reference(loss, params, batch))


@pytest.mark.parametrize("zero", [1, 3])
@pytest.mark.parametrize("use", ["no_grad first", "no_grad later", "jvp by w"])
def test_with_a_threshold_and_at_stage_1_too(use, zero):
    loss, params, batch = squared_error(USES[use]), example_params(), example_batch()
    threshold = 6 if zero == 3 else 0
    where = zf.partition(zero=zero, persistence_threshold=threshold)
    step = zf.train_step(loss, zf.optim.sgd(0.1), where)
    got = zf.unshard(step(zf.shard(params, one_rank()), batch))
    assert_same_gradient(got, reference(loss, params, batch))


# --- casts --------------------------------------------------------------------

CASTS = {
    "half and back": lambda w: w.half().double(),
    "bfloat16 and back": lambda w: w.bfloat16().to(F64),
    "type and back": lambda w: w.type(torch.float32).type(F64),
    "to and back": lambda w: w.to(torch.bfloat16).to(dtype=F64),
    "twice": lambda w: w.float().bfloat16().float().double(),
    "wider": lambda w: w.double(),
    "copied": lambda w: w.to(torch.bfloat16, copy=True).double(),
    "float8": lambda w: w.to(torch.float8_e4m3fn).double(),
}


@pytest.mark.parametrize("name", CASTS)
def test_a_cast_rounds_as_it_does_at_stage_1(name):
    def loss(p, b):
        return (b["x"] @ CASTS[name](p["w"]) + p["b"] - b["y"]).square().mean()

    def value(zero):
        return on_mesh(loss, example_params(), example_batch(), zero=zero).metrics.loss

    assert value(3) == value(1)
    plain = squared_error(affine)
    exact = reference(plain, example_params(), example_batch()).metrics.loss
    assert (value(3) == exact) == (name == "wider")


@pytest.mark.parametrize("name", CASTS)
def test_under_a_policy_a_cast_back_does_not_undo_the_policy(name):
    def loss(p, b):
        return (b["x"].double() @ CASTS[name](p["w"])).square().mean().float()

    def value(zero):
        state = on_mesh(
            loss, example_params(), example_batch(), zf.precision("bf16"), zero=zero
        )
        return state.metrics.loss

    assert value(3) == value(1)


# --- modules ------------------------------------------------------------------


class Tied(nn.Module):
    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(7, 6)
        self.head = nn.Linear(6, 7, bias=False)
        self.head.weight = self.embedding.weight
        self.register_buffer("scale", torch.tensor(2.0))

    def forward(self, index):
        return self.head(self.embedding(index)) * self.scale


class Standardized(nn.Module):
    """Divides by a norm that is not differentiated, as many normalizations do."""

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(6, 6)

    def forward(self, x):
        with torch.no_grad():
            norm = self.linear.weight.norm()
        return F.linear(x, self.linear.weight / norm, self.linear.bias)


TIMES = randn(4, 5, 6)
INDICES = torch.arange(8).view(4, 2) % 7
MODULES = {
    "Linear, LayerNorm": lambda: nn.Sequential(nn.Linear(6, 6), nn.LayerNorm(6)),
    "RMSNorm, PReLU": lambda: nn.Sequential(nn.RMSNorm(6), nn.PReLU()),
    "GroupNorm": lambda: nn.GroupNorm(5, 5),
    "BatchNorm": lambda: nn.BatchNorm1d(5).eval(),
    "Conv1d": lambda: nn.Conv1d(5, 4, 3, padding=1),
    "ConvTranspose1d": lambda: nn.ConvTranspose1d(5, 4, 3),
    "Embedding": lambda: nn.Embedding(7, 6),
    "Embedding with padding": lambda: nn.Embedding(7, 6, padding_idx=0),
    "EmbeddingBag": lambda: nn.EmbeddingBag(7, 6, mode="sum"),
    "LSTM": lambda: nn.LSTM(6, 4, batch_first=True),
    "GRU": lambda: nn.GRU(6, 4, 2, batch_first=True, bidirectional=True),
    "RNN": lambda: nn.RNN(6, 4, batch_first=True),
    "Bilinear": lambda: nn.Bilinear(6, 6, 3),
    "MultiheadAttention": lambda: nn.MultiheadAttention(6, 2, batch_first=True),
    "attention, eval": lambda: nn.MultiheadAttention(6, 2, batch_first=True).eval(),
    "attention, kdim": lambda: nn.MultiheadAttention(
        6, 2, batch_first=True, kdim=6, vdim=3
    ),
    "encoder": lambda: nn.TransformerEncoderLayer(
        6, 2, 8, dropout=0.0, batch_first=True
    ),
    "weight_norm": lambda: parametrizations.weight_norm(nn.Linear(6, 6)),
    "spectral_norm": lambda: parametrizations.spectral_norm(nn.Linear(6, 6)).eval(),
    "tied": Tied,
    "standardized": Standardized,
}


def called(module, params, x):
    args = (x,)
    if isinstance(module, nn.MultiheadAttention):
        args = (x, x, x[..., : module.vdim])
    elif isinstance(module, nn.Bilinear):
        args = (x, x)
    out = functional_call(module, (params, dict(module.named_buffers())), args)
    return out[0] if isinstance(out, tuple) else out


@pytest.mark.filterwarnings("ignore:There is a performance drop")  # torch.vmap's
@pytest.mark.parametrize("ranks", RANKS)
@pytest.mark.parametrize("name", MODULES)
def test_modules(name, ranks):
    torch.manual_seed(0)
    module = MODULES[name]().to(F64).requires_grad_(False)
    batch = INDICES if "mbedding" in name or name == "tied" else TIMES

    def loss(params, x):
        return called(module, params, x).sin().square().mean()

    params = {k: p.detach() for k, p in module.named_parameters()}
    got = on_mesh(loss, params, batch, zero=3, ranks=ranks)
    assert_same_gradient(got, reference(loss, params, batch))


# --- what does not gather -----------------------------------------------------


def seen_by(look, zero=3, **options):
    """What ``look`` returns for the parameter w of a step, and the messages sent."""
    results = []

    def loss(params, batch):
        results.append(look(params["w"]))
        return params["b"].sum()

    def program(params):
        state = zf.shard(params, zf.AbstractMesh({"data": 2}))
        where = zf.partition(zero=zero, **options)
        zf.train_step(loss, zf.optim.sgd(0.1), where)(state, ())

    messages = traffic(program, example_params())
    gathers = [m for m in messages if m.name == "all_gather_into_tensor"]
    return results[0], len(gathers) - 1  # b is gathered


METADATA = {
    "shape": lambda w: tuple(w.shape),
    "size": lambda w: (w.size(0), tuple(w.size())),
    "dtype": lambda w: w.dtype,
    "device": lambda w: w.device.type,
    "dims": lambda w: (w.dim(), w.ndim, w.ndimension()),
    "numel": lambda w: (w.numel(), w.nelement(), torch.numel(w)),
    "len": len,
    "floating": lambda w: (w.is_floating_point(), torch.is_floating_point(w)),
    "complex": lambda w: w.is_complex(),
    "itemsize": lambda w: (w.itemsize, w.element_size()),
    "isinstance": lambda w: isinstance(w, torch.Tensor),
    "layout": lambda w: (w.layout, w.is_sparse, w.is_cuda, w.is_meta),
}


@pytest.mark.parametrize("name", METADATA)
def test_metadata_is_that_of_the_whole_and_gathers_nothing(name):
    look = METADATA[name]
    assert seen_by(look) == (look(example_params()["w"]), 0)


@pytest.mark.parametrize("look", [repr, str])
def test_printing_gathers_nothing(look):
    text, gathers = seen_by(look)
    assert "GatherOnUse((5, 4), torch.float64, P('data'))" in text
    assert gathers == 0


@pytest.mark.parametrize(
    ("look", "gathers"),
    [
        (lambda w: w.sum(), 1),
        (lambda w: (w.sum(), w.mean(), w[0], w @ w.T), 1),
        (lambda w: (w.bfloat16(), w.sum()), 1),
        (lambda w: vmap(lambda x: x @ w)(torch.ones(3, 5, dtype=F64)), 1),
    ],
)
def test_it_is_gathered_once(look, gathers):
    assert seen_by(look)[1] == gathers


def test_the_memory_is_let_go_with_the_loss():
    kept = []

    def loss(params, batch):
        kept.append(params["w"])
        return params["w"].sum()

    step = zf.train_step(loss, zf.optim.sgd(0.1), zf.partition(zero=3))
    step(zf.shard(example_params(), one_rank()), ())
    assert type(kept[0]) is GatherOnUse


# --- what is refused ----------------------------------------------------------

REFUSED = {
    "grad by w": lambda w: grad(lambda w: w.sin().sum())(w).sum(),
    "vjp by w": lambda w: vjp(torch.sin, w)[0].sum(),
    "jacrev by w": lambda w: torch.func.jacrev(torch.sin)(w).sum(),
    "vmap over w": lambda w: vmap(torch.sin)(w).sum(),
    "vmap that returns w": lambda w: vmap(lambda x: w)(torch.ones(2)).sum(),
}


@pytest.mark.parametrize("ranks", RANKS)
@pytest.mark.parametrize("name", REFUSED)
def test_as_an_operand_of_torch_func_it_is_right_or_refused(name, ranks):
    """Never a gradient of zero."""

    def loss(params, batch):
        return REFUSED[name](params["w"]) * batch["x"].sum(1).mean()

    params, batch = example_params(), example_batch()
    want = reference(loss, params, batch)
    try:
        got = on_mesh(loss, params, batch, zero=3, ranks=ranks)
    except PlacementError as error:
        assert "pass w.clone() instead of w" in str(error)  # noqa: PT017
        return
    assert_same_gradient(got, want)


@pytest.mark.parametrize("duplicate", [copy.copy, copy.deepcopy])
def test_python_copies_are_refused_as_torch_refuses_them(duplicate):
    def loss(params, batch):
        return duplicate(params["w"]).sum()

    for zero in (1, 3):
        with pytest.raises((RuntimeError, NotImplementedError)):
            on_mesh(loss, example_params(), example_batch(), zero=zero)
