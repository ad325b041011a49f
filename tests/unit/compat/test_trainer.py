# SPDX-License-Identifier: Apache-2.0
"""The Trainer: transformers' own numbers, from the same TrainingArguments."""

import json

import pytest
import torch
from safetensors.torch import load_file

from tests.unit.compat.trainers import arguments, config, llama, logged, ours, theirs
from zfunc.compat import CompatError
from zfunc.config import ConfigError

ADAMW = {
    "type": "AdamW",
    "params": {"lr": "auto", "betas": "auto", "eps": "auto", "weight_decay": "auto"},
}
WARMUP = {
    "type": "WarmupLR",
    "params": {
        "warmup_min_lr": "auto",
        "warmup_max_lr": "auto",
        "warmup_num_steps": "auto",
        "warmup_type": "linear",
    },
}


@pytest.fixture(autouse=True)
def quiet(capsys):
    yield
    capsys.readouterr()


def trained(trainer):
    """Before another is made: each sets torch's seed."""
    trainer.train()
    return trainer


def near(rows):
    return [pytest.approx(row, rel=1e-5, abs=1e-6) for row in rows]


def test_losses_norms_and_rates_are_those_of_transformers(tmp_path):
    """Dropout, token counts that differ, an epoch that ends amid a step."""
    mine = trained(ours(tmp_path, config()))
    plain = trained(theirs(tmp_path))
    assert len(logged(mine)) == 6
    assert logged(mine) == near(logged(plain))
    assert mine.evaluate()["eval_loss"] == pytest.approx(
        plain.evaluate()["eval_loss"], rel=1e-5
    )
    predicted = mine.predict(mine.eval_dataset).predictions
    expected = plain.predict(plain.eval_dataset).predictions
    assert predicted == pytest.approx(expected, abs=1e-5)
    mine.save_model(tmp_path / "end")
    saved = load_file(tmp_path / "end" / "model.safetensors")
    for name, value in plain.model.state_dict().items():
        if name in saved:
            torch.testing.assert_close(saved[name], value, rtol=0, atol=2e-6)
    assert len(saved) > 10


def test_an_optimizer_of_the_configuration_with_the_arguments_schedule(tmp_path):
    mine = trained(ours(tmp_path, config(1, optimizer=ADAMW), weight_decay=0.0))
    plain = trained(theirs(tmp_path, weight_decay=0.0))
    assert logged(mine) == near(logged(plain))


def test_a_schedule_of_the_configuration(tmp_path):
    mine = ours(tmp_path, config(2, optimizer=ADAMW, scheduler=WARMUP), max_steps=4)
    mine.train()
    # DeepSpeed's first two updates are at the least rate.
    assert [rate for _, _, rate in logged(mine)] == pytest.approx([0, 0, 0.005, 0.01])


def test_bf16_needs_no_autocast(tmp_path):
    mine = ours(tmp_path, config(bf16={"enabled": "auto"}), bf16=True)
    mine.train()
    plain = theirs(tmp_path)
    plain.train()
    for (loss, *_), (want, *_) in zip(logged(mine), logged(plain), strict=True):
        assert loss == pytest.approx(want, rel=0.02)
    assert mine.engine.module.model.norm.weight.dtype == torch.float32


def test_counts_of_tokens_are_no_tensors(tmp_path):
    """One would be rounded to 8 bits with the rest of the batch."""
    mine, seen = ours(tmp_path, config(bf16={"enabled": True}), bf16=True), []
    inner = mine.compute_loss

    def compute_loss(model, inputs, num_items_in_batch=None, **options):
        seen.append(num_items_in_batch)
        return inner(model, inputs, num_items_in_batch=num_items_in_batch, **options)

    mine.compute_loss = compute_loss
    mine.train()
    assert {type(count) for count in seen} == {float}


def test_saving_and_going_on(tmp_path):
    path = tmp_path / "ds.json"
    path.write_text(json.dumps(config()))
    whole = ours(tmp_path / "a", str(path))
    whole.train()
    half = ours(tmp_path / "b", str(path), save_strategy="steps", save_steps=3)
    half.train()
    folder = tmp_path / "b" / "checkpoint-3"
    names = {p.name for p in folder.iterdir()}
    assert names >= {"model.safetensors", "global_step3", "latest", "config.json"}
    rest = ours(tmp_path / "b", config(1), save_strategy="steps", save_steps=3)
    rest.train(resume_from_checkpoint=str(folder))
    assert logged(rest) == near(logged(whole))
    assert type(llama()).from_pretrained(folder).config.hidden_size == 16
    (folder / "latest").unlink()
    with pytest.raises(CompatError, match="no checkpoint of zfunc to go on from"):
        rest.train(resume_from_checkpoint=str(folder))


def test_the_best_model_is_put_back(tmp_path):
    mine = ours(
        tmp_path,
        config(),
        max_steps=4,
        learning_rate=0.5,
        save_strategy="steps",
        save_steps=1,
        eval_strategy="steps",
        eval_steps=1,
        load_best_model_at_end=True,
        save_total_limit=2,
    )
    mine.train()
    losses = [row["eval_loss"] for row in mine.state.log_history if "eval_loss" in row]
    assert min(losses) < losses[-1]
    assert mine.evaluate()["eval_loss"] == pytest.approx(min(losses), rel=1e-5)


