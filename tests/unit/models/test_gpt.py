# SPDX-License-Identifier: Apache-2.0
"""The GPT against models nobody here wrote, and against its own laws."""

import dataclasses
import functools
import math

import optree
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils.flop_counter import FlopCounterMode

from zfunc.core.random import fold_in
from zfunc.models import GPTConfig, gpt
from zfunc.transforms.remat import remat

SMALL = GPTConfig(
    vocab_size=61,
    d_model=32,
    n_layers=2,
    n_heads=4,
    n_kv_heads=2,
    d_ff=48,
    tie_embeddings=False,
    max_seq_len=16,
)
GPT2 = dataclasses.replace(
    SMALL, norm="layer", mlp="gelu", n_kv_heads=4, tie_embeddings=True
)
DROPPING = dataclasses.replace(SMALL, dropout=0.25)


def tokens_of(config: GPTConfig, batch: int, length: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(config.vocab_size, (batch, length), generator=generator)


def scaled(params: gpt.Params, factor: float) -> gpt.Params:
    """Weights large enough that attention is not uniform."""
    return optree.tree_map(lambda x: factor * x if x.ndim == 2 else x + 0.1 * x, params)


def value_and_grads(loss, params):
    """The value, and the gradients as a list in the order of the leaves."""
    leaves, spec = optree.tree_flatten(params)

    def flat(*leaves):
        return loss(optree.tree_unflatten(spec, leaves))

    value, pull = torch.func.vjp(flat, *leaves)
    return value, pull(torch.ones_like(value), retain_graph=False, create_graph=False)


def mean_loss(params, tokens, config, **options):
    mean = gpt.loss(params, {"tokens": tokens}, config=config, **options)
    return mean.total / mean.weight


def keys_of(batch: int, seed: int = 0) -> Tensor:
    return fold_in(torch.tensor(seed), torch.arange(batch))


# --- against Hugging Face's Llama ----------------------------------------------------


class ExactRotary(nn.Module):
    """Llama's rotary tables in float64; theirs are float32 whatever the model is."""

    def __init__(self, theta: float, head_dim: int):
        super().__init__()
        self.theta, self.head_dim = theta, head_dim

    def forward(self, x, position_ids):
        powers = torch.arange(0, self.head_dim, 2, dtype=torch.float64) / self.head_dim
        angles = position_ids[..., None].double() / self.theta**powers
        angles = torch.cat([angles, angles], -1)
        return angles.cos(), angles.sin()


def llama(config: GPTConfig, params: gpt.Params, dtype: torch.dtype) -> nn.Module:
    """A LlamaForCausalLM that holds ``params``."""
    transformers = pytest.importorskip("transformers")
    model = transformers.LlamaForCausalLM(
        transformers.LlamaConfig(
            vocab_size=config.vocab_size,
            hidden_size=config.d_model,
            intermediate_size=config.d_ff,
            num_hidden_layers=config.n_layers,
            num_attention_heads=config.n_heads,
            num_key_value_heads=config.n_kv_heads,
            max_position_embeddings=config.max_seq_len,
            rms_norm_eps=config.norm_eps,
            rope_theta=config.rope_theta,
            tie_word_embeddings=config.tie_embeddings,
        )
    ).to(dtype)
    model.load_state_dict(llama_names(params), strict=True)
    return model


def llama_names(params: gpt.Params) -> dict[str, Tensor]:
    """Our parameters, or gradients, under Llama's names."""
    head = params.get("head", params["embedding"])
    named = {
        "model.embed_tokens.weight": params["embedding"],
        "model.norm.weight": params["final_norm"],
        "lm_head.weight": head,
    }
    for index, layer in enumerate(params["layers"]):
        prefix = f"model.layers.{index}"
        named[f"{prefix}.input_layernorm.weight"] = layer["attn_norm"]
        named[f"{prefix}.post_attention_layernorm.weight"] = layer["mlp_norm"]
        for name, weight in layer["attn"].items():
            named[f"{prefix}.self_attn.{name}_proj.weight"] = weight
        for name, weight in layer["mlp"].items():
            named[f"{prefix}.mlp.{name}_proj.weight"] = weight
    return named


LLAMAS = [
    dataclasses.replace(SMALL, n_kv_heads=n_kv_heads, tie_embeddings=tied)
    for n_kv_heads in (1, 2, 4)
    for tied in (False, True)
]


@pytest.mark.parametrize("config", LLAMAS)
def test_logits_are_those_of_llama(config: GPTConfig):
    params = scaled(gpt.init(config, seed=1), 5.0)
    tokens = tokens_of(config, 3, 16)
    with torch.no_grad():
        expected = llama(config, params, torch.float32)(tokens).logits
    logits = gpt.apply(params, tokens, config)
    assert expected.abs().max() > 1.0
    torch.testing.assert_close(logits, expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("config", LLAMAS)
def test_loss_and_gradients_are_those_of_llama_in_float64(config: GPTConfig):
    params = scaled(gpt.init(config, seed=1, dtype=torch.float64), 5.0)
    tokens = tokens_of(config, 3, 17)
    model = llama(config, params, torch.float64)
    # Theirs normalizes in float32 whatever the model is: torch's own norm instead.
    for module in list(model.modules()):
        for name, child in list(module.named_children()):
            if type(child).__name__ == "LlamaRMSNorm":
                norm = nn.RMSNorm(config.d_model, config.norm_eps, dtype=torch.float64)
                norm.weight = child.weight
                setattr(module, name, norm)
    model.model.rotary_emb = ExactRotary(config.rope_theta, config.head_dim)
    logits = model(tokens[:, :-1]).logits
    expected = nn.functional.cross_entropy(
        logits.flatten(0, 1), tokens[:, 1:].flatten()
    )
    expected.backward()

    ours = gpt.apply(params, tokens[:, :-1], config)
    torch.testing.assert_close(ours, logits.detach(), rtol=0, atol=1e-12)
    value, grads = value_and_grads(
        lambda params: mean_loss(params, tokens, config), params
    )
    torch.testing.assert_close(value, expected.detach(), rtol=0, atol=1e-13)
    named = llama_names(optree.tree_unflatten(optree.tree_structure(params), grads))
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(named[name], parameter.grad, rtol=0, atol=1e-12)


# --- against a composition of torch.nn modules ---------------------------------------


class NNBlock(nn.Module):
    """GPT-2's block from torch.nn modules, with rotations as complex products."""

    def __init__(self, config: GPTConfig):
        super().__init__()
        width, eps = config.d_model, config.norm_eps
        self.heads = config.n_heads
        self.ln_1 = nn.LayerNorm(width, eps, bias=False)
        self.ln_2 = nn.LayerNorm(width, eps, bias=False)
        self.q, self.k, self.v, self.o = (
            nn.Linear(width, width, bias=False) for _ in range(4)
        )
        self.mlp = nn.Sequential(
            nn.Linear(width, config.d_ff, bias=False),
            nn.GELU(),
            nn.Linear(config.d_ff, width, bias=False),
        )

    def forward(self, x: Tensor, turn: Tensor) -> Tensor:
        h = self.ln_1(x)
        q, k, v = (
            f(h).unflatten(-1, (self.heads, -1)).transpose(1, 2)
            for f in (self.q, self.k, self.v)
        )
        q, k = (
            torch.complex(*a.chunk(2, -1)).mul(turn) for a in (q, k)
        )  # [B, H, T, K / 2]
        scores = (q @ k.mH).real / math.sqrt(v.shape[-1])
        length = x.shape[1]
        past = torch.ones(length, length).tril().bool()
        weights = scores.masked_fill(~past, -math.inf).softmax(-1)
        x = x + self.o((weights @ v).transpose(1, 2).flatten(2))
        return x + self.mlp(self.ln_2(x))


def nn_logits(params: gpt.Params, tokens: Tensor, config: GPTConfig) -> Tensor:
    x = nn.functional.embedding(tokens, params["embedding"])
    half = config.head_dim // 2
    angles = torch.arange(tokens.shape[1]).double()[:, None] * config.rope_theta ** -(
        torch.arange(half).double() / half
    )
    turn = torch.polar(torch.ones_like(angles), angles)
    with torch.device("meta"):
        block = NNBlock(config)
    for layer in params["layers"]:
        attn, mlp = layer["attn"], layer["mlp"]
        weights = {
            "ln_1.weight": layer["attn_norm"],
            "ln_2.weight": layer["mlp_norm"],
            "mlp.0.weight": mlp["up"],
            "mlp.2.weight": mlp["down"],
        } | {f"{name}.weight": attn[name] for name in "qkvo"}
        x = torch.func.functional_call(block, weights, (x, turn))
    x = nn.functional.layer_norm(
        x, x.shape[-1:], params["final_norm"], None, config.norm_eps
    )
    return x @ params["embedding"].T


def test_layer_norm_gelu_variant_is_a_composition_of_nn_modules():
    params = scaled(gpt.init(GPT2, seed=2, dtype=torch.float64), 5.0)
    tokens = tokens_of(GPT2, 2, 17)

    def expected_loss(params):
        logits = nn_logits(params, tokens[:, :-1], GPT2)
        return nn.functional.cross_entropy(
            logits.flatten(0, 1), tokens[:, 1:].flatten()
        )

    logits = gpt.apply(params, tokens[:, :-1], GPT2)
    expected = nn_logits(params, tokens[:, :-1], GPT2)
    torch.testing.assert_close(logits, expected, rtol=0, atol=1e-12)
    value, grads = value_and_grads(lambda p: mean_loss(p, tokens, GPT2), params)
    expected, expected_grads = value_and_grads(expected_loss, params)
    torch.testing.assert_close(value, expected, rtol=0, atol=1e-13)
    for grad, want in zip(grads, expected_grads, strict=True):
        torch.testing.assert_close(grad, want, rtol=0, atol=1e-12)


# --- derivatives and transformations -------------------------------------------------


@pytest.mark.parametrize("config", [SMALL, GPT2, DROPPING])
def test_vjp_is_bitwise_autograd(config: GPTConfig):
    params, tokens = gpt.init(config, dtype=torch.float64), tokens_of(config, 2, 9)
    loss = functools.partial(mean_loss, tokens=tokens, config=config, keys=keys_of(2))
    value, grads = value_and_grads(loss, params)
    leaves, spec = optree.tree_flatten(params)
    leaves = [leaf.requires_grad_() for leaf in leaves]
    expected = loss(optree.tree_unflatten(spec, leaves))
    assert torch.equal(value, expected)
    assert all(map(torch.equal, grads, torch.autograd.grad(expected, leaves)))


@pytest.mark.parametrize("config", [SMALL, GPT2, DROPPING])
def test_gradient_is_that_of_finite_differences(config: GPTConfig):
    config = dataclasses.replace(config, d_model=8, d_ff=6, vocab_size=5)
    params = scaled(gpt.init(config, dtype=torch.float64), 10.0)
    leaves, spec = optree.tree_flatten(params)
    tokens = tokens_of(config, 2, 5)

    def loss(*leaves):
        params = optree.tree_unflatten(spec, leaves)
        return mean_loss(params, tokens, config, keys=keys_of(2))

    leaves = tuple(leaf.requires_grad_() for leaf in leaves)
    assert torch.autograd.gradcheck(loss, leaves, fast_mode=True)


@pytest.mark.parametrize("config", [SMALL, GPT2, DROPPING])
def test_vmap_of_gradient_is_a_loop(config: GPTConfig):
    # Each row is a model of its own with data of its own: a simulated rank.
    rows = [gpt.init(config, seed, torch.float64) for seed in range(3)]
    leaves = [
        torch.stack(column)
        for column in zip(*map(optree.tree_leaves, rows), strict=True)
    ]
    spec = optree.tree_structure(rows[0])
    tokens = tokens_of(config, 6, 9).unflatten(0, (3, 2))
    keys = keys_of(6).unflatten(0, (3, 2))

    def one(tokens, keys, *leaves):
        params = optree.tree_unflatten(spec, leaves)
        return value_and_grads(
            lambda p: mean_loss(p, tokens, config, keys=keys), params
        )

    values, grads = torch.vmap(one)(tokens, keys, *leaves)
    for row in range(3):
        value, expected = one(tokens[row], keys[row], *[leaf[row] for leaf in leaves])
        torch.testing.assert_close(values[row], value, rtol=0, atol=1e-14)
        for grad, want in zip(grads, expected, strict=True):
            torch.testing.assert_close(grad[row], want, rtol=0, atol=1e-14)


@pytest.mark.parametrize("config", [SMALL, DROPPING])
def test_remat_changes_no_bit(config: GPTConfig):
    params, tokens = gpt.init(config), tokens_of(config, 2, 9)
    plain, again = (
        value_and_grads(
            lambda p, r=r: mean_loss(p, tokens, config, keys=keys_of(2), remat=r),
            params,
        )
        for r in (None, remat)
    )
    assert torch.equal(plain[0], again[0])
    assert all(map(torch.equal, plain[1], again[1]))


def test_remat_is_given_a_closed_block_once():
    calls = []

    def spy(block):
        def wrapped(*args):
            calls.append(args)
            return block(*args)

        return wrapped

    params = gpt.init(SMALL)
    gpt.apply(params, tokens_of(SMALL, 2, 9), SMALL, remat=spy)
    assert [call[0] for call in calls] == params["layers"]
    for _, x, cos, sin, keys in calls:
        assert x.shape == (2, 9, 32)
        assert cos.shape == sin.shape == (9, 4)
        assert keys is None


def test_traces_to_one_graph_with_no_constant_from_the_data():
    params, tokens = gpt.init(SMALL), tokens_of(SMALL, 2, 9)
    leaves, spec = optree.tree_flatten(params)

    def step(tokens, *leaves):
        params = optree.tree_unflatten(spec, leaves)
        return value_and_grads(lambda p: mean_loss(p, tokens, SMALL), params)

    program = make_fx(step, tracing_mode="fake")(tokens, *leaves)
    other = tokens_of(SMALL, 2, 9, seed=1)
    value, grads = program(other, *leaves)
    expected, expected_grads = step(other, *leaves)
    assert torch.equal(value, expected)
    assert all(map(torch.equal, grads, expected_grads))


# --- the model's own laws ------------------------------------------------------------


@given(position=st.integers(0, 8), seed=st.integers(0, 5))
@settings(max_examples=20)
def test_no_token_sees_the_future(position: int, seed: int):
    params = scaled(gpt.init(SMALL, dtype=torch.float64), 5.0)
    tokens = tokens_of(SMALL, 2, 9, seed)
    changed = tokens.clone()
    changed[:, position] = (changed[:, position] + 1) % SMALL.vocab_size
    before, after = (gpt.apply(params, t, SMALL) for t in (tokens, changed))
    assert torch.equal(before[:, :position], after[:, :position])
    moved = (before[:, position:] - after[:, position:]).abs().amax((0, 2))
    assert (moved > 1e-9).all()


def test_bf16_is_close_to_fp32_and_its_loss_is_fp32():
    params, tokens = scaled(gpt.init(SMALL), 5.0), tokens_of(SMALL, 4, 17)
    low = optree.tree_map(lambda x: x.bfloat16(), params)
    rounded = optree.tree_map(lambda x: x.float(), low)
    assert gpt.apply(low, tokens[:, :-1], SMALL).dtype == torch.bfloat16
    mean = gpt.loss(low, {"tokens": tokens}, config=SMALL)
    exact = gpt.loss(rounded, {"tokens": tokens}, config=SMALL)
    assert mean.total.dtype == mean.weight.dtype == torch.float32
    # A few roundings of 2^-9 per layer, on logits of a few units.
    torch.testing.assert_close(mean.total, exact.total, rtol=2.0**-7, atol=0)


def test_untrained_loss_is_log_vocab():
    mean = gpt.loss(gpt.init(SMALL), {"tokens": tokens_of(SMALL, 8, 17)}, config=SMALL)
    assert mean.total.ndim == mean.weight.ndim == 0
    assert mean.weight == 8 * 16
    assert abs(mean.total / mean.weight - math.log(61)) < 0.05


def test_totals_and_weights_add_over_microbatches():
    params, tokens = gpt.init(SMALL, dtype=torch.float64), tokens_of(SMALL, 6, 9)
    mask = tokens_of(SMALL, 6, 9, seed=7) % 3 > 0
    whole = gpt.loss(params, {"tokens": tokens, "mask": mask}, config=SMALL)
    parts = [
        gpt.loss(params, {"tokens": tokens[rows], "mask": mask[rows]}, config=SMALL)
        for rows in (slice(0, 1), slice(1, 4), slice(4, 6))
    ]
    torch.testing.assert_close(whole.total, sum(part.total for part in parts))
    assert whole.weight == sum(part.weight for part in parts) == mask[:, 1:].sum()


def test_mask_selects_targets_and_never_its_first_column():
    params, tokens = gpt.init(SMALL, dtype=torch.float64), tokens_of(SMALL, 2, 9)
    full = gpt.loss(params, {"tokens": tokens}, config=SMALL)
    ones = torch.ones_like(tokens, dtype=torch.bool)
    ones[:, 0] = False
    masked = gpt.loss(params, {"tokens": tokens, "mask": ones}, config=SMALL)
    assert torch.equal(full.total, masked.total)
    assert torch.equal(full.weight, masked.weight)
    short = gpt.loss(params, {"tokens": tokens[:, :6]}, config=SMALL)
    ones[:, 6:] = False
    prefix = gpt.loss(params, {"tokens": tokens, "mask": ones}, config=SMALL)
    torch.testing.assert_close(prefix.total, short.total)
    assert prefix.weight == short.weight


def test_dropout_of_a_sample_does_not_depend_on_its_batch():
    params = gpt.init(DROPPING, dtype=torch.float64)
    tokens, keys = tokens_of(DROPPING, 5, 9), keys_of(5)
    whole = gpt.apply(params, tokens, DROPPING, keys=keys)
    for rows in (slice(0, 1), slice(2, 5)):
        part = gpt.apply(params, tokens[rows], DROPPING, keys=keys[rows])
        torch.testing.assert_close(part, whole[rows], rtol=0, atol=1e-14)
    other = gpt.apply(params, tokens, DROPPING, keys=keys_of(5, seed=1))
    assert not torch.equal(whole, other)


def test_dropout_has_a_key_of_its_own_at_every_site(monkeypatch):
    sites = []

    def spy(keys: Tensor, x: Tensor, rate: float) -> Tensor:
        sites.append((tuple(keys.tolist()), x.shape, rate))
        return x

    def fused(x, bias, residual, keys, rate, **options):
        return residual + spy(keys, x, rate)

    monkeypatch.setattr("zfunc.core.random.dropout", spy)
    monkeypatch.setattr("zfunc.models.gpt_block.bias_dropout_residual", fused)
    params, tokens = gpt.init(DROPPING), tokens_of(DROPPING, 2, 9)
    gpt.apply(params, tokens, DROPPING, keys=keys_of(2))
    # The embedding, and both residual branches of each layer.
    assert len(sites) == 1 + 2 * DROPPING.n_layers
    assert len({key for keys, _, _ in sites for key in keys}) == 2 * len(sites)
    assert all(site[1:] == ((2, 9, 32), 0.25) for site in sites)


def test_dropout_is_off_without_keys_or_rate():
    params, tokens = gpt.init(SMALL), tokens_of(SMALL, 2, 9)
    expected = gpt.apply(params, tokens, SMALL)
    assert torch.equal(gpt.apply(params, tokens, DROPPING), expected)
    assert torch.equal(gpt.apply(params, tokens, SMALL, keys=keys_of(2)), expected)


def test_dropout_keeps_the_mean():
    params, tokens = gpt.init(DROPPING, dtype=torch.float64), tokens_of(DROPPING, 1, 4)
    config = dataclasses.replace(DROPPING, n_layers=1)
    params = params | {"layers": params["layers"][:1]}
    many = gpt.loss(
        params, {"tokens": tokens.expand(4000, 4)}, keys_of(4000), config=config
    )
    plain = gpt.loss(params, {"tokens": tokens}, config=config)
    # The loss is nearly linear at this scale; 4000 masks leave about 1e-3.
    assert abs(many.total / many.weight - plain.total / plain.weight) < 0.01


def test_learns_a_sequence():
    tokens = torch.arange(34).remainder(7)[None].unfold(1, 17, 1)[0]
    params = gpt.init(SMALL)
    for _ in range(60):
        _, grads = value_and_grads(lambda p: mean_loss(p, tokens, SMALL), params)
        leaves, spec = optree.tree_flatten(params)
        signs = [p - 3e-3 * g.sign() for p, g in zip(leaves, grads, strict=True)]
        params = optree.tree_unflatten(spec, signs)
    assert mean_loss(params, tokens, SMALL) < 0.1
    prompt = torch.tensor([[0, 1, 2, 3]])
    continued = gpt.sample(params, prompt, SMALL, num_tokens=30, temperature=0.0)
    assert continued[0].tolist() == torch.arange(34).remainder(7).tolist()


# --- init, counts, sampling ----------------------------------------------------------

CONFIGS = st.builds(
    lambda heads, groups, half, **fields: GPTConfig(
        n_heads=heads * groups,
        n_kv_heads=groups,
        d_model=2 * half * heads * groups,
        **fields,
    ),
    heads=st.integers(1, 3),
    groups=st.integers(1, 3),
    half=st.integers(1, 3),
    vocab_size=st.integers(1, 9),
    n_layers=st.integers(1, 3),
    d_ff=st.integers(1, 9),
    norm=st.sampled_from(["rms", "layer"]),
    mlp=st.sampled_from(["swiglu", "gelu"]),
    tie_embeddings=st.booleans(),
    max_seq_len=st.integers(1, 9),
)


# torch's counter does not know the CPU kernel: two products over all T keys.
ATTENTION_FLOPS = {
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: (
        lambda q, *_, **__: 4 * math.prod(q) * q[2]
    )
}


@given(config=CONFIGS)
@settings(max_examples=50)
def test_counts_are_those_of_the_model(config: GPTConfig):
    params = gpt.init(config)
    assert gpt.num_params(config) == sum(x.numel() for x in optree.tree_leaves(params))
    tokens = torch.zeros(2, config.max_seq_len, dtype=torch.int64)
    counter = FlopCounterMode(display=False, custom_mapping=ATTENTION_FLOPS)
    with counter, torch.no_grad():
        logits = gpt.apply(params, tokens, config)
    assert logits.shape == (2, config.max_seq_len, config.vocab_size)
    assert gpt.flops_per_token(config) * tokens.numel() == 3 * counter.get_total_flops()


def test_init_is_a_pure_function_of_the_seed():
    before = torch.random.get_rng_state()
    first, again, other = (gpt.init(SMALL, seed=s) for s in (3, 3, 4))
    assert torch.equal(torch.random.get_rng_state(), before)
    assert optree.tree_all(optree.tree_map(torch.equal, first, again))
    assert not torch.equal(first["embedding"], other["embedding"])
    low = gpt.init(SMALL, seed=3, dtype=torch.bfloat16)
    rounded = optree.tree_map(lambda x: x.bfloat16(), first)
    assert optree.tree_all(optree.tree_map(torch.equal, low, rounded))


def test_init_scales():
    config = GPTConfig(d_model=256, n_layers=8, d_ff=512, n_kv_heads=2)
    params = gpt.init(config)
    layer = params["layers"][3]
    for weight in (params["embedding"], layer["attn"]["k"], layer["mlp"]["gate"]):
        assert weight.std().item() == pytest.approx(0.02, rel=0.03)
        assert abs(weight.mean().item()) < 5e-4
    for weight in (layer["attn"]["o"], layer["mlp"]["down"]):
        assert weight.std().item() == pytest.approx(0.02 / 4, rel=0.03)
    for scale in (layer["attn_norm"], layer["mlp_norm"], params["final_norm"]):
        assert (scale == 1).all()


def test_init_without_memory():
    with FakeTensorMode():
        fake = gpt.init(SMALL, dtype=torch.bfloat16)
    with torch.device("meta"):
        meta = gpt.init(SMALL, dtype=torch.bfloat16)
    real = gpt.init(SMALL, dtype=torch.bfloat16)
    for tree in (fake, meta):
        same = optree.tree_map(
            lambda a, b: a.shape == b.shape and a.dtype == b.dtype, tree, real
        )
        assert optree.tree_all(same)


def test_sample_is_a_pure_function_of_the_seed():
    params, prompt = scaled(gpt.init(SMALL), 5.0), tokens_of(SMALL, 2, 3)
    draw = functools.partial(gpt.sample, params, prompt, SMALL, num_tokens=20)
    first, again, other = (draw(seed=s) for s in (0, 0, 1))
    assert first.shape == (2, 23)
    assert first.dtype == torch.int64
    assert torch.equal(first[:, :3], prompt)
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    assert torch.equal(draw(num_tokens=0), prompt)


def test_sample_follows_the_probabilities():
    params = scaled(gpt.init(SMALL), 5.0)
    prompt = tokens_of(SMALL, 1, 3)
    drawn = gpt.sample(params, prompt.expand(20_000, 3), SMALL, 1, temperature=0.5)
    counts = torch.bincount(drawn[:, -1], minlength=61) / 20_000
    expected = torch.softmax(gpt.apply(params, prompt, SMALL)[0, -1] / 0.5, -1)
    assert (counts - expected).abs().max() < 0.015
    greedy = gpt.sample(params, prompt, SMALL, 1, temperature=0.0)
    assert greedy[0, -1] == expected.argmax()


# --- errors --------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"n_layers": 0}, "n_layers=0, expected a positive number"),
        ({"norm_eps": -1.0}, "norm_eps=-1.0, expected a positive number"),
        (
            {"d_model": 30, "n_heads": 4},
            "d_model=30 is not a multiple of n_heads=4; type d_model=32",
        ),
        (
            {"d_model": 20, "n_heads": 4},
            "head dim d_model/n_heads=5 is odd, .* type d_model=24",
        ),
        ({"n_kv_heads": 3}, "n_heads=4 is not a multiple of n_kv_heads=3; type"),
        ({"norm": "batch"}, r"norm='batch', expected one of \('rms', 'layer'\)"),
        ({"mlp": "relu"}, r"mlp='relu', expected one of \('swiglu', 'gelu'\)"),
        ({"dropout": 1.0}, r"dropout=1.0, expected a rate in \[0, 1\); type"),
    ],
)
def test_config_errors(fields: dict, message: str):
    with pytest.raises(ValueError, match="GPTConfig: " + message):
        GPTConfig(**fields)


