# SPDX-License-Identifier: Apache-2.0
"""Weights that stay in pieces: the tokens of one rank, a layer at a time, no hang."""

import dataclasses
import functools
import re

import pytest
import torch

import zfunc as zf
from tests.unit.inference import families
from zfunc.models import GPTConfig, gpt
from zfunc.testing.memory import peak_live_bytes

pytestmark = pytest.mark.distributed

CONFIG = GPTConfig(vocab_size=61, d_model=32, n_layers=2, n_kv_heads=2, d_ff=49)
IDS = torch.randint(1, 61, (4, 7), generator=torch.Generator().manual_seed(3))
MASK = torch.tensor([[0] * 3 + [1] * 4, [1] * 7, [0] + [1] * 6, [1] * 7])


def params_of(config=CONFIG):
    params = gpt.init(config, seed=1)
    return zf.tree_map(lambda p: p * 5 if p.ndim > 1 else p, params)


def placed(params, world=2):
    return zf.shard(params, zf.make_mesh({"data": world})).params


def mine(x, rank):
    return x[2 * rank : 2 * rank + 2]


def on_ranks(options, jit, split):
    """The tokens of this rank, from pieces of the weights."""
    params = placed(params_of())
    rank = int(zf.make_mesh({"data": 2}).axis_index("data"))
    cut = functools.partial(mine, rank=rank) if split else (lambda x: x)
    keys = cut(torch.arange(4))
    decoder = zf.models.decoder(CONFIG)
    ids, mask = cut(IDS), cut(MASK)
    found = zf.generate(
        decoder, params, ids, attention_mask=mask, key=keys, jit=jit, **options
    )
    return tuple(found)


@pytest.mark.parametrize(("jit", "split"), [(False, True), (True, False)])
def test_two_ranks_generate_what_one_does(ranks, jit, split):
    decoder, params = zf.models.decoder(CONFIG), params_of()
    first = {"max_new_tokens": 10}
    whole = zf.generate(decoder, params, IDS, attention_mask=MASK, jit=False, **first)
    # The rows of one rank end long before those of the other.
    end = int(whole.ids[0, 8])
    for more in ({}, {"eos": end}, {"temperature": 1.1, "top_k": 9}):
        options = {**first, **more}
        want = zf.generate(
            decoder,
            params,
            IDS,
            attention_mask=MASK,
            key=torch.arange(4),
            jit=False,
            **options,
        )
        got = ranks(2).run(on_ranks, options, jit, split)
        if split:
            got = [tuple(torch.cat(pair) for pair in zip(*got, strict=True))]
        for found in got:
            assert torch.equal(found[0], want.ids), more
            assert torch.equal(found[1], want.lengths)
            assert torch.equal(found[2], want.finished)


def test_a_rank_whose_rows_have_ended_goes_on_for_the_others(ranks):
    decoder, params = zf.models.decoder(CONFIG), params_of()
    options = {"max_new_tokens": 20}
    whole = zf.generate(
        decoder, params, IDS, attention_mask=MASK, key=torch.arange(4), **options
    )
    options["eos"] = [int(whole.ids[row, 8]) for row in (0, 1)]
    want = zf.generate(
        decoder, params, IDS, attention_mask=MASK, key=torch.arange(4), **options
    )
    assert want.lengths[:2].max() <= 2, "the rows of rank 0 end at once"
    assert want.lengths[2:].max() == 20, "one of rank 1 does not"
    for jit in (False, True):
        got = ranks(2).run(on_ranks, options, jit, True)
        assert torch.equal(torch.cat([ids for ids, _, _ in got]), want.ids)


def of_family(family):
    decoder, params = families.ours(families.model_of(family))
    ids, mask = families.prompts(family, padded=True)
    options = {"max_new_tokens": 6, "attention_mask": mask}
    found = [
        zf.generate(decoder, placed(params), ids, jit=jit, **options).ids
        for jit in (False, True)
    ]
    found.append(zf.generate(decoder, params, ids, jit=False, **options).ids)
    return found


@pytest.mark.parametrize("family", ["llama", "mixtral", "t5"])
def test_families_generate_from_pieces(ranks, family):
    for eager, jitted, whole in ranks(2).run(of_family, family):
        assert torch.equal(eager, whole)
        assert torch.equal(jitted, whole)


def other_lengths():
    params, rank = placed(params_of()), zf.make_mesh({"data": 2}).axis_index("data")
    try:
        zf.generate(
            zf.models.decoder(CONFIG), params, IDS, max_new_tokens=3 + int(rank)
        )
    except ValueError as error:
        return str(error)
    return "no error"


def test_ranks_that_would_hang_are_told(ranks):
    for message in ranks(2).run(other_lengths):
        assert "max_new_tokens [3, 4]" in message


def what_one_rank_cannot(how):
    config = dataclasses.replace(CONFIG, tie_embeddings=False)
    params, decoder = params_of(config), zf.models.decoder(config)
    rank = int(zf.make_mesh({"data": 2}).axis_index("data"))
    ids, options = IDS.clamp(min=2), {"max_new_tokens": 2}
    if how == "ids":
        ids = ids + 60 * rank
    elif how == "padding":
        decoder = functools.partial(gpt.apply, config=config)
        options |= {"attention_mask": MASK} if rank else {}
    else:
        params["embedding"][1] = float("nan")
        ids[:, 3] -= (ids[:, 3] - 1) * rank
    try:
        zf.generate(decoder, placed(params), ids, **options)
    except ValueError as error:
        return str(error)
    return "no error"


@pytest.mark.parametrize(
    ("how", "here", "there"),
    [
        ("ids", "tokenizer is of another", r"those at \[1\] cannot begin"),
        ("padding", "plain function", r"those at \[1\] cannot begin"),
        ("nan", r"rows \[0, 1, 2, 3\] are not", "logits of another rank are not"),
    ],
)
def test_what_one_rank_cannot_none_does(ranks, how, here, there):
    other, own = ranks(2).run(what_one_rank_cannot, how)
    assert re.search(here, own)
    assert re.search(there, other)


def peak(jit, layers):
    """(Most bytes of tensors made while generating, bytes of a layer, of the table)."""
    config = GPTConfig(vocab_size=64, d_model=128, n_layers=layers, d_ff=512)
    whole = gpt.init(config)
    layer = sum(p.nbytes for p in zf.tree_leaves(whole["layers"][0]))
    params, table = placed(whole), whole["embedding"].nbytes
    del whole
    decoder = zf.models.decoder(config)
    ids = IDS[:1, :4]
    run = functools.partial(
        zf.generate, decoder, params, ids, jit=jit, max_new_tokens=4
    )
    run()  # traces, if it does
    _, most = peak_live_bytes(run)
    return most, layer, table


@pytest.mark.parametrize("jit", [False, True])
def test_no_more_than_a_layer_is_gathered(ranks, jit):
    layers = 4
    for most, layer, table in ranks(2).run(peak, jit, layers):
        stays = layers * 2 * 64 * 128 * 4 + layers * layer / 2  # cache and pieces
        assert layer < most - stays < 1.1 * layer + table, (most - stays, layer, table)
