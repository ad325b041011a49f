# SPDX-License-Identifier: Apache-2.0
"""Generation with the library's own GPT: caches, programs, keys, ends and errors."""

import functools
import types

import pytest
import torch

import zfunc as zf
from zfunc.inference.options import Request
from zfunc.inference.sampling import Sampling
from zfunc.inference.step import begun, chosen, decoded, read_prompt
from zfunc.models import GPTConfig, gpt
from zfunc.models.decoding import uncached
from zfunc.program.pure import lowered, replayed

CONFIG = GPTConfig(
    vocab_size=61, d_model=32, n_layers=2, n_heads=4, n_kv_heads=2, d_ff=48
)
IDS = torch.randint(1, 61, (3, 7), generator=torch.Generator().manual_seed(3))
MASK = torch.tensor([[0] * 3 + [1] * 4, [1] * 7, [0] * 1 + [1] * 6])


@functools.cache
def params_of(dtype=torch.float32, config=CONFIG):
    params = gpt.init(config, seed=1, dtype=dtype)
    return zf.tree_map(lambda p: p * 5 if p.ndim > 1 else p, params)


@pytest.fixture
def decoder():
    return zf.models.decoder(CONFIG)


def text(decoder, ids=IDS, params=None, **options):
    options = {"max_new_tokens": 12, "jit": False, **options}
    return zf.generate(
        decoder, params_of() if params is None else params, ids, **options
    )


@pytest.mark.parametrize(
    "config",
    [
        CONFIG,
        GPTConfig(d_model=32, n_layers=2, d_ff=48, norm="layer", mlp="gelu"),
        GPTConfig(d_model=32, n_layers=1, n_kv_heads=1, tie_embeddings=False),
    ],
)
def test_cached_logits_are_those_of_the_whole_text(config):
    params, ids = params_of(torch.float64, config), IDS
    want = gpt.apply(params, ids, config)
    one = zf.models.decoder(config)
    for split in (1, 3, 6):
        cache = one.init_cache(3, 9, dtype=torch.float64)
        first, cache = one.apply(params, ids[:, :split], cache, all_logits=True)
        got = [first]
        for t in range(split, 7):
            logits, cache = one.apply(params, ids[:, t : t + 1], cache)
            got.append(logits)
        torch.testing.assert_close(torch.cat(got, 1), want, rtol=1e-9, atol=1e-9)
    single, _ = one.apply(params, ids, one.init_cache(3, 9, dtype=torch.float64))
    torch.testing.assert_close(single, want[:, -1:], rtol=1e-9, atol=1e-9)


def test_cached_logits_in_float32(decoder):
    params = params_of()
    cache = decoder.init_cache(3, 8)
    for t in range(7):
        logits, cache = decoder.apply(params, IDS[:, t : t + 1], cache)
    want = gpt.apply(params, IDS, CONFIG)[:, -1:]
    torch.testing.assert_close(logits, want, rtol=1e-5, atol=1e-5)


def test_donation_changes_no_bit_and_reuses_buffers(decoder):
    params = params_of()
    pure, used = decoder.init_cache(3, 9), decoder.init_cache(3, 9)
    for t, mask in ((slice(0, 6), MASK[:, :6]), (slice(6, 7), None)):
        before = zf.tree_map(torch.clone, pure)
        a, new = decoder.apply(params, IDS[:, t], pure, attention_mask=mask)
        b, kept = decoder.apply(
            params, IDS[:, t], used, attention_mask=mask, donate=True
        )
        assert torch.equal(a, b)
        pairs = zip(zf.tree_leaves(new), zf.tree_leaves(kept), strict=True)
        assert all(torch.equal(x, y) for x, y in pairs)
        pairs = zip(zf.tree_leaves(before), zf.tree_leaves(pure), strict=True)
        assert all(torch.equal(x, y) for x, y in pairs), "the old cache changed"
        buffers = zip(
            (*kept.keys, *kept.values), (*used.keys, *used.values), strict=True
        )
        assert all(x.data_ptr() == y.data_ptr() for x, y in buffers)
        pure, used = new, kept


