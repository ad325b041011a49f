# SPDX-License-Identifier: Apache-2.0
"""Fine-tune a Hugging Face model from a checkpoint directory, and save one again.

    python examples/fine_tune_hf.py [CHECKPOINT_DIR [OUTPUT_DIR]]
    torchrun --nproc-per-node 2 examples/fine_tune_hf.py

Without a directory it makes a tiny Llama of random weights first. Each rank reads its
own pieces of the safetensors files; no rank ever holds the model. The loss, its masked
mean over tokens and the attention are those of transformers.
"""

import os
import sys
import tempfile
from pathlib import Path

import torch
import torch.distributed as dist
import transformers

import zfunc as zf

STEPS, SAMPLES, LENGTH, PROMPT = 60, 16, 24, 8


def make_tiny_model(folder):
    """A Llama that has learned nothing, as `save_pretrained` stores it."""
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=96,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=128,
    )
    transformers.LlamaForCausalLM(config).save_pretrained(folder)


def batch_of(step, rows, vocab_size):
    """Some rows of the global batch: tokens that count upwards, of unequal lengths.

    Padding counts neither in the attention nor in the loss.
    """
    generator = torch.Generator().manual_seed(step)
    start = torch.randint(vocab_size, (SAMPLES, 1), generator=generator)
    lengths = torch.randint(8, LENGTH + 1, (SAMPLES, 1), generator=generator)
    ids = (start + torch.arange(LENGTH)) % vocab_size
    mask = (torch.arange(LENGTH) < lengths).long()
    labels = ids.masked_fill(mask == 0, -100)
    batch = {"input_ids": ids, "attention_mask": mask, "labels": labels}
    return {name: x[rows] for name, x in batch.items()}


def share(rank, make):
    """The path that rank 0 makes, on every rank."""
    made = [str(make()) if rank == 0 else None]
    if dist.is_initialized():
        dist.broadcast_object_list(made)
    return Path(made[0])


def main(scratch):
    mesh = zf.make_mesh({"data": int(os.environ.get("WORLD_SIZE", "1"))})
    rank, ranks = int(mesh.rank), mesh.size
    root = share(rank, lambda: scratch)
    source = Path(sys.argv[1]) if sys.argv[1:] else root / "tiny-llama"
    output = Path(sys.argv[2]) if sys.argv[2:] else root / "fine-tuned"
    if not sys.argv[1:] and rank == 0:
        make_tiny_model(source)
    share(rank, lambda: source)  # wait until it is there

    params, loss_fn = zf.models.from_hf(source, mesh=mesh, remat=zf.remat)
    tx = zf.optim.chain(
        zf.optim.clip_by_global_norm(1.0),
        zf.optim.adamw(zf.optim.warmup_cosine(1e-2, 5, STEPS), weight_decay=0.01),
    )
    step_fn = zf.jit(zf.train_step(loss_fn, tx, zf.partition(zero=3)))
    state = zf.shard(params, mesh)
    vocab_size = loss_fn.config.vocab_size
    share_of = SAMPLES // ranks
    rows = slice(rank * share_of, (rank + 1) * share_of)
    losses = []
    for step in range(STEPS):
        batch = batch_of(step, rows, vocab_size)
        state = step_fn(state, {k: x.to(mesh.device) for k, x in batch.items()})
        losses.append(float(state.metrics.loss))

    # Generation works on the pieces: each weight is gathered where it is used.
    prompt = batch_of(STEPS, slice(0, 1), vocab_size)["input_ids"][:, :PROMPT]
    decoder = zf.models.decoder(loss_fn)
    ours = zf.generate(
        decoder, state.params, prompt.to(mesh.device), max_new_tokens=PROMPT
    )
    full = zf.unshard(state).params
    if rank == 0:
        save(source, output, full)
        report(output, losses, prompt, ours.ids.cpu(), params)
    share(rank, lambda: output)  # rank 0 still reads the scratch folder


def save(source, output, params):
    """A checkpoint directory for anything that reads one."""
    model = transformers.AutoModelForCausalLM.from_pretrained(source)
    model.load_state_dict(params, strict=False)  # tied weights have one name of two
    model.save_pretrained(output)


def report(output, losses, prompt, ours, pieces):
    theirs = transformers.AutoModelForCausalLM.from_pretrained(output)
    mask = torch.ones_like(prompt)
    expected = theirs.generate(
        prompt, attention_mask=mask, max_new_tokens=PROMPT, do_sample=False
    )
    held = sum(x.buffer.numel() for x in pieces.values())
    total = sum(x.numel() for x in theirs.parameters())
    print(f"rank 0 read {held} of {total} parameters")
    print(f"first loss {losses[0]:.4f}, last loss {losses[-1]:.4f}")
    print(f"prompt     {prompt[0].tolist()}")
    print(f"continued  {ours[0, prompt.shape[1] :].tolist()}")
    print(f"transformers continues alike: {torch.equal(ours, expected)}")


with tempfile.TemporaryDirectory() as folder:
    main(folder)
