# SPDX-License-Identifier: Apache-2.0
"""Steps and their programs, small, for the tests of the analyses."""

import dataclasses
import functools

import torch

import zfunc as zf
from zfunc.core.tree import tree_leaves
from zfunc.models import gpt
from zfunc.program.backends.aten import compile_graph
from zfunc.testing.memory import peak_live_bytes

CONFIG = gpt.GPTConfig(
    vocab_size=64,
    d_model=32,
    n_layers=2,
    n_heads=4,
    n_kv_heads=2,
    d_ff=64,
    max_seq_len=32,
)
BATCH = 16


def normal(*shape, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator)


def mlp(params, x):
    for layer in params["layers"]:
        x = torch.tanh(x @ layer["w"] + layer["b"])
    return x.square().mean()


def convolutional(params, x):
    x = torch.nn.functional.conv2d(x.view(-1, 2, 4, 4), params["kernel"], padding=1)
    x = torch.nn.functional.max_pool2d(torch.relu(x), 2).flatten(1)
    return torch.nn.functional.gelu(x @ params["w"]).square().mean()


def classifier(params, x):
    x = torch.nn.functional.layer_norm(torch.softmax(x @ params["q"], -1), (48,))
    target = torch.zeros(x.shape[0], dtype=torch.long)
    return torch.nn.functional.cross_entropy(x @ params["w"], target)


def mlp_params(width=32, layers=4):
    return {
        "layers": [
            {"w": normal(width, width, seed=i), "b": normal(width, seed=i)}
            for i in range(layers)
        ]
    }


def tokens():
    generator = torch.Generator().manual_seed(0)
    return {"tokens": torch.randint(0, 64, (BATCH, 17), generator=generator)}


def model(name):
    """(loss, params, batch)"""
    match name:
        case "mlp":
            return mlp, mlp_params(), normal(BATCH, 32)
        case "conv":
            params = {"kernel": normal(8, 2, 3, 3), "w": normal(32, 12)}
            return convolutional, params, normal(BATCH, 32)
        case "classifier":
            params = {"q": normal(32, 48), "w": normal(48, 16)}
            return classifier, params, normal(BATCH, 32)
        case "gpt":
            loss = functools.partial(gpt.loss, config=CONFIG)
            return loss, gpt.init(CONFIG), tokens()
        case "gpt_remat":
            loss = functools.partial(gpt.loss, config=CONFIG, remat=zf.remat)
            return loss, gpt.init(CONFIG), tokens()
    raise ValueError(name)


@dataclasses.dataclass(frozen=True)
class Setting:
    """How a model is trained."""

    zero: int = 3
    microbatches: int = 1
    precision: str | None = None
    clip: bool = False

    def tx(self):
        tx = zf.optim.adamw(1e-2)
        clip = zf.optim.clip_by_global_norm(1.0)
        return zf.optim.chain(clip, tx) if self.clip else tx

    def step(self, loss):
        transforms = [zf.partition(zero=self.zero)]
        if self.microbatches > 1:
            transforms.append(zf.accumulate(self.microbatches))
        if self.precision:
            transforms.append(zf.precision(self.precision))
        return zf.train_step(loss, self.tx(), *transforms)

    def state(self, params, mesh):
        spec = zf.P() if self.zero == 0 else None
        return zf.shard(params, mesh, tx=self.tx(), spec=spec)


def abstract_program(loss, params, batch, setting, num_ranks, **options):
    """The program of one rank of ``num_ranks``, from shapes alone."""
    fake_params, fake_batch = zf.abstract((params, batch))
    mode = torch._guards.detect_fake_mode(tree_leaves(fake_params))
    with mode:
        state = setting.state(fake_params, zf.AbstractMesh({"data": num_ranks}))
    return zf.jit(setting.step(loss), **options).lower(state, fake_batch)


def zero3():
    """The program of the golden file: two layers, four ranks, two microbatches."""
    setting = Setting(zero=3, microbatches=2)
    return abstract_program(mlp, mlp_params(8, 2), normal(4, 8), setting, 4)


def as_donated(program, donated):
    """The program that takes over nothing, the state, or the batch too."""
    paths = {
        path
        for path in program.inputs
        if donated == "all" or (donated == "state" and not path.startswith("batch"))
    }
    return dataclasses.replace(program, donated=frozenset(paths))


def inputs_of(state, batch):
    """New tensors for a program's inputs, in its order."""
    state = state.replace(grads=None)
    return [x.clone() for x in tree_leaves((state, batch))]


def measured_peak(program, tensors):
    """The most bytes alive while the aten backend runs a program on its inputs.

    The list is used up; what the program does not own is kept here.
    """
    kept = [  # constants, the last inputs, have no tensor here
        x
        for x, path in zip(tensors, program.inputs, strict=False)
        if path not in program.donated
    ]
    run = program.run_by(compile_graph)
    _, peak_bytes = peak_live_bytes(
        lambda args, constants: run(args), tensors, program.constants, donated=True
    )
    del kept
    return peak_bytes
