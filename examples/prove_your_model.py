# SPDX-License-Identifier: Apache-2.0
"""Prove that your own model trains the same sharded and unsharded.

    python examples/prove_your_model.py

hypothesis draws meshes, recipes (stage, optimizer, microbatches, clipping, remat) and
sizes of the model. For each draw all ranks run in this process, and after every step
their parameters, gradients, moments and metrics are compared with those of one rank.
Needs hypothesis: ``pip install -e '.[testing]'``.
"""

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from zfunc.testing import EquivalenceError, Recipe, assert_equivalent, strategies

EXAMPLES = 60


def loss_fn(params, batch):
    """The model to prove: a gated layer, with a loss averaged over samples."""
    x = batch["x"]
    gate = torch.sigmoid(x @ params["gate"] + params["bias"])
    y = (gate * (x @ params["up"])) @ params["down"] * params["scale"]
    return (y - batch["y"]).square().mean()


def wrong_loss_fn(params, batch):
    """The same after a norm over the batch: a sample depends on who else is there."""
    x = batch["x"]
    x = (x - x.mean(0)) / (x.std(0, unbiased=False) + 1)
    return loss_fn(params, {**batch, "x": x})


def parameters(features, hidden, seed=0):
    """float64, in which a wrong factor cannot hide among the roundings."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    return {
        "gate": normal(features, hidden),
        "up": normal(features, hidden),
        "down": normal(hidden, features),
        "bias": normal(hidden),
        "scale": normal(),  # 0-d: nothing to shard, so it stays whole
    }


def batches(samples, features, steps=2):
    """One global batch per step."""
    generator = torch.Generator().manual_seed(samples)
    shape = (2, samples, features)
    pairs = [
        torch.randn(shape, generator=generator, dtype=torch.float64)
        for _ in range(steps)
    ]
    return [{"x": x, "y": y} for x, y in pairs]


tried = []


# derandomize: the same examples on every run. Leave it out to search for new ones.
@settings(max_examples=EXAMPLES, deadline=None, derandomize=True, database=None)
@given(
    recipe=strategies.recipes(weighted=False),
    mesh_shape=strategies.meshes(max_ranks=4, other_axes=False),
    features=st.integers(1, 5),  # most of these do not divide by the ranks
    hidden=st.integers(1, 9),
)
def proof(recipe, mesh_shape, features, hidden):
    # Every rank gets as many samples as there are microbatches, or twice that.
    samples = 2 * mesh_shape["data"] * recipe.num_microbatches
    data = batches(samples, features)
    assert_equivalent(loss_fn, parameters(features, hidden), data, recipe, mesh_shape)
    tried.append((recipe.zero, mesh_shape["data"]))


proof()
stages, ranks = {zero for zero, _ in tried}, {n for _, n in tried}
print(f"sharded is unsharded on {len(tried)} examples, to 1e-9 relative")
print(f"they had stages {sorted(stages)}, data axes of {sorted(ranks)} ranks")

# The other half of a proof is that it can fail.
try:
    recipe = Recipe(zero=2, optimizer="adam")
    assert_equivalent(
        wrong_loss_fn, parameters(3, 4), batches(8, 3), recipe, {"data": 2}
    )
except EquivalenceError as error:
    print(f"the wrong model is refused:\n{error}")
else:
    raise SystemExit("the wrong model was not noticed")
