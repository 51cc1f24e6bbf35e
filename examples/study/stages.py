"""The study, stage by stage, each by commands that users have: what is there already is not made again.

OUT/encoded/{train,valid,test,unseen}   tokens of the recordings; unseen: voices that nothing is trained on
OUT/twice, OUT/shuffled/{train,valid}   clips presented twice, in order and in random order
OUT/seed_0/base                         a small Moshi with a short attention, trained on the same recordings
OUT/seed_0/NAME/0, 1, ...               each arm's candidates; those of the first seed decide
OUT/choices.json                        which candidate was best on the validation recordings
OUT/seed_0/{recall,context}_{test,unseen}, OUT/ablations   evaluations
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from safetensors.torch import save_file

from moshi_ttt.core.atomic import atomic_file
from moshi_ttt.hosts.moshi.tiny import random_tiny_lm, tiny_config
from moshi_ttt.training.logs import METRICS
from study.jobs import Job, StudyError, run_jobs
from study.material import presented_twice, shuffled_twice
from study.plan import MODEL, REFERENCES, Arm, Scale

CONFIG = "train-cpu"
SPLITS = ("train", "valid", "test")
GROUPS = ("test", "unseen")
"""What is reported on: other recordings of the voices that were trained on; and voices that were not."""


@dataclass(frozen=True, kw_only=True)
class Study:
    """Where everything is, and how large.

    Attributes:
        known, unseen: folders with train.jsonl, valid.jsonl and test.jsonl; of the unseen all are for testing.
        at_once: commands run at a time.
        threads: processor threads of each; see ``run_jobs``.
    """

    out: Path
    known: tuple[Path, ...]
    unseen: tuple[Path, ...]
    scale: Scale
    arms: tuple[Arm, ...]
    ablations: tuple[Arm, ...]
    at_once: int
    say: Callable[[str], None]
    threads: int | None = None

    # ---- what is presented

    def manifests(self) -> dict[str, list[Path]]:
        """What each split is made of. Raises StudyError when some of it is not there."""
        sources = {split: [folder / f"{split}.jsonl" for folder in self.known] for split in SPLITS}
        sources["unseen"] = [folder / f"{split}.jsonl" for folder in self.unseen for split in SPLITS]
        if missing := [str(path) for paths in sources.values() for path in paths if not path.is_file()]:
            raise StudyError(
                f"There is no {', '.join(missing)}. scripts/fetch_speech.py makes such folders; `make study` calls it."
            )
        return sources

    def encode(self) -> None:
        """The tokens of all recordings, and the clips made of them."""
        sources = self.manifests()
        self._run(
            Job(
                name=f"encode {name}",
                arguments=(
                    "encode", CONFIG, "--out", str(self.encoded(name)), f"duration_sec={self.scale.segment_seconds}",
                    f"moshi_paths.config_path={self.base_config()}",
                    "data.transcripts=optional", f"data.train_data={','.join(map(str, paths))}",
                ),
                result=self.encoded(name),
            )
            for name, paths in sources.items() if paths
        )  # fmt: skip
        for split in SPLITS[:2]:
            step = self.scale.clip // 2 if split == "train" else self.scale.clip
            shape = {"frames": self.scale.clip, "step": step}
            if not (place := self.out / "twice" / split).exists():
                presented_twice(self.encoded(split), place, **shape)
            if not (place := self.out / "shuffled" / split).exists():
                shuffled_twice(self.encoded(split), place, **shape, seed=0)

    def encoded(self, name: str) -> Path:
        return self.out / "encoded" / name

    def training_material(self) -> str:
        """Clips presented twice, shuffled ones twice as often as others, and a recording to every fifty of them."""
        weights = {"shuffled": 0.6, "twice": 0.3, "encoded": 0.02}
        return ",".join(f"{self.out / kind / 'train'}:{weight}" for kind, weight in weights.items())

    def validation_material(self) -> str:
        """Clips presented twice, and as many shuffled ones."""
        return ",".join(str(self.out / kind / "valid") for kind in ("shuffled", "twice"))

    # ---- what is trained

    def base_config(self) -> Path:
        """The config of a Moshi smaller than the tiny one, with a short attention."""
        path = self.out / "base.json"
        self.out.mkdir(parents=True, exist_ok=True)
        with atomic_file(path) as temporary:
            temporary.write_text(
                json.dumps({**tiny_config(), **MODEL, "context": self.scale.context}, indent=1), "utf-8"
            )
        return path

    def random_weights(self, seed: int) -> Path:
        """What the base model of a seed starts from."""
        path = self.out / f"seed_{seed}" / "random.safetensors"
        path.parent.mkdir(parents=True, exist_ok=True)
        if not path.exists():
            values = json.loads(self.base_config().read_text(encoding="utf-8"))
            options = {name: values[name] for name in values if name != "model_type" and not name.endswith("_name")}
            model = random_tiny_lm(seed=seed, **options)
            with atomic_file(path) as temporary:
                save_file({name: tensor.contiguous() for name, tensor in model.state_dict().items()}, temporary)
        return path

    def train_bases(self) -> None:
        """The base model of each seed, trained on the recordings as they are."""
        config = f"moshi_paths.config_path={self.base_config()}"
        self._run(
            self._training(
                f"base, seed {seed}", self.base(seed), seed, self.scale.base_steps,
                (
                    config, f"moshi_paths.moshi_path={self.random_weights(seed)}", "ttt=[]", "full_finetuning=true",
                    "save_adapters=false", "carry_state=false", "optim.lr=3e-3",
                    f"data.train_data={self.encoded('train')}",
                    f"data.eval_data={self.encoded('valid')}",
                ),
            )
            for seed in self.scale.seeds
        )  # fmt: skip

    def tune(self) -> None:
        """Every candidate of every arm, with the first seed; the choices are kept."""
        first = self.scale.seeds[0]
        self._run(
            self.arm_job(arm, first, number)
            for arm in self.arms for number in range(len(arm.candidates))
        )  # fmt: skip
        losses = {
            arm.name: [self.validation_loss(arm, first, number) for number in range(len(arm.candidates))]
            for arm in self.arms
        }
        chosen = {name: tried.index(min(tried)) for name, tried in losses.items()}
        with atomic_file(self.out / "choices.json") as temporary:
            temporary.write_text(json.dumps({"chosen": chosen, "validation_loss": losses}, indent=1), encoding="utf-8")

    def train_arms(self) -> None:
        """The chosen candidates with every seed."""
        self._run(
            self.arm_job(arm, seed, self.chosen(arm))
            for seed in self.scale.seeds for arm in self.arms
        )  # fmt: skip

    def train_ablations(self) -> None:
        """Each with the first seed."""
        self._run(self.arm_job(arm, self.scale.seeds[0], 0) for arm in self.ablations)

    def chosen(self, arm: Arm) -> int:
        """The number of an arm's candidate; an ablation has one."""
        if len(arm.candidates) == 1:
            return 0
        choices = json.loads((self.out / "choices.json").read_text(encoding="utf-8"))
        return int(choices["chosen"][arm.name])

    def base(self, seed: int) -> Path:
        return self.out / f"seed_{seed}" / "base"

    def run_dir(self, arm: Arm, seed: int, number: int) -> Path:
        return self.out / f"seed_{seed}" / arm.folder / str(number)

    def checkpoint(self, run_dir: Path, steps: int) -> Path:
        return run_dir / "checkpoints" / f"checkpoint_{steps:06d}"

    def arm_job(self, arm: Arm, seed: int, number: int) -> Job:
        """Training of an arm on the base model of its seed."""
        files = self.checkpoint(self.base(seed), self.scale.base_steps) / "consolidated"
        changes = (
            f"moshi_paths.config_path={files / 'config.json'}",
            f"moshi_paths.moshi_path={files / 'consolidated.safetensors'}", "carry_state=true",
            f"data.train_data={self.training_material()}", f"data.eval_data={self.validation_material()}",
            *arm.changes, *arm.candidates[number],
        )  # fmt: skip
        name = f"{arm.name}, seed {seed}, candidate {number}"
        return self._training(name, self.run_dir(arm, seed, number), seed, self.scale.steps, changes)

    def _training(self, name: str, run_dir: Path, seed: int, steps: int, changes: Sequence[str]) -> Job:
        common = (
            f"run_dir={run_dir}", "resume=true", f"seed={seed}", f"max_steps={steps}", "eval_freq=0",
            f"ckpt_freq={max(1, steps // 3)}", "num_ckpt_keep=1", f"batch_size={self.scale.batch}",
            f"duration_sec={self.scale.segment_seconds}", "data.transcripts=optional", "device=cpu",
        )  # fmt: skip
        # The last thing a training does is to evaluate and to write its last checkpoint, which is then whole.
        return Job(
            name=f"train {name}", arguments=("train", CONFIG, *common, *changes), result=self.checkpoint(run_dir, steps)
        )

    def validation_loss(self, arm: Arm, seed: int, number: int) -> float:
        """Nats per audio token of the validation material, after the last step."""
        lines = (self.run_dir(arm, seed, number) / METRICS).read_text(encoding="utf-8").splitlines()
        losses = [record["nats_audio"] for line in lines if (record := json.loads(line))["kind"] == "eval"]
        return float(losses[-1])

    # ---- what comes of it

    def evaluate(self) -> None:
        """Recall and loss by position of the chosen arms of each seed, once, on recordings not used so far."""
        groups = [group for group in GROUPS if self.encoded(group).exists()]
        self._run(
            self._evaluation(
                kind, seed, {each: self.chosen(each) for each in self.arms}, group,
                self.out / f"seed_{seed}" / f"{kind}_{group}",
            )
            for seed in self.scale.seeds for group in groups for kind in ("recall", "context")
        )  # fmt: skip

    def evaluate_ablations(self) -> None:
        """Recall on the validation recordings, of the ablations and of what they change, with the first seed."""
        if self.ablations:
            references = [arm for arm in REFERENCES if arm in self.arms]
            compared = dict.fromkeys([*references, *self.ablations], 0)
            self._run([self._evaluation("recall", self.scale.seeds[0], compared, "valid", self.out / "ablations")])

    def _evaluation(self, kind: str, seed: int, compared: Mapping[Arm, int], group: str, place: Path) -> Job:
        """Of arms and the number of a candidate of each."""
        run_dirs = {arm: self.run_dir(arm, seed, number) for arm, number in compared.items()}
        adapters: list[str] = []
        for arm, run_dir in run_dirs.items():
            adapters += ["-a", f"{arm.name}={self.checkpoint(run_dir, self.scale.steps)}"]
        config = next(reversed(run_dirs.values())) / "args.yaml"  # of any of them: they share the base model
        options = {
            "recall": ("recall", "--frames", str(self.scale.clip), "--clips", str(self.scale.clips)),
            "context": ("long-context", "--segments", str(self.scale.segment), "--window", str(self.scale.window)),
        }  # fmt: skip
        return Job(
            name=f"evaluate {kind} {group}, seed {seed}",
            arguments=(
                "evaluate", *options[kind], str(config), "--data", str(self.encoded(group)), *adapters,
                "--batch-size", "64", "--out", str(place),
            ),
            result=place,
        )  # fmt: skip

    def _run(self, jobs: Iterable[Job]) -> None:
        run_jobs(list(jobs), self.out / "logs", at_once=self.at_once, say=self.say, threads=self.threads)