@pytest.mark.parametrize("how", [{}, {"temperature": 1.3, "top_k": 20, "top_p": 0.9}])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_jit_is_eager_bitwise(decoder, how, dtype):
    request = Request(5, Sampling(**how), (4,), 4)
    params = params_of(dtype)

    def after(jit):
        cache = decoder.init_cache(3, 64, dtype=dtype)
        logits, cache = read_prompt(decoder, params, IDS, MASK, cache)
        state = chosen(begun(None, torch.arange(3), request), logits, cache, request)
        step = functools.partial(decoded, decoder, request, donate=True)
        if jit:
            pure = functools.partial(decoded, decoder, request, donate=False)
            step = replayed(pure, params, state)
        for _ in range(4):
            state = step(params, state)
        return zf.tree_leaves(state)

    for a, b in zip(after(True), after(False), strict=True):
        assert a.dtype == b.dtype
        assert torch.equal(a, b)


def test_the_program_writes_into_the_cache_and_repeats_no_heads(decoder):
    request = Request(5, Sampling(), (), 0)
    params, cache = params_of(), decoder.init_cache(3, 64)
    logits, cache = read_prompt(decoder, params, IDS, None, cache)
    state = chosen(begun(None, torch.arange(3), request), logits, cache, request)
    step = functools.partial(decoded, decoder, request, donate=False)
    calls = [str(n.target) for n in lowered(step, params, state).graph.nodes]
    # Keys and values of 2 layers, the mask and the tokens.
    assert calls.count("aten.index_copy_.default") == 6
    assert not {"aten.index_copy.default", "aten.clone.default"} & set(calls)
    run = replayed(step, params, state)
    kept = [x.data_ptr() for x in (*cache.keys, *cache.values)]
    state = run(params, state)
    assert [x.data_ptr() for x in (*state.cache.keys, *state.cache.values)] == kept


@pytest.mark.parametrize("early", [False, True])
def test_what_is_read_later_is_not_written_over(early):
    where = torch.tensor([1])

    def step(row, table):
        before = table.sum() if early else None
        new = table.index_copy(0, where, row)
        return new + (table.sum() if before is None else before)

    row, table = torch.ones(1, 3), torch.arange(6.0).reshape(2, 3)
    want = step(row, table)
    assert torch.equal(replayed(step, row, table.clone())(row, table), want)


def test_a_program_is_kept_for_the_next_call(decoder):
    text(decoder, jit=True)
    (program,) = decoder.programs.values()
    text(decoder, IDS[:, :5], jit=True)  # as many slots, rounded up
    assert list(decoder.programs.values()) == [program]
    for rows in (1, 2):
        text(decoder, IDS[:rows], jit=True)
    assert len(decoder.programs) == 3
    for wanted in range(2, 12):
        text(decoder, jit=True, max_new_tokens=wanted)
    assert len(decoder.programs) == 8


def test_autocast_has_programs_of_its_own(decoder):
    for dtype in (torch.bfloat16, torch.float16):
        with torch.autocast("cpu", dtype=dtype):
            text(decoder, jit=True)
    text(decoder, jit=True)
    assert len(decoder.programs) == 3


def test_one_token_needs_no_program(decoder):
    text(decoder, jit=True, max_new_tokens=1)
    assert not decoder.programs


def test_logits_of_padded_rows_are_those_of_the_prompts_alone(decoder):
    params, mask = params_of(), MASK
    cache = decoder.init_cache(3, 12)
    many, cache = decoder.apply(params, IDS, cache, attention_mask=mask)
    next_ids = torch.tensor([[4], [5], [6]])
    more, _ = decoder.apply(params, next_ids, cache)
    for row in range(3):
        ids = IDS[row, mask[row].bool()][None]
        one, cache = decoder.apply(params, ids, decoder.init_cache(1, 12))
        torch.testing.assert_close(many[row], one[0], rtol=1e-4, atol=1e-4)
        one, _ = decoder.apply(params, next_ids[row][None], cache)
        torch.testing.assert_close(more[row], one[0], rtol=1e-4, atol=1e-4)


def test_padded_rows_are_the_prompts_alone(decoder):
    got = text(decoder, attention_mask=MASK)
    for row in range(3):
        alone = text(decoder, IDS[row, MASK[row].bool()][None])
        assert torch.equal(got.ids[row, 7:], alone.ids[0, -12:])


def test_a_plain_function_generates_the_same(decoder):
    want = text(decoder)
    got = text(functools.partial(gpt.apply, config=CONFIG))
    assert torch.equal(got.ids, want.ids)
    step = functools.partial(gpt.apply, config=CONFIG)
    a, _ = uncached(step).apply(
        params_of(), IDS, uncached(step).init_cache(3, 9), all_logits=True
    )
    torch.testing.assert_close(a, gpt.apply(params_of(), IDS, CONFIG))


