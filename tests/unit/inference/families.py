# SPDX-License-Identifier: Apache-2.0
"""Tiny random models of every family, and what transformers generates with them."""

import torch

import zfunc as zf

VOCAB = 97
PROMPT_TOKENS, NEW_TOKENS = 9, 32
SHAPE = {
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
}
SPECIAL = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
GROUPED = {**SHAPE, **SPECIAL, "num_key_value_heads": 2}
FALCON = {k: v for k, v in SHAPE.items() if k != "intermediate_size"} | SPECIAL
SHORT = {**SHAPE, **SPECIAL, "max_position_embeddings": 64}

# The class of the configuration, and its fields.
FAMILIES = {
    "llama": ("LlamaConfig", GROUPED),
    "llama-tied": ("LlamaConfig", {**GROUPED, "tie_word_embeddings": True}),
    "mistral": ("MistralConfig", {**GROUPED, "sliding_window": 6}),
    "falcon": ("FalconConfig", FALCON),
    "falcon-alibi": ("FalconConfig", {**FALCON, "alibi": True}),
    "opt": (
        "OPTConfig",
        {**SHORT, "ffn_dim": 48, "word_embed_proj_dim": 32, "dropout": 0.0},
    ),
    "bloom": (
        "BloomConfig",
        {**SPECIAL, "vocab_size": VOCAB, "hidden_size": 32, "n_layer": 2, "n_head": 4},
    ),
    "gpt_neox": ("GPTNeoXConfig", {**SHAPE, **SPECIAL}),
    "qwen2": ("Qwen2Config", GROUPED),
    "qwen2-sliding": (
        "Qwen2Config",
        {
            **GROUPED,
            "use_sliding_window": True,
            "sliding_window": 6,
            "max_window_layers": 1,
        },
    ),
    "qwen3": ("Qwen3Config", {**GROUPED, "head_dim": 8}),
    "gemma": ("GemmaConfig", {**GROUPED, "num_key_value_heads": 1, "head_dim": 8}),
    "gpt2": (
        "GPT2Config",
        {
            **SPECIAL,
            "vocab_size": VOCAB,
            "n_embd": 32,
            "n_layer": 2,
            "n_head": 4,
            "n_positions": 64,
        },
    ),
    "mixtral": ("MixtralConfig", {**GROUPED, "num_local_experts": 4}),
    "t5": (
        "T5Config",
        {
            "vocab_size": VOCAB,
            "d_model": 32,
            "d_ff": 48,
            "d_kv": 8,
            "num_layers": 2,
            "num_heads": 4,
            "eos_token_id": 1,
            "pad_token_id": 0,
            "decoder_start_token_id": 0,
        },
    ),
    "bert": ("BertConfig", {**SHORT, "is_decoder": True}),
}


def model_of(family):
    """A model of transformers whose greedy texts are not one token over and over."""
    import transformers

    name, fields = FAMILIES[family]
    # Tied to what it reads, a random model says the same token again.
    config = getattr(transformers, name)(**{"tie_word_embeddings": False, **fields})
    both = config.is_encoder_decoder
    auto = (
        transformers.AutoModelForSeq2SeqLM
        if both
        else transformers.AutoModelForCausalLM
    )
    torch.manual_seed(0)
    model = auto.from_config(config).eval()
    with torch.no_grad():
        for p in model.parameters():
            if p.ndim > 1:
                p.mul_(4)
    return model


def ours(model):
    """(decoder, parameters) of a model of transformers."""
    params, loss_fn = zf.models.from_hf(model, dropout="off")
    return zf.models.decoder(loss_fn), params


def prompts(family, padded):
    """(ids, mask): rows of several lengths if padded, where the family has padding."""
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(3, VOCAB, (3, PROMPT_TOKENS), generator=generator)
    if not padded:
        return ids, None
    mask = torch.ones_like(ids)
    mask[0, :4] = mask[2, :1] = 0
    if family == "t5":  # an encoder is padded on the right
        mask = mask.flip(1)
    return ids.masked_fill(mask == 0, 0), mask


def theirs(model, ids, mask, **options):
    """What ``model.generate`` makes of it."""
    mask = torch.ones_like(ids) if mask is None else mask
    options = {"do_sample": False, "max_new_tokens": NEW_TOKENS, **options}
    with torch.no_grad():
        return model.generate(ids, attention_mask=mask, **options)
