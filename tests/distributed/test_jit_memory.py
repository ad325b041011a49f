# SPDX-License-Identifier: Apache-2.0
"""L14 under jit: ZeRO-3 memory without remat and without a word in the loss."""

import pytest
import torch
import torch.distributed as dist

import zfunc as zf
from zfunc.program.passes import DEFAULT
from zfunc.testing.memory import peak_live_bytes

# layers x (d -> 4d -> d), the sizes of the bound below.
LAYERS, WIDTH, WORLD = 12, 256, 4
# gloo's threads may let go of a message's tensors some moments after its wait: of
# several runs the lowest is the program's own peak.
RUNS = 3


def loss(params, x):
    for p in params:
        x = x + torch.tanh(x @ p["up"]) @ p["down"]
    return (x**2).mean()


def peaks_of_a_step(batch):
    mesh = zf.make_mesh({"data": dist.get_world_size()})
    generator = torch.Generator().manual_seed(0)
    params = [
        {
            "up": torch.randn(WIDTH, 4 * WIDTH, generator=generator) * 0.05,
            "down": torch.randn(4 * WIDTH, WIDTH, generator=generator) * 0.05,
        }
        for _ in range(LAYERS)
    ]
    tx = zf.optim.adamw(1e-3)
    step = zf.train_step(loss, tx, zf.partition(zero=3))
    x = torch.randn(batch, WIDTH)
    peaks = {}
    for name, passes in (("default", DEFAULT), ("none", ())):
        jitted = zf.jit(step, passes=passes)
        found = []
        for _ in range(RUNS):
            box = [jitted(zf.shard(params, mesh, tx=tx), x)]
            found.append(peak_live_bytes(jitted, box.pop(), x, donated=True)[1])
        peaks[name] = min(found)
    return peaks, sum(x.numel() for x in zf.tree_leaves(params))


@pytest.mark.parametrize("batch", [16, 1024])
def test_live_memory_of_zero_3_without_remat(ranks, batch):
    r"""Peak <= 1.1 x (16 Psi / n + saved activations + two layers gathered).

    What plain autograd saves of a layer: its input and the tanh, (d + 4d) values per
    sample. At 16 samples the state is nearly all, at 1024 the activations.
    """
    for peaks, num_params in ranks(WORLD).run(peaks_of_a_step, batch):
        state_bytes = 16 * num_params / WORLD
        saved_bytes = 4 * LAYERS * batch * 5 * WIDTH
        layer_bytes = 4 * num_params / LAYERS
        bound = state_bytes + saved_bytes + 2 * layer_bytes
        print(f"{batch} samples, MB: {bound / 1e6:.1f} bound, {peaks}")
        assert peaks["default"] <= 1.1 * bound
        assert peaks["none"] > 1.2 * bound