def test_samples_are_a_function_of_prompt_and_key(decoder):
    how = {"temperature": 1.0, "top_p": 0.95}
    keys = torch.tensor([5, 6, 7])
    want = text(decoder, key=keys, attention_mask=MASK, **how)
    again = text(decoder, key=keys, attention_mask=MASK, jit=True, **how)
    assert torch.equal(want.ids, again.ids)
    order = [2, 0]
    other = text(
        decoder, IDS[order], key=keys[order], attention_mask=MASK[order], **how
    )
    assert torch.equal(other.ids, want.ids[order])
    assert not torch.equal(text(decoder, key=1, **how).ids, text(decoder, **how).ids)
    same = text(decoder, IDS[:1].repeat(2, 1), **how)
    assert not torch.equal(same.ids[0], same.ids[1])
    folded = zf.random.fold_in(torch.tensor(9), torch.arange(3))
    assert torch.equal(
        text(decoder, key=9, **how).ids, text(decoder, key=folded, **how).ids
    )


def test_rows_end_and_are_padded(decoder):
    whole = text(decoder, max_new_tokens=40).ids[:, 7:]
    end = int(whole[1, 4])
    ended = [(row == end).nonzero() for row in whole]
    assert {len(e) > 0 for e in ended} == {True, False}, "rows that end, and do not"
    got = text(decoder, max_new_tokens=40, eos=end, pad=0, jit=True)
    for row, where in enumerate(ended):
        length = int(where[0]) + 1 if len(where) else 40
        assert got.lengths[row] == length
        assert got.finished[row] == (len(where) > 0)
        assert torch.equal(got.ids[row, 7 : 7 + length], whole[row, :length])
        assert (got.ids[row, 7 + length :] == 0).all()
    row = next(i for i, where in enumerate(ended) if len(where))
    alone = text(decoder, IDS[row][None], max_new_tokens=40, eos=end)
    assert alone.ids.shape[1] == 7 + int(got.lengths[row])
    assert torch.equal(alone.ids[0], got.ids[row, : alone.ids.shape[1]])


def test_it_stops_soon_after_the_last_end(decoder):
    calls = []

    def counted(*args, **kwargs):
        calls.append(1)
        return decoder.apply(*args, **kwargs)

    whole = text(decoder, IDS[:1]).ids[0, 7:]
    watched = zf.models.Decoder(decoder.init_cache, counted)
    text(watched, IDS[:1], max_new_tokens=60, eos=int(whole[0]))
    assert len(calls) == 1
    calls.clear()
    text(watched, IDS[:1], max_new_tokens=60, eos=int(whole[1]))
    assert len(calls) <= 9


def test_no_argument_is_changed(decoder):
    ids, mask, key = IDS.clone(), MASK.clone(), torch.arange(3)
    params = params_of()
    before = zf.tree_map(torch.clone, params)
    text(decoder, ids, attention_mask=mask, key=key, temperature=1.0, jit=True)
    assert torch.equal(ids, IDS)
    assert torch.equal(mask, MASK)
    assert torch.equal(key, torch.arange(3))
    pairs = zip(zf.tree_leaves(params), zf.tree_leaves(before), strict=True)
    assert all(torch.equal(a, b) for a, b in pairs)


def test_parameters_of_one_rank_may_be_placed(decoder):
    state = zf.shard(params_of(), zf.make_mesh({"data": 1}))
    for jit in (False, True):
        got = text(decoder, params=state.params, jit=jit)
        assert torch.equal(got.ids, text(decoder).ids)


def test_a_leaf_over_two_axes_is_refused(decoder):
    mesh = zf.make_mesh({"data": 1, "tensor": 1})
    placed = zf.NamedSharding(mesh, zf.P("data", "tensor"))
    params = {**params_of()}
    whole = zf.shard(params["embedding"], mesh, spec=zf.P()).params
    params["embedding"] = zf.reshard(whole, placed)
    with pytest.raises(zf.PlacementError, match="axes data, tensor"):
        text(decoder, params=params)


