"""A layer that learns at test time where the future may be heard: a denoiser, with and without it.

    python examples/bidirectional_audio.py

The denoiser is trained first and then frozen; the layers train on top of it.
"""

import sys

import torch

from moshi_ttt import GateConfig, TTTMLPConfig, inject, load_model
from moshi_ttt.hosts.audio.host import AudioHostConfig
from moshi_ttt.hosts.audio.losses import denoising_loss

model = load_model(AudioHostConfig())
steps = int(sys.argv[1]) if len(sys.argv) > 1 else 200


def train(parameters, steps, seed):
    optimizer = torch.optim.AdamW(parameters, lr=2e-3)
    for step in range(steps):
        optimizer.zero_grad()
        denoising_loss(model, batch=8, frames=64, seed=seed + step).backward()
        optimizer.step()


@torch.no_grad()
def held_out():
    return sum(float(denoising_loss(model, batch=16, frames=64, seed=10_000 + i)) for i in range(4)) / 4


train(model.parameters(), steps, seed=0)
base = held_out()
injection = inject(model, TTTMLPConfig(chunk=16, bidirectional=True, gate=GateConfig(init=0.1)))
injection.freeze_base()
train(injection.parameters(), steps, seed=5_000)
learned = held_out()
with injection.host.updates(model, False):
    frozen = held_out()
print(f"held-out error: base {base:.4f}, with the layers {learned:.4f}, with their learning switched off {frozen:.4f}")
injection.remove()
assert held_out() == base
