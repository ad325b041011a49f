# SPDX-License-Identifier: Apache-2.0
"""Greedy tokens are those of transformers, for each family, padded and not."""

import functools
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

import zfunc as zf
from tests.unit.inference.families import (
    FAMILIES,
    NEW_TOKENS,
    model_of,
    ours,
    prompts,
    theirs,
)
from zfunc.inference.options import Request
from zfunc.inference.sampling import Sampling
from zfunc.inference.step import begun, chosen, decoded, read_prompt
from zfunc.program.pure import replayed


@pytest.mark.parametrize("family", FAMILIES)
def test_greedy_tokens_are_those_of_transformers(family):
    model = model_of(family)
    decoder, params = ours(model)
    ends = {"eos": model.config.eos_token_id, "pad": model.config.pad_token_id}
    for padded in (False, True):
        ids, mask = prompts(family, padded)
        want = theirs(model, ids, mask)
        for jit in (False, True):
            got = zf.generate(
                decoder,
                params,
                ids,
                attention_mask=mask,
                max_new_tokens=NEW_TOKENS,
                jit=jit,
                **ends,
            )
            assert torch.equal(got.ids, want), (padded, jit)
        new = want[:, -NEW_TOKENS:]
        assert max(len(set(row.tolist())) for row in new) > 1, "a text of one token"
    assert len(decoder.programs) == 1


@pytest.mark.parametrize("family", [f for f in FAMILIES if f != "t5"])
def test_logits_are_those_of_the_model_without_a_cache(family):
    model = model_of(family)
    decoder, params = ours(model)
    ids, mask = prompts(family, padded=True)
    cache = decoder.init_cache(3, 16)
    for t in range(ids.shape[1]):
        new = slice(t, t + 1)
        logits, cache = decoder.apply(
            params, ids[:, new], cache, attention_mask=mask[:, new]
        )
    for row, kept, got in zip(ids, mask.bool(), logits[:, -1], strict=True):
        with torch.no_grad():
            want = model(input_ids=row[kept][None]).logits[0, -1]
        scale = float(want.abs().max())
        assert float((got - want).abs().max()) < 1e-5 * max(scale, 1)


def test_every_row_is_the_prompt_alone():
    for family in ("llama", "bloom", "gpt2", "mistral", "t5"):
        decoder, params = ours(model_of(family))
        ids, mask = prompts(family, padded=True)
        options = {"max_new_tokens": 8, "jit": False}
        got = zf.generate(decoder, params, ids, attention_mask=mask, **options)
        for row, kept, text in zip(ids, mask.bool(), got.ids, strict=True):
            alone = zf.generate(decoder, params, row[kept][None], **options)
            assert torch.equal(text[-8:], alone.ids[0, -8:]), family


def test_ends_are_those_of_transformers():
    model = model_of("llama")
    decoder, params = ours(model)
    ids, mask = prompts("llama", padded=True)
    text = theirs(model, ids, mask)
    # An end that rows meet at different places, so that some wait for others.
    new = text[:, ids.shape[1] :]
    for end in new[1, [3, 10]].tolist():
        for stops in (end, [end, int(new[0, 5])]):
            options = {"eos_token_id": stops, "pad_token_id": 7}
            want = theirs(model, ids, mask, **options)
            got = zf.generate(
                decoder,
                params,
                ids,
                attention_mask=mask,
                max_new_tokens=NEW_TOKENS,
                eos=stops,
                pad=7,
            )
            assert torch.equal(got.ids, want)
            ended = (want[:, ids.shape[1] :, None] == torch.tensor(stops)).flatten(1)
            assert torch.equal(got.finished, ended.any(1))


def test_a_masked_language_model_is_refused():
    from transformers import BertConfig

    shape = {**FAMILIES["bert"][1], "is_decoder": False}
    for task, why in (("masked-lm", "does not generate"), ("causal-lm", "is_decoder")):
        config = BertConfig(**shape)
        _, loss_fn = zf.models.from_hf(config, task=task, dropout="off")
        with pytest.raises(zf.models.ModelError, match=why):
            zf.models.decoder(loss_fn)


def test_a_classifier_is_refused():
    from transformers import LlamaConfig

    config = LlamaConfig(**FAMILIES["llama"][1])
    _, loss_fn = zf.models.from_hf(config, task="sequence-classification")
    with pytest.raises(zf.models.ModelError, match="does not generate"):
        zf.models.decoder(loss_fn)


def test_frozen_pieces_are_generated_with_as_parameters():
    model, mesh = model_of("llama"), zf.make_mesh({"data": 1})
    ids, _ = prompts("llama", padded=False)
    params, loss_fn = zf.models.from_hf(
        model, dropout="off", trainable=["*.q_proj.weight"], mesh=mesh
    )
    one, options = zf.models.decoder(loss_fn), {"max_new_tokens": 4}
    with pytest.raises(zf.PlacementError, match=r"\*\*loss_fn\.frozen, \*\*params"):
        zf.generate(one, params, ids, **options)
    got = zf.generate(one, {**loss_fn.frozen, **params}, ids, **options)
    assert torch.equal(got.ids, zf.generate(*ours(model), ids, **options).ids)


def test_threads_share_a_decoder():
    decoder, params = ours(model_of("llama"))
    ids, _ = prompts("llama", padded=False)
    other = {name: p * 0.5 for name, p in params.items()}

    def made(weights, wanted):
        return zf.generate(decoder, weights, ids, max_new_tokens=wanted).ids

    asked = [(w, n) for n in range(2, 14) for w in (params, other)]
    with ThreadPoolExecutor(3) as pool:
        found = list(pool.map(made, *zip(*asked, strict=True)))
    for (weights, wanted), got in zip(asked, found, strict=True):
        assert torch.equal(got, made(weights, wanted))


def test_learned_positions_end():
    decoder, params = ours(model_of("gpt2"))
    ids, _ = prompts("gpt2", padded=False)
    with pytest.raises(ValueError, match="type max_new_tokens=55"):
        zf.generate(decoder, params, ids, max_new_tokens=56)
    zf.generate(decoder, params, ids, max_new_tokens=55, jit=False)
    assert ours(model_of("opt"))[0].max_positions == 64
    assert ours(model_of("llama"))[0].max_positions is None


def test_what_is_no_loss_is_refused():
    with pytest.raises(TypeError, match=r"params, loss_fn = zf\.models\.from_hf"):
        zf.models.decoder(model_of("llama"))


@pytest.mark.parametrize("family", ["llama", "gpt_neox", "t5"])
def test_logits_of_a_program_are_those_of_the_module(family):
    decoder, params = ours(model_of(family))
    ids, mask = prompts(family, padded=True)
    request = Request(5, Sampling(), (2,), 0)
    leaves = []
    for jit in (False, True):
        cache = decoder.init_cache(3, 64)
        logits, cache = read_prompt(decoder, params, ids, mask, cache)
        state = chosen(begun(None, torch.arange(3), request), logits, cache, request)
        step = functools.partial(decoded, decoder, request, donate=not jit)
        step = replayed(step, params, state) if jit else step
        for _ in range(4):
            state = step(params, state)
        leaves.append(zf.tree_leaves(state))
    for a, b in zip(*leaves, strict=True):
        assert torch.equal(a, b)
