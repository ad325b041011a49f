# SPDX-License-Identifier: Apache-2.0
"""A model that is an ``nn.Module``: buffers, a tied weight, a padding mask.

    python examples/your_own_module.py

``torch.func.functional_call`` runs a module on parameters that it is given. The module
is not changed, wrapped or subclassed; the same loss in a plain torch loop is the check.
"""

import torch
from torch import nn
from torch.func import functional_call

import zfunc as zf

VOCAB, WIDTH, LENGTH, SAMPLES, STEPS = 50, 32, 12, 16, 20


class Tagger(nn.Module):
    """A small causal model: its output layer is its embedding."""

    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(VOCAB, WIDTH)
        nn.init.normal_(self.embedding.weight, std=0.1)
        self.norm = nn.LayerNorm(WIDTH)
        self.mix = nn.Linear(WIDTH, WIDTH)
        self.head = nn.Linear(WIDTH, VOCAB, bias=False)
        self.head.weight = self.embedding.weight
        past = torch.ones(LENGTH, LENGTH).tril()
        self.register_buffer("average", past / past.sum(1, keepdim=True))

    def forward(self, tokens):
        x = self.embedding(tokens)
        x = x + torch.tanh(self.mix(self.average @ self.norm(x)))
        return self.head(x)


def batch(step):
    """Sequences that count upwards, cut off at random lengths."""
    generator = torch.Generator().manual_seed(step)
    start = torch.randint(VOCAB, (SAMPLES, 1), generator=generator)
    tokens = (start + torch.arange(LENGTH + 1)) % VOCAB
    lengths = torch.randint(1, LENGTH + 1, (SAMPLES, 1), generator=generator)
    return {"tokens": tokens, "mask": (torch.arange(LENGTH) < lengths).float()}


def total_and_weight(logits, batch):
    nll = nn.functional.cross_entropy(
        logits.flatten(0, 1), batch["tokens"][:, 1:].flatten(), reduction="none"
    )
    return (nll * batch["mask"].flatten()).sum(), batch["mask"].sum()


torch.manual_seed(0)
module = Tagger()

# The tied weight is one parameter: named_parameters() names it once, and
# functional_call puts it in both places. So it is stored, sent and updated once.
params = dict(module.named_parameters())
mesh = zf.make_mesh({"data": 1})
# Buffers are constants of the loss. They are closed over. (What has a row per sample,
# such as a mask, goes into the batch, which ranks and microbatches split by rows.)
buffers = {name: b.to(mesh.device) for name, b in module.named_buffers()}


def loss_fn(params, batch):
    logits = functional_call(module, {**params, **buffers}, (batch["tokens"][:, :-1],))
    # Microbatches have unequal numbers of tokens. A mean of their means would be
    # biased; a total and its weight stay exact, over microbatches and over ranks.
    return zf.Mean(*total_and_weight(logits, batch))


step_fn = zf.train_step(
    loss_fn,
    zf.optim.adamw(1e-2, weight_decay=0.1),
    zf.partition(zero=3),
    zf.accumulate(4),
)
state = zf.shard(params, mesh)
ours = []
for step in range(STEPS):
    on_device = {name: x.to(mesh.device) for name, x in batch(step).items()}
    state = step_fn(state, on_device)
    ours.append(float(state.metrics.loss))

# The same in a plain torch loop, which writes into the module.
optimizer = torch.optim.AdamW(module.parameters(), lr=1e-2, weight_decay=0.1)
theirs = []
for step in range(STEPS):
    total, weight = total_and_weight(module(batch(step)["tokens"][:, :-1]), batch(step))
    optimizer.zero_grad()
    (total / weight).backward()
    optimizer.step()
    theirs.append(float((total / weight).detach()))

# Back into a module, for code that expects one. Not strict: the tied weight is there
# under one of its two names, and the buffer is the one that Tagger makes.
trained = Tagger()
trained.load_state_dict(zf.unshard(state).params, strict=False)

apart = max(abs(a - b) / b for a, b in zip(ours, theirs, strict=True))
print(f"{len(params)} parameters, {len(buffers)} buffer, {STEPS} steps")
print(f"first loss {ours[0]:.4f}, last loss {ours[-1]:.4f}")
print(f"largest relative difference from the torch loop: {apart:.1e}")
print(f"tied in the new module: {trained.head.weight is trained.embedding.weight}")
