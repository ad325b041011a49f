# SPDX-License-Identifier: Apache-2.0
"""Names, presets and what is refused before any rank is started."""

import pytest
import torch

from zfunc.bench import (
    CONTENDERS,
    PRESETS,
    BenchError,
    check_installed,
    choose,
    preset,
    presets,
)
from zfunc.bench.deepspeed_peer import config
from zfunc.bench.peers import eager
from zfunc.bench.presets import batches, llama
from zfunc.bench.result import LOSS_TOLERANCE
from zfunc.bench.rounds import rotated
from zfunc.bench.setup import AdamW, Setup

OURS = [f"zfunc-{zero}{how}" for zero in range(4) for how in ("", "-inductor")]
SHARDED = [*OURS, "ddp", "fsdp2"]
CPU = torch.device("cpu")


def names(choice):
    return [contender.name for contender in choice.contenders]


def refusal(*args, **options):
    with pytest.raises(BenchError) as caught:
        choose(*args, **options)
    return str(caught.value)


def test_every_name_is_used_once():
    assert len({c.name for c in CONTENDERS}) == len(CONTENDERS)
    assert len({p.name for p in PRESETS}) == len(PRESETS)


def test_peers_run_on_as_many_ranks():
    kinds = {contender.name: contender.sharded for contender in CONTENDERS}
    for contender in CONTENDERS:
        assert all(kinds[peer] == contender.sharded for peer in contender.peers)


def test_all_that_are_installed_take_part():
    everyone = choose(None, 2, has_deepspeed=True)
    assert names(everyone) == [*SHARDED, "deepspeed-1", "deepspeed-2", "deepspeed-3"]
    assert everyone.left_out == ()


def test_what_is_not_installed_is_left_out_and_named():
    without = choose(None, 2, has_deepspeed=False)
    assert names(without) == SHARDED
    assert without.left_out == ("deepspeed-1", "deepspeed-2", "deepspeed-3")


def test_one_process_needs_no_deepspeed():
    alone = choose(None, 1, has_deepspeed=False)
    assert names(alone) == ["zfunc-aten", "zfunc-inductor", "eager", "compile"]
    assert alone.left_out == ()


def test_a_choice_keeps_its_order():
    assert names(choose(["fsdp2", "zfunc-3"], 4)) == ["fsdp2", "zfunc-3"]


def test_what_is_missing_and_was_named_is_an_error():
    message = refusal(["zfunc-1", "deepspeed-1"], 2, has_deepspeed=False)
    assert message == 'deepspeed-1 needs DeepSpeed: pip install "zfunc-torch[bench]"'


def test_unknown_names_are_answered_with_the_known_ones():
    assert refusal(["megatron"], 1) == (
        "there is no 'megatron'; on one rank there are zfunc-aten, zfunc-inductor, "
        "eager, compile"
    )


@pytest.mark.parametrize(
    ("name", "nproc", "message"),
    [
        ("ddp", 1, "ddp needs --nproc 2; on one rank there are"),
        ("eager", 2, "eager needs --nproc 1; on 2 ranks there are"),
    ],
)
def test_a_name_of_another_number_of_ranks(name, nproc, message):
    assert refusal([name], nproc).startswith(message)


@pytest.mark.parametrize("given", [["ddp", "ddp"], []])
def test_twice_and_none(given):
    assert refusal(given, 2) == "give every contender once, as in zfunc-3,fsdp2"


def test_rounds_begin_with_another_contender():
    firsts = [rotated([1, 2, 3], number)[0] for number in range(4)]
    assert firsts == [1, 2, 3, 1]
    assert sorted(rotated([1, 2, 3], 2)) == [1, 2, 3]


# --- presets -----------------------------------------------------------------------


def test_the_sizes_that_are_promised():
    small, single, bound = map(preset, ("small", "single", "launch-bound"))
    assert (small.hidden, small.layers, small.vocab) == (128, 4, 512)
    assert (small.batch, small.seq_len) == (8, 64)
    assert (single.hidden, single.layers) == (256, 6)
    assert (single.batch, single.seq_len) == (8, 256)
    assert (bound.hidden, bound.layers) == (64, 12)
    assert (bound.batch, bound.seq_len) == (1, 32)


def test_medium_is_ten_times_small():
    sizes = []
    for name in ("small", "medium"):
        model = llama(preset(name), CPU)
        sizes.append(sum(p.numel() for p in model.parameters()))
    assert sizes[1] / sizes[0] == pytest.approx(10, rel=0.05)
    assert preset("medium").batch == preset("small").batch


def test_every_model_begins_with_the_same_weights():
    torch.manual_seed(5)
    before = torch.random.get_rng_state()
    first, second = (llama(preset("tiny"), CPU).state_dict() for _ in range(2))
    assert all(torch.equal(first[path], second[path]) for path in first)
    assert all(value.dtype == torch.float32 for value in first.values())
    assert torch.equal(torch.random.get_rng_state(), before)


def test_ranks_get_different_batches_and_the_same_again():
    mine, again, other = (batches(preset("tiny"), 3, r, CPU) for r in (0, 0, 1))
    assert torch.equal(torch.stack(mine), torch.stack(again))
    assert not torch.equal(torch.stack(mine), torch.stack(other))
    assert not torch.equal(mine[0], mine[1])


def losses(**hyper_parameters):
    setup = Setup(preset("tiny"), 1, CPU, AdamW(**hyper_parameters))
    step = eager(setup)
    return [step(ids).item() for ids in batches(setup.preset, 15, 0, CPU)]


@pytest.mark.parametrize(
    "wrong", [{"lr": 1.01e-3}, {"weight_decay": 0.0}, {"betas": (0.9, 0.99)}]
)
def test_the_losses_show_an_optimizer_that_is_a_little_different(wrong):
    right = losses()
    assert right[-1] < right[0] - 0.1
    apart = [abs(a - b) for a, b in zip(right, losses(**wrong), strict=True)]
    assert max(apart) > 5 * LOSS_TOLERANCE


def test_without_transformers_it_says_what_to_install(monkeypatch):
    monkeypatch.setattr(presets.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(BenchError) as caught:
        check_installed()
    assert str(caught.value) == (
        "the models that are measured come from transformers: "
        'pip install "zfunc-torch[bench]"'
    )


def test_deepspeed_clips_nothing_unless_told():
    assert config(1, 8, 10)["gradient_clipping"] == 0.0
