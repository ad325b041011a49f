#!/usr/bin/env -S torchrun --nproc-per-node 2
# SPDX-License-Identifier: Apache-2.0
# isort: off
import zfunc.compat as deepspeed
import torch
from torch import nn


class SimpleModel(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(1024, 10)

    def forward(self, x):
        return self.linear(x)


config = {
    "train_micro_batch_size_per_gpu": 16,
    "optimizer": {"type": "AdamW", "params": {"lr": 1e-3}},
    "fp16": {"enabled": True, "initial_scale_power": 12},
    "zero_optimization": {"stage": 2},
}
model = SimpleModel()
model_engine, optimizer, _, _ = deepspeed.initialize(
    model=model, model_parameters=model.parameters(), config=config
)
criterion = nn.CrossEntropyLoss()
torch.manual_seed(model_engine.local_rank)
batches = [(torch.randn(16, 1024), torch.randint(0, 10, (16,))) for _ in range(4)]
for step in range(60):
    inputs, labels = batches[step % len(batches)]
    inputs = inputs.to(model_engine.device).half()
    labels = labels.to(model_engine.device)
    outputs = model_engine(inputs)
    loss = criterion(outputs, labels)
    model_engine.backward(loss)
    model_engine.step()
    if model_engine.local_rank == 0 and step % 10 == 9:
        print(f"step {step + 1} loss {loss.item():.3f}")
