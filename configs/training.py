"""The config of a training run: moshi-finetune's keys, with their meaning and defaults, and this package's own."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

from pydantic import Field, field_validator, model_validator

from moshi_ttt.configs.fit import FitConfig
from moshi_ttt.configs.sections import StreamConfig
from moshi_ttt.configs.speakers import MAIN_SPEAKER, SIDES, Side
from moshi_ttt.core.config import FrozenConfig
from moshi_ttt.core.paths import user_path

SECTIONS = ("lora", "optim", "wandb", "moshi_paths", "inner_losses", "stream")
IGNORED = ("world_size",)
"""What moshi-finetune writes into its args.yaml and does not read: torchrun says how many ranks there are."""
DEFAULT_REPO = "kyutai/moshiko-pytorch-bf16"


class DataConfig(FrozenConfig):
    """The recordings of a run.

    Attributes:
        train_data, eval_data: a jsonl manifest, a folder of them, or a folder of pre-encoded shards; several joined by
            commas, each with a weight as in ``a.jsonl:2,b.jsonl:1``.
        shuffle: draw segments (with ``carry_state``: recordings) in random order, anew each epoch.
        transcripts: whether every recording needs a transcript beside it, may have one, or is read without.
        speaker_label: the label, in the transcripts, of the speaker who is Moshi.
        moshi_channel: the channel of a stereo recording on which Moshi is, ``left`` or ``right`` (also 0 or 1); the
            user is on the other.
        max_bad_share: the largest share of a manifest's lines that may be unusable; they are reported and skipped.
        num_workers: processes that read and encode; 0 does it in the training process.
    """

    train_data: str
    eval_data: str | None = ""
    shuffle: bool = False
    transcripts: Literal["required", "optional", "none"] = "required"
    speaker_label: str = Field(default=MAIN_SPEAKER, min_length=1)
    moshi_channel: Side = "left"
    max_bad_share: float = Field(default=0.01, ge=0.0, lt=1.0)
    num_workers: int = Field(default=0, ge=0, le=64)

    @model_validator(mode="before")
    @classmethod
    def _channels_by_number(cls, values: Any) -> Any:
        channel = values.get("moshi_channel") if isinstance(values, Mapping) else None
        return {**values, "moshi_channel": SIDES[str(channel)]} if str(channel) in SIDES else values


class MoshiPaths(FrozenConfig):
    """The Moshi of a run, with moshi-finetune's keys: a repository, and files that replace the repository's own.

    ``hf_repo_id: null`` is a model of local files alone: the folder of ``config_path`` or of ``moshi_path``, and the
    other paths for what does not lie there.

    Attributes:
        hf_repo_id: a hub repository, a local folder laid out like one, or ``builtin:tiny``.
        moshi_path, mimi_path, tokenizer_path, config_path: files used instead of the repository's own.
    """

    hf_repo_id: str | None = DEFAULT_REPO
    moshi_path: str | None = None
    mimi_path: str | None = None
    tokenizer_path: str | None = None
    config_path: str | None = None


class LoRAConfig(FrozenConfig):
    """Moshi's own LoRA, on every linear layer.

    Attributes:
        enable: train a LoRA.
        rank: width of its factors.
        scaling: what it adds is multiplied by this.
        ft_embed: train the embeddings beside it.
    """

    enable: bool = False
    rank: int = Field(default=64, ge=1)
    scaling: float = Field(default=2.0, gt=0.0)
    ft_embed: bool = False


class WandbConfig(FrozenConfig):
    """Weights & Biases; used where ``project`` is set, and installed apart.

    Attributes:
        project: the project to log to; null does not log there.
        offline: write the logs into ``run_dir``, and send nothing.
        key: the API key; it is never written to ``args.yaml``.
        run_name: the name of the run there.
    """

    project: str | None = None
    offline: bool = False
    key: str | None = None
    run_name: str | None = None


class InnerLossConfig(FrozenConfig):
    """Inner losses by position ("Figure 5"), measured during training.

    Attributes:
        enable: write them to metrics.jsonl.
        interval: steps between two measurements; the last step is measured too.
        plots: draw them too, a png for each block; this measures them where ``enable`` does not.
        plot_dir: where the plots go; ``inner_losses`` in ``run_dir`` when left out.
    """

    enable: bool = False
    interval: int = Field(default=100, ge=1)
    plots: bool = False
    plot_dir: str | None = Field(default=None, min_length=1)

    @property
    def wanted(self) -> bool:
        """Whether anything is measured."""
        return self.enable or self.plots


class RunConfig(FitConfig):
    """A training run. Everything but ``data`` and ``run_dir`` has a default; ``FitConfig`` has the loop's options.

    Attributes:
        data: the recordings.
        run_dir: the folder of logs and checkpoints.
        overwrite_run_dir: delete what an earlier run left in ``run_dir``.
        resume: true goes on from the newest checkpoint in ``run_dir`` (and starts where there is none); or the path of
            a checkpoint.
        moshi_paths: which Moshi, with moshi-finetune's keys; ``host`` may say it instead.
        adapter: start from the values of this adapter, or of the one in this checkpoint: blocks, and LoRA where it has
            one. Its blocks are those of ``ttt``, or ``ttt`` is left out. A run that is resumed does not read it again.
        duration_sec: length of a segment. With ``carry_state`` recordings are read segment by segment to their end.
        first_codebook_weight_multiplier, text_padding_weight: weights of tokens in the loss.
        text_weight: weight of the text loss beside the audio loss.
        lora: train a LoRA, alone or beside blocks.
        full_finetuning: train the base model too, without LoRA.
        param_dtype: dtype in which the base model computes, and is stored where it is not trained.
        gradient_checkpointing: compute each layer again in backward instead of keeping its activations.
        compile: compile the blocks' forward passes with torch.compile.
        shard_size: ranks that share one copy of the model; all when left out, fewer replicate it (HSDP).
        device: what to compute on; CUDA where there is one when left out.
        deterministic: take deterministic algorithms alone: on CUDA a run then repeats and resumes bit for bit, slower.
        threads: processor threads of each rank; when left out, one for a small model (``system/threads.py``).
        do_ckpt: save checkpoints.
        ckpt_freq: steps between checkpoints; 0 or less saves at the end alone.
        num_ckpt_keep: checkpoints to keep; null keeps all.
        save_adapters: export blocks and LoRA as they are; false merges LoRA into full weights.
        do_eval, eval_freq: evaluate at the end, and every ``eval_freq`` steps if it is above 0.
        stop_grace_sec: seconds from a signal that asks the run to stop (SIGTERM, Ctrl-C) to the moment when its
            launcher or scheduler kills it; torchrun does after 30. A step that is running is finished where that and
            saving fit in; else it is given up.
        log_freq: steps between two lines of the log.
        log_health: log the blocks' health, at some steps.
        health_freq: steps between two measurements of health; each of the first steps that is a power of two is
            measured as well, and the last.
        inner_losses: measure the blocks' inner losses by position at some steps.
        tensorboard: write TensorBoard files too.
        wandb: log to Weights & Biases too.
        stream: how `moshi-ttt quickstart` streams a recording after it has trained; `moshi-ttt train` does not.
    """

    data: DataConfig
    run_dir: str = Field(min_length=1)
    overwrite_run_dir: bool = False
    resume: bool | str = False
    moshi_paths: MoshiPaths = MoshiPaths()
    adapter: str | None = Field(default=None, min_length=1)

    duration_sec: float = Field(default=10.0, gt=0.0)
    first_codebook_weight_multiplier: float = Field(default=1.0, ge=0.0)
    text_padding_weight: float = Field(default=0.5, ge=0.0)
    text_weight: float = Field(default=1.0, ge=0.0)
    lora: LoRAConfig = LoRAConfig()
    full_finetuning: bool = False

    param_dtype: Literal["bfloat16", "float32"] = "bfloat16"
    gradient_checkpointing: bool = True
    compile: bool = False
    shard_size: int | None = Field(default=None, ge=1)
    device: Literal["cpu", "cuda"] | None = None
    deterministic: bool = False
    threads: int | None = Field(default=None, ge=1)

    log_freq: int = Field(default=1, ge=1)
    log_health: bool = True
    health_freq: int = Field(default=100, ge=1)
    inner_losses: InnerLossConfig = InnerLossConfig()
    tensorboard: bool = False
    wandb: WandbConfig = WandbConfig()
    do_eval: bool = False
    eval_freq: int = 0
    do_ckpt: bool = True
    ckpt_freq: int = 0
    num_ckpt_keep: int | None = Field(default=3, ge=1)
    save_adapters: bool = True
    stop_grace_sec: float = Field(default=30.0, ge=0.0, allow_inf_nan=False)
    stream: StreamConfig = StreamConfig()

    @property
    def accumulates_whole(self) -> bool:
        """Not of the whole base model: its gradients would take more memory than everything else."""
        return not self.full_finetuning

    @model_validator(mode="before")
    @classmethod
    def _null_means_default(cls, values: Any) -> Any:
        """``lora: null`` is written for no LoRA, and so for other sections."""
        if isinstance(values, Mapping):
            return {key: value for key, value in values.items() if value is not None or key not in SECTIONS}
        return values

    @field_validator("run_dir", "resume", "adapter")
    @classmethod
    def _home(cls, value: str | bool | None) -> str | bool | None:
        """``~`` is the user's home, as a shell has it: no shell reads a config."""
        return str(user_path(value)) if isinstance(value, str) and value.startswith("~") else value

    @model_validator(mode="after")
    def _fits_together(self) -> RunConfig:
        if self.full_finetuning and self.lora.enable:
            raise ValueError("full_finetuning and lora.enable exclude each other: set one of them to false")
        if self.lora.ft_embed and not (self.lora.enable or self.full_finetuning):
            raise ValueError("lora.ft_embed trains the embeddings beside a LoRA: set lora.enable, or ft_embed to false")
        if self.do_eval and not self.data.eval_data:
            raise ValueError("do_eval needs data.eval_data: give a manifest, or set do_eval to false")
        return self
