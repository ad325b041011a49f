# SPDX-License-Identifier: Apache-2.0
"""A tiny model of each family of transformers, its batches, and its plain training."""

import functools

import torch

import zfunc as zf

SIZES = {
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
}
GROUPED = {**SIZES, "num_key_value_heads": 2}
SPECIAL = {"vocab_size": 37, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
CLASSES = {
    "llama": (
        "LlamaConfig",
        {**GROUPED, "num_hidden_layers": 2, "tie_word_embeddings": True},
    ),
    "mistral": ("MistralConfig", {**GROUPED, "sliding_window": 4}),
    "falcon": ("FalconConfig", {**SIZES, "new_decoder_architecture": False}),
    "opt": (
        "OPTConfig",
        {**SIZES, "ffn_dim": 24, "dropout": 0.0, "word_embed_proj_dim": 16},
    ),
    "bloom": (
        "BloomConfig",
        {"hidden_size": 16, "n_layer": 1, "n_head": 4},
    ),
    "gpt_neox": ("GPTNeoXConfig", SIZES),
    "qwen2": (
        "Qwen2Config",
        {
            **GROUPED,
            "num_hidden_layers": 2,
            "use_sliding_window": True,
            "sliding_window": 4,
            "max_window_layers": 1,
        },
    ),
    "qwen3": ("Qwen3Config", {**GROUPED, "head_dim": 6}),
    "gemma": ("GemmaConfig", {**GROUPED, "head_dim": 6}),
    "gpt2": (
        "GPT2Config",
        {
            "n_embd": 16,
            "n_layer": 2,
            "n_head": 4,
            "resid_pdrop": 0.0,
            "embd_pdrop": 0.0,
            "attn_pdrop": 0.0,
        },
    ),
    "mixtral": ("MixtralConfig", {**GROUPED, "num_local_experts": 3}),
    "bert": (
        "BertConfig",
        {**SIZES, "hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0},
    ),
    "bert-classifier": (
        "BertConfig",
        {
            **SIZES,
            "hidden_dropout_prob": 0.0,
            "attention_probs_dropout_prob": 0.0,
            "num_labels": 3,
        },
    ),
    "t5": (
        "T5Config",
        {
            "d_model": 16,
            "d_ff": 24,
            "d_kv": 4,
            "num_layers": 2,
            "num_heads": 4,
            "dropout_rate": 0.0,
            "decoder_start_token_id": 0,
        },
    ),
}
FAMILIES = tuple(CLASSES)
TASKS = {
    "bert": "masked-lm",
    "bert-classifier": "sequence-classification",
    "t5": "seq2seq-lm",
}
CAUSAL = tuple(name for name in FAMILIES if name not in TASKS)
AUTO = {
    "causal-lm": "AutoModelForCausalLM",
    "masked-lm": "AutoModelForMaskedLM",
    "seq2seq-lm": "AutoModelForSeq2SeqLM",
    "sequence-classification": "AutoModelForSequenceClassification",
}
LR, DECAY = 1e-2, 0.1


def task_of(family):
    return TASKS.get(family, "causal-lm")


def config_of(family, **changes):
    import transformers

    name, options = CLASSES[family]
    positions = {} if family == "t5" else {"max_position_embeddings": 32}
    return getattr(transformers, name)(**{**SPECIAL, **positions, **options, **changes})


def model_of(family, key=0, **changes):
    """What transformers makes of the configuration after ``torch.manual_seed(key)``."""
    import transformers

    auto = getattr(transformers, AUTO[task_of(family)])
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(key)
        return auto.from_config(config_of(family, **changes)).eval()


def batch_of(family, step, rank=0, rows=2, length=7):
    """A ragged batch: rows of several lengths, the rest padded and not labelled."""
    generator = torch.Generator().manual_seed(100 * step + rank)
    draw = functools.partial(torch.randint, generator=generator)
    ids = draw(3, 37, (rows, length))
    lengths = draw(3, length + 1, (rows, 1))
    mask = (torch.arange(length) < lengths).long()
    ids = ids * mask
    labels = torch.where(mask == 1, ids, -100)
    if family == "bert":
        masked = draw(0, 2, (rows, length)).bool() | (torch.arange(length) == 0)
        labels, ids = torch.where(masked, labels, -100), torch.where(masked, 3, ids)
    elif family == "bert-classifier":
        labels = draw(0, 3, (rows,))
    elif family == "t5":
        target = draw(3, 37, (rows, 5))
        labels = torch.where(torch.arange(5) < lengths - 1, target, -100)
    return {"input_ids": ids, "attention_mask": mask, "labels": labels}


def joined(batches):
    return {key: torch.cat([batch[key] for batch in batches]) for key in batches[0]}


def plain_losses(family, world, steps):
    """Losses of plain transformers and torch.optim.AdamW on the ranks' batches."""
    model = model_of(family)
    optimizer = torch.optim.AdamW(model.parameters(), lr=LR, weight_decay=DECAY)
    losses = []
    for step in range(steps):
        batch = joined([batch_of(family, step % 2, rank) for rank in range(world)])
        loss = model(**batch).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


def zfunc_losses(family, steps, zero=3, remat=False):
    """The same on this rank of a mesh of all ranks, sharded at birth and jitted."""
    mesh = zf.make_mesh({"data": torch.distributed.get_world_size()})
    params, loss_fn = zf.models.from_hf(
        config_of(family),
        task=task_of(family),
        mesh=mesh,
        spec=zf.P() if zero == 0 else None,
        remat=zf.remat if remat else None,
    )
    tx = zf.optim.adamw(LR, weight_decay=DECAY)
    step_fn = zf.jit(zf.train_step(loss_fn, tx, zf.partition(zero=zero)))
    state, losses = zf.shard(params, mesh), []
    for step in range(steps):
        state = step_fn(state, batch_of(family, step % 2, int(mesh.rank)))
        losses.append(state.metrics.loss.item())
    return losses


def adapted_losses(path, steps, world=1):
    """LoRA on a directory that every rank reads its pieces of, with remat."""
    mesh = zf.make_mesh({"data": world})
    params, loss_fn = zf.models.from_hf(path, mesh=mesh, remat=zf.remat)
    factors, adapted = zf.models.lora(
        params, loss_fn, rank=3, targets=["*.q_proj.weight", "*.down_proj.weight"]
    )
    whole = zf.with_frozen(adapted, adapted.frozen)
    tx = zf.optim.adamw(LR, weight_decay=DECAY)
    step_fn = zf.jit(zf.train_step(whole, tx, zf.partition(zero=3)))
    state, losses = zf.shard(factors, mesh), []
    for step in range(steps):
        mine = range(2) if world == 1 else [int(mesh.rank)]
        batch = joined([batch_of("llama", step % 2, rank) for rank in mine])
        state = step_fn(state, batch)
        losses.append(state.metrics.loss.item())
    merged = zf.models.merge_lora(state.params, adapted)
    return losses, zf.unshard(zf.shard(merged, mesh)).params