RIGHT = MASK.flip(1)
BAD = [
    ({"max_new_tokens": 0}, "max_new_tokens=0, expected a positive"),
    ({"max_new_tokens": 2.0}, "max_new_tokens=2.0"),
    ({"max_new_tokens": 600}, "type max_new_tokens=505"),
    ({"temperature": -1.0}, "temperature=-1.0, expected a number from 0"),
    ({"temperature": float("nan")}, "temperature=nan"),
    ({"temperature": True}, "temperature=True"),
    ({"temperature": 1e-40}, "temperature=1e-40, by which logits"),
    ({"key": 2**64}, "expected one of 64 bits"),
    ({"top_k": 0, "temperature": 1.0}, "top_k=0, expected a positive"),
    ({"top_k": 5}, "top_k=5 with temperature=0"),
    ({"top_p": 0.0, "temperature": 1.0}, r"top_p=0.0, expected a probability in \(0"),
    ({"top_p": 0.5}, "top_p=0.5 with temperature=0"),
    ({"eos": 61}, "eos=61, expected ids from 0 to 60"),
    ({"eos": []}, r"eos=\[\], expected an id"),
    ({"eos": "</s>"}, "eos='</s>'"),
    ({"pad": 0}, "pad=0 without eos"),
    ({"pad": 99, "eos": 1}, "pad=99, expected ids"),
    ({"pad": [1, 2], "eos": 1}, "expected one id"),
    ({"key": torch.arange(2)}, "expected one key per row"),
    ({"attention_mask": MASK[:, :3]}, "expected that of ids"),
    ({"attention_mask": RIGHT}, 'padding_side = "left"'),
    ({"attention_mask": MASK * 2}, "other than 0 and 1"),
    ({"attention_mask": MASK * 0}, "a row without a token"),
    ({"ids": IDS[0]}, "for a single prompt"),
    ({"ids": IDS.float()}, "use ids.long"),
    ({"ids": IDS[:, :0]}, "at least one token"),
    ({"ids": IDS + 30}, "tokenizer is of another model"),
]


@pytest.mark.parametrize(("options", "message"), BAD)
def test_options_that_cannot_be_used(decoder, options, message):
    with pytest.raises(ValueError, match=message):
        text(decoder, **options)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"ids": [[1, 2]]}, "expected a tensor"),
        ({"attention_mask": [[1]]}, "attention_mask is a list"),
        ({"key": 1.5}, "key is of float"),
        ({"key": torch.ones(3)}, "key is of torch.float32"),
    ],
)
def test_types_that_cannot_be_used(decoder, options, message):
    with pytest.raises(TypeError, match=message):
        text(decoder, **options)
    with pytest.raises(TypeError, match="expected a Decoder or a function"):
        text("gpt", max_new_tokens=3)
    with pytest.raises(TypeError, match=r"a TrainState: type state\.params"):
        text(decoder, params=zf.shard(params_of(), zf.make_mesh({})))
    loss_fn = types.SimpleNamespace(frozen={})  # as of zf.models.from_hf
    with pytest.raises(TypeError, match=r"zf\.models\.decoder\(loss_fn\)"):
        text(loss_fn, params=params_of(), max_new_tokens=3)


def test_padding_for_a_plain_function_is_refused():
    with pytest.raises(ValueError, match="rows of one length together"):
        text(functools.partial(gpt.apply, config=CONFIG), attention_mask=MASK)


@pytest.mark.parametrize("cut", [lambda x: (x, 1), lambda x: x[:, -1], lambda x: x[:1]])
def test_a_plain_function_that_returns_no_logits(cut):
    with pytest.raises(ValueError, match=r"expected logits \[3, 64, V\]"):
        text(lambda params, ids: cut(gpt.apply(params, ids, CONFIG)))


def test_logits_that_are_not_numbers(decoder):
    params = {**params_of(), "final_norm": torch.full((32,), float("nan"))}
    for how in ({}, {"temperature": 1.0}):
        with pytest.raises(ValueError, match=r"rows \[0, 1, 2\] are not numbers"):
            text(decoder, params=params, **how)


def test_a_cache_that_does_not_fit(decoder):
    cache = decoder.init_cache(2, 4)
    with pytest.raises(ValueError, match=r"make one with init_cache\(3, 7\)"):
        decoder.apply(params_of(), IDS, cache)
    with pytest.raises(ValueError, match=r"ids\[None\]"):
        decoder.apply(params_of(), IDS[0], cache)
    with pytest.raises(ValueError, match="about the new tokens only"):
        decoder.apply(params_of(), IDS[:2, :3], cache, attention_mask=MASK[:2])
    for rows, slots in ((0, 4), (2, True)):
        with pytest.raises(ValueError, match="expected a positive integer"):
            decoder.init_cache(rows, slots)
