"""Ten training steps on random tokens, then a stream of two callers: does everything run?"""

from pathlib import Path

import torch
from moshi.models import LMGen

from moshi_ttt import default_registry, inject, load_config

registry = default_registry()
config = load_config(Path(__file__).with_name("tiny.yaml"), registry=registry)
model = registry.host(config.host.qualified_name).load(config.host)
injection = inject(model, config, registry=registry)
injection.freeze_base()

codes = torch.randint(0, 128, (2, 17, 24), generator=torch.Generator().manual_seed(0))
optimizer = torch.optim.AdamW(injection.parameters(), lr=1e-2)
for step in range(10):
    loss = injection.host.losses().total(model, codes)
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    print(f"step {step}: loss {loss.item():.3f}")

generator = LMGen(model)
with torch.no_grad(), generator.streaming(2):
    for frame in codes[:, 9:].unbind(-1):
        generator.step(frame[..., None])
print("streamed", codes.shape[-1], "frames")