@pytest.mark.parametrize(
    ("tokens", "message"),
    [
        (torch.zeros(3), r"tokens are torch.float32 \(3,\), expected int64 \[B, T\]"),
        (torch.zeros(1, 0).long(), "got 0 tokens per sequence, expected 1 to"),
        (torch.zeros(1, 17).long(), r"got 17 tokens .* crop with tokens\[:, -16:\]"),
    ],
)
def test_token_errors(tokens: Tensor, message: str):
    with pytest.raises(ValueError, match="gpt.apply: " + message):
        gpt.apply(gpt.init(SMALL), tokens, SMALL)


def test_argument_errors():
    params, tokens = gpt.init(SMALL), tokens_of(SMALL, 2, 5)
    with pytest.raises(ValueError, match="params have 2 layers, expected n_layers=3"):
        gpt.apply(params, tokens, dataclasses.replace(SMALL, n_layers=3))
    with pytest.raises(ValueError, match=r"keys have shape \(3,\), expected .* \[2\]"):
        gpt.apply(params, tokens, SMALL, keys=keys_of(3))
    batch = {"tokens": tokens, "mask": torch.ones(2, 4)}
    with pytest.raises(ValueError, match=r"mask.* shape \(2, 4\), .* \(2, 5\)"):
        gpt.loss(params, batch, config=SMALL)
    with pytest.raises(ValueError, match=r"temperature=-1\.0, expected 0"):
        gpt.sample(params, tokens, SMALL, 1, temperature=-1.0)
