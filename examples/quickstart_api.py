"""The quickstart with the Python API, no YAML: a small Moshi trained on real speech, then streamed with live state.

python examples/quickstart_api.py [STEPS] [FOLDER]
"""

import sys

import torch

from moshi_ttt import TTTMLPConfig, inject, save_adapter
from moshi_ttt.apps.quickstart.data import Codec, load_speech
from moshi_ttt.apps.quickstart.evaluate import compare, evaluate
from moshi_ttt.apps.quickstart.setup import run_config
from moshi_ttt.apps.quickstart.stream import stream_recording
from moshi_ttt.apps.quickstart.train import SpeechSegments, train
from moshi_ttt.configs.sections import StreamConfig
from moshi_ttt.hosts.moshi.loading import resolve_repo
from moshi_ttt.hosts.moshi.tiny import speech_files

steps, folder = int(sys.argv[1]) if len(sys.argv) > 1 else 120, sys.argv[2] if len(sys.argv) > 2 else "my-adapter"
torch.set_num_threads(1)  # the tensors of so small a model are not worth sharing
bundle = resolve_repo("builtin:tiny")
model = bundle.load_lm(dtype=torch.float32)
codec = Codec.of(model, bundle.load_mimi(), bundle.tokenizer())
speech = load_speech(codec, speech_files())  # real recordings as codes; the longest is held out

injection = inject(model, TTTMLPConfig(layers="1,3", chunk=16))
options = run_config(max_steps=steps)
train(model, injection, SpeechSegments(codec, speech, options).batches(), options)
save_adapter(injection, folder, training_step=steps)

document = codec.document([speech.held_out])
on, off = (evaluate(model, injection.host, document, name=f"updates {u}", updates=u) for u in (True, False))
print(f"nats per token: updates on {on.mean:.4f}, off {off.mean:.4f}, saved {compare(on, off).mean:+.4f}")

streamed = stream_recording(model, codec, speech.held_out.audio[:, :100], StreamConfig(), on_frame=lambda frame: None)
print(f"{streamed.median_ms:.0f} ms a frame of {streamed.frame_ms:.0f} ms; fast weights moved by", {
    str(site): f"{100 * values[-1]:.1f}%" for site, values in streamed.change.items()
})  # fmt: skip
