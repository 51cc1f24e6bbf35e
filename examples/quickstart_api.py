"""A training and an evaluation with the Python API, no YAML: TTT layers in a small Moshi, on the speech that ships.

python examples/quickstart_api.py [STEPS] [FOLDER]
"""

import sys

import torch

from moshi_ttt import MoshiHostConfig, TTTMLPConfig, inject, load_model, save_adapter
from moshi_ttt.configs.fit import GroupRates, OptimConfig
from moshi_ttt.data.codec import SpeechCodec
from moshi_ttt.data.corpus import open_corpus
from moshi_ttt.data.dataset import TrainingData, loader
from moshi_ttt.evaluation import long_context
from moshi_ttt.evaluation.documents import read_documents
from moshi_ttt.evaluation.models import ModelUnderTest
from moshi_ttt.hosts.moshi.compatibility import require_trainable
from moshi_ttt.training import FitConfig, TrainedModel, Trainer, start

FRAMES = 192  # 15 s a segment, three times what attention sees; a frame is 80 ms
steps, folder = int(sys.argv[1]) if len(sys.argv) > 1 else 120, sys.argv[2] if len(sys.argv) > 2 else "my-adapter"
torch.set_num_threads(1)  # the tensors of so small a model are not worth sharing

host = MoshiHostConfig(hf_repo="builtin:tiny", dtype="float32")
model = load_model(host)
ttt = inject(model, TTTMLPConfig(layers="1,3", chunk=16))
ttt.freeze_base()
ttt.print_summary()

# Recordings to batches of codes [B, Q, T], at Mimi's 12.5 frames a second.
codec = SpeechCodec.load(host, "cpu", require=require_trainable)
corpus = open_corpus("builtin:speech", codec, frames=FRAMES, transcripts="none")
data = TrainingData(corpus, batch_size=2, microbatches=1, rank=0, world_size=1, seed=0, shuffle=True, carry=False)

rates = OptimConfig(schedule="cosine", lr=1e-3, weight_decay=0.01, lr_groups=GroupRates(gates=1e-2))
config = FitConfig(max_steps=steps, batch_size=2, optim=rates)
roles = ttt.plan.policy.roles(torch.float32)
with start("cpu", None) as runtime:  # this process alone; torchrun starts several
    trainer = Trainer(TrainedModel(model, ttt, roles, ttt.host.losses(text=0.1)), config, runtime)
    outcome = trainer.fit(iter(loader(data, start_step=0, num_workers=0)))
save_adapter(ttt, folder, training_step=outcome.step)
model.eval()

# A held-out recording, from what attention does not see on, with test-time updates and without.
documents = read_documents("builtin:held-out", codec, layout="files", transcripts="none", limit=None)
options = long_context.Options(
    window=64, every=64, batch_size=1, conditions=("updates on", "updates off"), segments=FRAMES
)
result = long_context.evaluate([ModelUnderTest(name="TTT", model=model, injection=ttt, facts={})], documents, options)
on, off = (result.curve("TTT", condition, "audio") for condition in options.conditions)
print(
    f"audio, nats per token after frame {result.context}: updates on {result.loss(on).value:.4f}, "
    f"off {result.loss(off).value:.4f}, saved {result.saved(on, off).value:+.4f}"
)
