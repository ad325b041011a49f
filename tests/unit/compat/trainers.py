# SPDX-License-Identifier: Apache-2.0
"""A tiny Llama, its data and its TrainingArguments."""

import torch


def llama():
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        vocab_size=53,
        max_position_embeddings=16,
        attention_dropout=0.1,
    )
    return LlamaForCausalLM(config)


class Data(torch.utils.data.Dataset):
    """Rows with different numbers of labels: means over tokens are not over rows."""

    def __len__(self):
        return 22

    def __getitem__(self, i):
        generator = torch.Generator().manual_seed(i)
        ids = torch.randint(0, 53, (8,), generator=generator)
        labels = ids.clone()
        labels[: i % 5] = -100
        return {"input_ids": ids, "labels": labels}


def arguments(folder, **changes):
    from transformers import TrainingArguments

    options = {
        "per_device_train_batch_size": 2,
        "gradient_accumulation_steps": 3,
        "max_steps": 6,
        "learning_rate": 1e-2,
        "weight_decay": 0.1,
        "warmup_steps": 2,
        "max_grad_norm": 0.5,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": [],
        "use_cpu": True,
        "disable_tqdm": True,
        "dataloader_pin_memory": False,
    }
    return TrainingArguments(str(folder), **{**options, **changes})


def config(stage=3, **sections):
    return {
        "train_batch_size": "auto",
        "train_micro_batch_size_per_gpu": "auto",
        "gradient_accumulation_steps": "auto",
        "gradient_clipping": "auto",
        "zero_optimization": {
            "stage": stage,
            "stage3_param_persistence_threshold": "auto",
            "reduce_bucket_size": "auto",
        },
        **sections,
    }


def ours(folder, ds_config, **changes):
    from zfunc.compat import Trainer

    return Trainer(
        llama(),
        arguments(folder, **changes),
        train_dataset=Data(),
        eval_dataset=Data(),
        ds_config=ds_config,
    )


def theirs(folder, **changes):
    import transformers

    return transformers.Trainer(
        llama(),
        arguments(folder, **changes),
        train_dataset=Data(),
        eval_dataset=Data(),
    )


def logged(trainer):
    """Loss, norm and rate of each step."""
    names = ("loss", "grad_norm", "learning_rate")
    rows = [row for row in trainer.state.log_history if "loss" in row]
    return [tuple(float(row[name]) for name in names) for row in rows]