def test_train_again_goes_on_from_where_it_is(tmp_path):
    mine = ours(tmp_path, config(), max_steps=2)
    mine.train()
    first = logged(mine)
    mine.train()
    assert logged(mine)[0][0] < first[0][0]


def test_every_mismatch_at_once(tmp_path):
    wrong = {"type": "AdamW", "params": {"lr": 1e-3, "weight_decay": 0.2}}
    given = config(optimizer=wrong)
    given["gradient_clipping"] = 2.0
    mine = ours(tmp_path, given)
    with pytest.raises(ConfigError) as raised:
        mine.train()
    paths = {problem.path for problem in raised.value.problems}
    assert paths == {
        "gradient_clipping",
        "optimizer.params.lr",
        "optimizer.params.weight_decay",
    }


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"activation_checkpointing": True}, "torch.func does not support it"),
        ({"auto_find_batch_size": True}, "the batch size is in ds_config too"),
        ({"neftune_noise_alpha": 5.0}, "needs hooks of the module"),
    ],
)
def test_arguments_that_have_no_meaning(tmp_path, changes, message):
    with pytest.raises(CompatError, match=message):
        ours(tmp_path, config(), **changes)


def test_schedules_and_optimizers_that_are_not_here(tmp_path):
    with pytest.raises(CompatError, match="looks at the loss"):
        ours(
            tmp_path,
            config(),
            lr_scheduler_type="reduce_lr_on_plateau",
            eval_strategy="steps",
        ).train()
    with pytest.raises(CompatError, match="optim is 'adafactor'"):
        ours(tmp_path, config(), optim="adafactor").train()
    with pytest.raises(CompatError, match="the optimizer SGD and no section scheduler"):
        ours(tmp_path, config(optimizer={"type": "SGD"})).train()
    assert arguments(tmp_path).optim.value in ("adamw_torch", "adamw_torch_fused")


@pytest.mark.parametrize(
    ("changes", "dtype"),
    [
        ({"bf16": True}, torch.bfloat16),
        ({"fp16": True}, torch.float16),
        ({"bf16_full_eval": True}, torch.bfloat16),
        ({}, None),
    ],
)
def test_a_precision_that_the_arguments_alone_say(tmp_path, changes, dtype):
    mine = ours(tmp_path, config(), max_steps=1, **changes)
    mine.train()
    assert mine.evaluate()["eval_loss"] > 0
    ids = {"input_ids": torch.ones(1, 4, dtype=torch.int64)}
    assert mine.engine.eval()(**ids).logits.dtype == (dtype or torch.float32)


def test_both_precisions(tmp_path):
    mine = ours(tmp_path, config(fp16={"enabled": True}), bf16=True)
    with pytest.raises(ConfigError, match="fp16"):
        mine.train()


def test_a_norm_that_the_configuration_leaves_out(tmp_path):
    given = config()
    del given["gradient_clipping"]
    with pytest.raises(CompatError, match=r'write "gradient_clipping": "auto"'):
        ours(tmp_path, given, max_grad_norm=0.1).train()
    ours(tmp_path, given, max_grad_norm=1.0, max_steps=1).train()


def test_model_init_begins_anew(tmp_path):
    one = ours(tmp_path, config())
    mine = type(one)(
        args=one.args,
        model_init=llama,
        train_dataset=one.train_dataset,
        ds_config=config(),
    )
    mine.train()
    first = logged(mine)
    mine.train()
    assert logged(mine) == first


def test_callbacks_read_rates(tmp_path):
    from transformers import TrainerCallback

    seen = []

    class Reads(TrainerCallback):
        def on_step_end(self, args, state, control, **have):
            group = have["optimizer"].param_groups[0]
            seen.append((group["lr"], *have["lr_scheduler"].get_last_lr()))

    mine = ours(tmp_path, config())
    mine.add_callback(Reads())
    mine.train()
    rates = [rate for _, _, rate in logged(mine)]
    assert [a for a, _ in seen][:-1] == rates[1:]
    assert all(a == b for a, b in seen)


def test_optimizers_that_would_not_be_used(tmp_path):
    one = ours(tmp_path, config())
    kind, made = type(one), llama()
    optimizer = torch.optim.SGD(made.parameters(), 1.0)

    class Overrides(kind):
        def create_optimizer(self, model=None):
            return optimizer

    rest = {"train_dataset": one.train_dataset, "ds_config": config()}
    message = "say the optimizer and schedule"
    with pytest.raises(CompatError, match=message):
        kind(made, one.args, optimizers=(optimizer, None), **rest)
    chosen = (torch.optim.SGD, {"lr": 1.0})
    with pytest.raises(CompatError, match=message):
        kind(made, one.args, optimizer_cls_and_kwargs=chosen, **rest)
    with pytest.raises(CompatError, match=r"Overrides\.create_optimizer: ds_config"):
        Overrides(made, one.args, **rest)


def test_the_best_model_needs_its_state(tmp_path):
    best = {
        "save_only_model": True,
        "load_best_model_at_end": True,
        "save_strategy": "steps",
        "save_steps": 1,
        "eval_strategy": "steps",
        "eval_steps": 1,
    }
    with pytest.raises(CompatError, match="reads the state that it leaves out"):
        ours(tmp_path, config(), **best)
