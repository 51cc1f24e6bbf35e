"""The parts of the reference that are made from the code: commands, configuration, Python, hooks, errors."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from pathlib import Path
from typing import Any

from config_keys import configuration
from error_classes import errors


def make(name: str) -> str:
    """The Markdown that stands for the placeholder ``name`` of a page."""
    return PARTS[name]()


# ---- commands


def commands() -> str:
    """A section for each command: what it does, its arguments and options, as ``--help`` has them."""
    import typer.main

    from moshi_ttt.apps.cli import app

    group: Any = typer.main.get_command(app)
    parts = [_command("moshi-ttt", group)]
    for name, command in group.commands.items():
        if command.hidden:
            continue
        parts.append(_command(f"moshi-ttt {name}", command))
        for inner, subcommand in getattr(command, "commands", {}).items():
            if not subcommand.hidden:
                parts.append(_command(f"moshi-ttt {name} {inner}", subcommand))
    return "\n".join(parts)


def _command(name: str, command: Any) -> str:
    shown = [each for each in command.params if not getattr(each, "hidden", False)]
    arguments = [each for each in shown if each.param_type_name == "argument"]
    options = [each for each in shown if each.param_type_name == "option"]
    after = ["COMMAND"] if getattr(command, "commands", None) else [_argument(each) for each in arguments]
    lines = [f"## {name}", "", _without_markup(inspect.cleandoc(command.help or "")), ""]
    lines += ["```text", " ".join([name, *(["[OPTIONS]"] if options else []), *after]), "```", ""]
    if arguments:
        rows = [f"| `{_argument(each)}` | {_cell(each.help)} |" for each in arguments]
        lines += ["| argument | meaning |", "| --- | --- |", *rows, ""]
    if options:
        rows = [_option(each) for each in options]
        lines += ["| option | default | meaning |", "| --- | --- | --- |", *rows, ""]
    return "\n".join(lines)


def _argument(argument: Any) -> str:
    name = argument.metavar or argument.name.upper()
    if argument.nargs != 1 and not name.endswith("..."):
        name += "..."
    return str(name) if argument.required or name.startswith("[") else f"[{name}]"


def _option(option: Any) -> str:
    names = [f"`{name}`" for name in (*option.opts, *option.secondary_opts)]
    if not option.is_flag:
        names[-1] = f"{names[-1][:-1]} {option.metavar or _kind(option)}`"
    default = option.default
    said = f"`{default}`" if isinstance(default, (int, float, str, Path)) and not isinstance(default, bool) else ""
    return f"| {', '.join(names)} | {'required' if option.required else said} | {_cell(option.help)} |"


def _kind(option: Any) -> str:
    """What stands for a value: typer says its type in one way with click, and in another without."""
    described = getattr(option, "type_descriptor", None)
    name = option.type.name if described is None else described.annotation.__name__
    return {"int": "N", "integer": "N", "integer range": "N", "float": "X", "float range": "X"}.get(name, "TEXT")


def _without_markup(text: str) -> str:
    return text.replace("[bold]", "**").replace("[/]", "**")


# ---- Python


def _directives(names: list[str]) -> str:
    return "\n\n".join(f"::: {name}" for name in names) + "\n"


FIRST = ("load_model", "inject", "save_adapter", "load_adapter")
"""What a program calls, in the order in which it does."""


def python() -> str:
    """Every public name of ``moshi_ttt``: what a program calls, then the classes."""
    import moshi_ttt

    public = [getattr(moshi_ttt, name) for name in moshi_ttt.__all__]
    functions = [each.__name__ for each in public if inspect.isfunction(each)]
    classes = [each.__name__ for each in public if inspect.isclass(each)]
    names = dict.fromkeys([*FIRST, *functions, *classes])
    return _directives([f"moshi_ttt.{name}" for name in names])


def training() -> str:
    """The public names of ``moshi_ttt.training``."""
    from moshi_ttt import training as package

    return _directives([f"moshi_ttt.training.{name}" for name in package.__all__])


def evaluations() -> str:
    """The options and the function of each evaluation."""
    from moshi_ttt import evaluation

    names = []
    for module in evaluation.__all__:
        public = getattr(evaluation, module)
        own = [name for name, each in vars(public).items() if getattr(each, "__module__", "") == public.__name__]
        wanted = [name for name in own if name.endswith("Options") or name in ("evaluate", "run", "write_comparison")]
        names += [f"moshi_ttt.evaluation.{module}.{name}" for name in wanted]
    return _directives(names)


EXTENSION = [
    "moshi_ttt.core.block.SequenceBlock", "moshi_ttt.core.block_contract.BlockContract",
    "moshi_ttt.core.context.BlockContext", "moshi_ttt.core.site.SiteInfo", "moshi_ttt.core.config.BlockConfig",
    "moshi_ttt.core.host.HostModel", "moshi_ttt.core.host.CarriedState", "moshi_ttt.core.carry.ForwardContext",
    "moshi_ttt.core.carry.Carry", "moshi_ttt.core.losses.HostLosses", "moshi_ttt.core.format.FormatAdapter",
    "moshi_ttt.core.precision.PrecisionPolicy", "moshi_ttt.core.precision.DtypeRoles",
    "moshi_ttt.core.verification.Verifier", "moshi_ttt.core.weight_map.WeightMap",
]  # fmt: skip
"""What somebody who writes a variant or a host implements or is given."""


def extensions() -> str:
    """The contracts, and the conformance kit."""
    kit = [f"moshi_ttt.core.testing.{name}" for name in ("check_block", "conformance_tests", "host_conformance_tests")]
    return _directives([*EXTENSION, *kit])


# ---- hooks


def hooks() -> str:
    """Each hook with its signature, and the registrars that it gets."""
    from moshi_ttt.core.hooks import ENTRY_POINT_GROUP, HOOK_API_VERSION, HookSpecs
    from moshi_ttt.core.registry import HOOKS

    lines = [
        f"The group of entry points is `{ENTRY_POINT_GROUP}`, and the version of this API is `{HOOK_API_VERSION}`.", "",
        "| hook | registers | in configs and Python |", "| --- | --- | --- |",
        *(f"| [`{hook}`](#{hook}) | {kind} | `distribution:name`, or `name` |" for kind, hook in HOOKS.items()), "",
    ]  # fmt: skip
    for hook in HOOKS.values():
        function = getattr(HookSpecs, hook)
        signature = str(inspect.signature(function)).replace("self, ", "").replace("'", "")
        lines += [f"## {hook}", "", "```python", f"def {hook}{signature}: ...", "```", ""]
        lines += [inspect.getdoc(function) or "", ""]
    return "\n".join(lines) + _directives(
        ["moshi_ttt.core.registrar.Registrar", "moshi_ttt.core.registrar.BlockRegistrar"]
    )


def _cell(text: str | None) -> str:
    return " ".join((text or "").split()).replace("|", "\\|")


PARTS: dict[str, Callable[[], str]] = {
    "commands": commands,
    "configuration": configuration,
    "python": python,
    "training": training,
    "evaluations": evaluations,
    "extensions": extensions,
    "hooks": hooks,
    "errors": errors,
}
"""What a page may ask for by ``<!-- generated: NAME -->``."""
