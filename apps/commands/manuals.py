"""Examples and exit codes of every command, as the end of its ``--help`` shows them."""

from __future__ import annotations

from collections.abc import Mapping

from moshi_ttt.apps.manual import Manual, manual

PROGRAM = manual(
    examples={
        "moshi-ttt quickstart": "Train a small Moshi with a memory, and write a report.",
        "moshi-ttt train --help": "Show the options, examples and exit codes of one command.",
        'eval "$(moshi-ttt completion bash)"': "Complete command lines with the Tab key.",
    },
    exit_codes={1: "The command ran, and its result is a failure; its own --help says when."},
)
"""The manual of ``moshi-ttt`` itself."""

MANUALS: Mapping[str, Manual] = {
    "quickstart": manual(
        examples={
            "moshi-ttt quickstart": "Write the folder quickstart-run.",
            "moshi-ttt quickstart --out run --steps 60 --audio me.wav": "Train less, and stream your own recording.",
        },
        exit_codes={},
    ),
    "train": manual(
        examples={
            "moshi-ttt train train-cpu data.train_data=builtin:speech run_dir=run": "Train a small Moshi on a CPU.",
            "moshi-ttt train my.yaml --plan --ranks 8": "Show what each of eight ranks will hold.",
            "torchrun --nproc-per-node 8 -m moshi_ttt train my.yaml resume=true": "Resume a run on eight GPUs.",
        },
        exit_codes={
            0: "The run is done.",
            75: "Stopped on request and can be resumed (with do_ckpt: false nothing was saved).",
            130: "A second Ctrl-C ended the run without saving. torchrun returns 1 instead of 2, 75 and 130; "
            '"status" in RUN_DIR/run.json tells them apart.',
        },
    ),
    "encode": manual(
        examples={
            "moshi-ttt encode my.yaml --out shards": "Encode the training data of a config.",
            "moshi-ttt encode my.yaml --out shards-eval --eval": "Encode its evaluation data.",
        },
        exit_codes={},
    ),
    "serve": manual(
        examples={
            "moshi-ttt serve quickstart": "Serve the small Moshi with its memory at http://localhost:8998.",
            "moshi-ttt serve my.yaml --adapter run --slots 8 "
            "--memories kept": "Serve eight callers, who may keep memories.",
        },
        exit_codes={0: "Stopped by Ctrl-C or SIGTERM; what callers asked to keep was saved.", 1: "The model failed."},
    ),
    "evaluate": manual(
        examples={
            "moshi-ttt evaluate recall train-cpu --data speech --adapter ttt=run --out recall": "Measure recall.",
            "moshi-ttt evaluate compare recall-1 recall-2 --out both": "Compare two results.",
        },
        exit_codes={},
    ),
    "evaluate long-context": manual(
        examples={
            "moshi-ttt evaluate long-context train-cpu --data speech --adapter ttt=run --out long": "Measure the loss "
            "by position.",
        },
        exit_codes={},
    ),
    "evaluate recall": manual(
        examples={
            "moshi-ttt evaluate recall train-cpu --data speech --adapter ttt=run --out recall": "Measure recall.",
            "moshi-ttt evaluate recall train-cpu --data speech -a ttt=run --volume 0,0.5,1 -o "
            "volumes": "Measure recall and its cost by volume.",
        },
        exit_codes={},
    ),
    "evaluate inner-loop": manual(
        examples={
            "moshi-ttt evaluate inner-loop train-cpu --data speech --adapter ttt=run --out inner": "Plot inner losses.",
        },
        exit_codes={},
    ),
    "evaluate zero-shot": manual(
        examples={
            "moshi-ttt evaluate zero-shot my.yaml --dataset sblimp --source sblimp -o sblimp-result": "Score pairs of "
            "sentences with the base model.",
        },
        exit_codes={},
    ),
    "evaluate compare": manual(
        examples={"moshi-ttt evaluate compare recall-1 recall-2 --out both": "Compare two results of one base model."},
        exit_codes={},
    ),
    "generate": manual(
        examples={
            "moshi-ttt generate me.wav --out answer": "Let the small Moshi answer a recording.",
            "moshi-ttt generate one.wav two.wav -o answers --memory-out kept "
            "--stereo": "Answer two, and keep memories.",
        },
        exit_codes={1: "Some recordings have no answer; report.md says why. The other answers are written."},
    ),
    "explain": manual(
        examples={
            "moshi-ttt explain tiny-ttt-mlp": "Show the plan of a packaged config.",
            "moshi-ttt explain moshi-7b-ttt-mlp --json": "Print exact numbers for a program.",
        },
        exit_codes={},
    ),
    "doctor": manual(
        examples={
            "moshi-ttt doctor tiny-ttt-mlp": "Examine new blocks.",
            "moshi-ttt doctor train-cpu --adapter run --json": "Examine trained blocks, for a program.",
        },
        exit_codes={0: "Every block is healthy.", 1: "A block has a red flag."},
    ),
    "plugins": manual(
        examples={
            "moshi-ttt plugins": "List what is installed.",
            "moshi-ttt plugins --check": "Also import every target.",
        },
        exit_codes={
            1: "With --check: a plugin is not loaded, two plugins claim a name, or a target cannot be imported "
            "or is of "
            "another kind.",
        },
    ),
    "info": manual(
        examples={
            "moshi-ttt info": "Print tables; paste them into a bug report.",
            "moshi-ttt info --json": "Print the same for a program.",
        },
        exit_codes={0: "Everything that is installed works.", 1: "Something is broken; the last lines say what."},
    ),
    "new-plugin": manual(
        examples={"moshi-ttt new-plugin my_memory": "Write the folder moshi-ttt-my-memory."},
        exit_codes={},
    ),
    "verify": manual(
        examples={
            "moshi-ttt verify tests/goldens": "Check every file of a folder.",
            "moshi-ttt verify tests/goldens/ridge.safetensors --all": "Show every output and gradient of one file.",
        },
        exit_codes={
            0: "Every file is within tolerance.",
            1: "A file is not within tolerance, or no installed plugin computes it.",
        },
    ),
    "completion": manual(
        examples={
            'eval "$(moshi-ttt completion bash)"': "Complete in this shell. Put the line into ~/.bashrc to keep it.",
            "moshi-ttt completion zsh > ~/.zfunc/_moshi-ttt": "For zsh: a folder that fpath lists before "
            "compinit runs.",
            "moshi-ttt completion fish > ~/.config/fish/completions/moshi-ttt.fish": "For fish.",
        },
        exit_codes={},
    ),
}
"""The manual of each command, by its words behind ``moshi-ttt``."""
