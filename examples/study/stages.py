"""The study, stage by stage, each by commands that users have: what is there already is not made again.

OUT/encoded/{train,valid,valid_unseen,test,test_unseen}   tokens of the recordings; nothing is trained on unseen voices
OUT/twice/train, OUT/shuffled/train     clips presented twice, in order and in random order
OUT/seed_0/base                         a small Moshi with a short attention, trained on the same recordings
OUT/seed_0/NAME                         the training run of each arm
OUT/seed_0/measured/GROUP/NAME.json     what was measured of it; GROUP is a name in encoded
OUT/seed_0/lasting/GROUP/NAME           how long it lasts
OUT/choices.json                        the volume of each arm, by the validation recordings of the first seed
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors.torch import save_file

from moshi_ttt.core.atomic import atomic_file
from moshi_ttt.evaluation.models import CONDITIONS
from moshi_ttt.hosts.moshi.tiny import bundle_folder, random_tiny_lm, tiny_config
from study.jobs import Job, StudyError, run_jobs
from study.material import presented_twice, shuffled_twice
from study.measure import Task
from study.plan import LORA, MODEL, Arm, Scale

CONFIG = "train-cpu"
SPLITS = ("train", "valid", "test")
VALIDATION = ("valid", "valid_unseen")
TEST = ("test", "test_unseen")
"""Groups of recordings: voices that were trained on, other recordings of them; and voices that were not."""
HOUR = "hour"
"""All of them, for one long stream."""
ALONE = ("updates on", 1.0)
"""The one setting of a model without a memory."""
MEASURE = (str(Path(__file__).with_name("run_measure.py")),)


@dataclass(frozen=True, kw_only=True)
class Study:
    """Where everything is, and how large.

    Attributes:
        known: folders with train.jsonl, valid.jsonl and test.jsonl.
        unseen_valid, unseen: the same, of voices that nothing is trained on; all of them are for validation, and for
            testing.
        at_once: commands run at a time.
        threads: processor threads of each; see ``run_jobs``.
    """

    out: Path
    known: tuple[Path, ...]
    unseen_valid: tuple[Path, ...]
    unseen: tuple[Path, ...]
    scale: Scale
    arms: tuple[Arm, ...]
    at_once: int
    say: Callable[[str], None]
    threads: int | None = None

    @property
    def judged(self) -> tuple[Arm, ...]:
        """The arms that are tested."""
        return tuple(arm for arm in self.arms if arm.judged)

    # ---- what is presented

    def manifests(self) -> dict[str, list[Path]]:
        """What each split is made of. Raises StudyError when some of it is not there."""
        sources = {split: [folder / f"{split}.jsonl" for folder in self.known] for split in SPLITS}
        for name, folders in zip(("valid_unseen", "test_unseen"), (self.unseen_valid, self.unseen), strict=True):
            sources[name] = [folder / f"{split}.jsonl" for folder in folders for split in SPLITS]
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
        shape = {"frames": self.scale.clip, "step": self.scale.clip // 2}
        if not (place := self.out / "twice" / "train").exists():
            presented_twice(self.encoded("train"), place, **shape)
        if not (place := self.out / "shuffled" / "train").exists():
            shuffled_twice(self.encoded("train"), place, **shape, seed=0)

    def encoded(self, name: str) -> Path:
        return self.out / "encoded" / name

    def training_material(self) -> str:
        """Clips presented twice, two thirds of them shuffled; and whole recordings, about half of all segments."""
        weights = {"shuffled": 0.4, "twice": 0.2, "encoded": 0.1}
        return ",".join(f"{self.out / kind / 'train'}:{weight}" for kind, weight in weights.items())

    # ---- what is trained

    def base_config(self) -> Path:
        """The config of the tiny Moshi, or of a smaller one, with a short attention."""
        path = self.out / "base.json"
        model = {} if self.scale.shipped else MODEL
        self.out.mkdir(parents=True, exist_ok=True)
        with atomic_file(path) as temporary:
            temporary.write_text(
                json.dumps({**tiny_config(), **model, "context": self.scale.context}, indent=1), "utf-8"
            )
        return path

    def first_weights(self, seed: int) -> Path:
        """What the base model of a seed starts from: what ships, or random ones."""
        if self.scale.shipped:
            return bundle_folder() / str(tiny_config()["moshi_name"])
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
                    config, f"moshi_paths.moshi_path={self.first_weights(seed)}", "ttt=[]", "full_finetuning=true",
                    "save_adapters=false", "carry_state=false", "optim.lr=3e-3",
                    f"data.train_data={self.encoded('train')}",
                ),
            )
            for seed in self.scale.seeds
        )  # fmt: skip

    def train_arms(self) -> None:
        """Every judged arm with every seed, a seed after the other; those that need the LoRA after the others."""
        for seed in self.scale.seeds:
            for on_lora in (False, True):
                self._run(self.arm_job(arm, seed) for arm in self.judged if arm.on_lora == on_lora)

    def base(self, seed: int) -> Path:
        return self.out / f"seed_{seed}" / "base"

    def run_dir(self, arm: Arm, seed: int) -> Path:
        return self.out / f"seed_{seed}" / arm.folder

    def checkpoint(self, run_dir: Path, steps: int) -> Path:
        return run_dir / "checkpoints" / f"checkpoint_{steps:06d}"

    def arm_job(self, arm: Arm, seed: int) -> Job:
        """Training of an arm on the base model of its seed, or on that with a LoRA merged into it."""
        files = self.checkpoint(self.base(seed), self.scale.base_steps) / "consolidated"
        config = files / "config.json"
        if arm.on_lora:  # the LoRA lies beside its config, and is merged where the model is loaded
            (lora,) = (each for each in self.arms if each.name == LORA)
            config = self.checkpoint(self.run_dir(lora, seed), self.scale.steps) / "consolidated" / "config.json"
        changes = (
            f"moshi_paths.config_path={config}",
            f"moshi_paths.moshi_path={files / 'consolidated.safetensors'}", "carry_state=true",
            f"data.train_data={self.training_material()}", *arm.changes,
        )  # fmt: skip
        name = f"{arm.name}, seed {seed}"
        return self._training(name, self.run_dir(arm, seed), seed, self.scale.steps, changes)

    def _training(self, name: str, run_dir: Path, seed: int, steps: int, changes: Sequence[str]) -> Job:
        common = (
            f"run_dir={run_dir}", "resume=true", f"seed={seed}", f"max_steps={steps}", "do_eval=false",
            f"ckpt_freq={max(1, steps // 3)}", "num_ckpt_keep=1", f"batch_size={self.scale.batch}",
            f"duration_sec={self.scale.segment_seconds}", "data.transcripts=optional", "device=cpu",
        )  # fmt: skip
        # The last thing a training does is to write its last checkpoint, which is then whole.
        return Job(
            name=f"train {name}", arguments=("train", CONFIG, *common, *changes), result=self.checkpoint(run_dir, steps)
        )

    # ---- what is measured

    def groups(self, names: Sequence[str]) -> list[str]:
        """Those of ``names`` that there are recordings of."""
        return [name for name in names if self.encoded(name).exists()]

    def validate(self) -> None:
        """The first seed on the validation recordings, at every volume; its open questions are trained first."""
        controls = [("updates off", 1.0), ("memory of another", 1.0)]
        settings = [("updates on", volume) for volume in self.scale.volumes]
        seed = self.scale.seeds[0]
        self._run(self.arm_job(arm, seed) for arm in self.arms if not arm.judged)
        self._run(
            self.measuring(seed, arm, group, [*settings, *controls] if arm is not None and arm.kind else [ALONE])
            for arm in (None, *self.arms) for group in self.groups(VALIDATION)
        )  # fmt: skip

    def test(self, choices: Mapping[str, Any]) -> None:
        """Every seed on the test recordings: each arm at its volume and at 1, then the chosen arms for longer.

        How long a memory lasts is measured of the first seed alone: it takes as long as all the rest.
        """
        chosen = set(choices["arms"].values())
        jobs, later = [], []
        for seed in self.scale.seeds:
            for arm in (None, *self.judged):
                memory = arm is not None and arm.kind is not None
                volume = float(choices["volumes"][arm.name]) if arm is not None and memory else 1.0
                every = arm is None or arm.name in chosen
                longer = every and self.scale.longer
                settings = self._test_settings(volume, every=every) if memory else [ALONE]
                kinds = ("once", "recall", "held") if longer else ("once", "recall")
                volumes = (volume,) if arm is None or arm.beside_lora else tuple(sorted({volume, 1.0}))
                jobs += [self.measuring(seed, arm, group, settings, kinds, volumes) for group in self.groups(TEST)]
                if longer or (self.scale.longer and not memory):
                    later.append(self.measuring(seed, arm, HOUR, [], ("hour",), volumes))
                if arm is not None and longer and not arm.beside_lora and seed == choices["seed"]:
                    later += [self.lasting(seed, arm, group, (volume,)) for group in self.groups(TEST)]
        self._run([*jobs, *later])

    def _test_settings(self, volume: float, *, every: bool) -> list[tuple[str, float]]:
        """The controls at a volume, and updates enabled at it and at 1; where ``every``, at every volume."""
        settings = [(condition, volume) for condition in CONDITIONS if every or condition != "memory reset"]
        settings += [(CONDITIONS[0], each) for each in (1.0, *(self.scale.volumes if every else ()))]
        return list(dict.fromkeys(settings))

    def measured(self, seed: int, arm: Arm | None, group: str) -> Path:
        """The file of ``measuring``; the base model is no arm."""
        name = "base" if arm is None else arm.folder
        return self.out / f"seed_{seed}" / "measured" / group / f"{name}.json"

    def measuring(
        self, seed: int, arm: Arm | None, group: str, settings: Sequence[tuple[str, float]],
        kinds: Sequence[str] = ("once", "recall"), longer: Sequence[float] = (),
    ) -> Job:  # fmt: skip
        """Of one arm, or of the base model, on one group; ``measure.Task`` says what the arguments are.

        The long stream is made of the test recordings and of the validation recordings.
        """
        scale, out = self.scale, self.measured(seed, arm, group)
        names = self.groups((*TEST, *VALIDATION)) if group == HOUR else [group]
        task = Task(
            config=str(self.run_dir(arm or self.arms[0], seed) / "args.yaml"),
            data=",".join(str(self.encoded(name)) for name in names),
            name="base" if arm is None else arm.name,
            adapter=None if arm is None else str(self.checkpoint(self.run_dir(arm, seed), scale.steps)),
            settings=settings, kinds=kinds, longer=longer, frames=scale.clip, clips=scale.clips, least=scale.least,
            buckets=scale.buckets, held=scale.held, hour=scale.hour, out=str(out),
        )  # fmt: skip
        return Job(
            name=f"measure {task.name}, {group}, seed {seed}", arguments=(task.text,), result=out, program=MEASURE
        )

    def lasting(self, seed: int, arm: Arm, group: str, volumes: Sequence[float]) -> Job:
        """How long an arm's memory of a clip lasts while clips of training recordings are played."""
        place = self.out / f"seed_{seed}" / "lasting" / group / arm.folder
        run_dir = self.run_dir(arm, seed)
        return Job(
            name=f"lasting {arm.name}, {group}, seed {seed}",
            arguments=(
                "evaluate", "recall", str(run_dir / "args.yaml"), "--data", str(self.encoded(group)),
                "-a", f"{arm.name}={self.checkpoint(run_dir, self.scale.steps)}", "--frames", str(self.scale.clip),
                "--between", ",".join(map(str, self.scale.between)), "--interludes", str(self.encoded("train")),
                "--volume", ",".join(f"{volume:g}" for volume in volumes), "--batch-size", "64", "--out", str(place),
            ),
            result=place,
        )  # fmt: skip

    def _run(self, jobs: Iterable[Job]) -> None:
        run_jobs(list(jobs), self.out / "logs", at_once=self.at_once, say=self.say, threads=self.threads)
