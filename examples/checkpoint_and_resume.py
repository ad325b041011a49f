# SPDX-License-Identifier: Apache-2.0
"""Stop a training, and go on from its checkpoint to the bits of one that never stopped.

    python examples/checkpoint_and_resume.py

A checkpoint is the state and the cursor of the data, in a directory that is complete
or absent. It knows nothing of the ZeRO stage or of the number of ranks, so both may be
others when the training goes on.
"""

import functools
import tempfile

import torch

import zfunc as zf
from zfunc.models import gpt

SEQ_LEN, BATCH, STEPS, STOP = 32, 8, 12, 5

config = zf.models.GPTConfig(
    d_model=32, n_layers=2, n_heads=2, n_kv_heads=2, d_ff=64, max_seq_len=SEQ_LEN
)
mesh = zf.make_mesh({"data": 1})
# Text that every machine with Python has.
text = zf.data.ByteDataset(zf.data.standard_library_files()[:20])
loader = zf.data.Loader(text, seq_len=SEQ_LEN, global_batch=BATCH)

schedule = zf.optim.warmup_cosine(3e-3, warmup_steps=3, total_steps=STEPS)
tx = zf.optim.chain(zf.optim.clip_by_global_norm(1.0), zf.optim.adamw(schedule))
loss_fn = functools.partial(gpt.loss, config=config, remat=zf.remat)


def train(state, cursor, stop, zero):
    """Training is a fold over batches: all that it remembers are its two arguments."""
    step = zf.train_step(loss_fn, tx, zf.partition(zero=zero))
    while int(state.step) < stop:
        batch, cursor = loader.next(cursor)
        state = step(state, {"tokens": batch["tokens"].to(mesh.device)})
    return state, cursor


def begin():
    # tx= makes the moments now. A restored state has some, and `like` must match it.
    return zf.shard(gpt.init(config, seed=0), mesh, tx=tx), zf.data.Cursor(seed=7)


whole, _ = train(*begin(), stop=STEPS, zero=3)

with tempfile.TemporaryDirectory() as root:
    state, cursor = train(*begin(), stop=STOP, zero=3)
    path = zf.checkpoint.save(root, state, cursor=cursor, meta={"run": "example"})
    print(f"saved {path.name}: {', '.join(sorted(f.name for f in path.iterdir()))}")

    # Another process would start here. `like` says where the tensors go: the values in
    # it do not matter, so another seed will do.
    like = zf.shard(gpt.init(config, seed=1), mesh, tx=tx)
    state, stored, meta = zf.checkpoint.restore(root, like)
    cursor = zf.data.Cursor(**stored)
    print(f"restored step {int(state.step)} of run {meta['run']!r}, {cursor}")

# The rest under another stage. At one microbatch the stages agree to the last bit.
resumed, _ = train(state, cursor, stop=STEPS, zero=1)

same = all(map(torch.equal, zf.tree_leaves(resumed), zf.tree_leaves(whole)))
print(f"loss at step {STEPS}: {float(resumed.metrics.loss):.6f}")
print(f"equal to the run that was not interrupted, to the last bit: {same}")
