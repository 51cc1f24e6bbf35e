"""The state of one row, to be continued in another row, process, or number of rows.

A ``memory`` is what test-time updates wrote, and what belongs to it alone: the fast weights and the unfinished chunk of
every block. A ``session`` is everything: the memory, the codec's and the language model's streams, the tokens that are
pending, and the row's generator. Nothing beyond the end of the row's stream is in either.

The file is a safetensors file. Its metadata has the format, a header in JSON that says what the tensors belong to, and
a checksum of all that.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal, TypeVar, get_args

import safetensors.torch
from safetensors import SafetensorError
from torch import Tensor

from moshi_ttt.core.atomic import atomic_file
from moshi_ttt.core.base_weights import weight_digest
from moshi_ttt.core.errors import HostError
from moshi_ttt.core.paths import user_path
from moshi_ttt.core.tensor_files import CHECKSUM, is_damaged, read_tensors, with_checksum
from moshi_ttt.hosts.moshi.base_weights import lora_factors
from moshi_ttt.hosts.moshi.host import MOSHI_HOST
from moshi_ttt.hosts.moshi.row_checks import generator_problem, value_problems
from moshi_ttt.hosts.moshi.slot_stats import RowCounts
from moshi_ttt.hosts.moshi.stream_values import StreamValue
from moshi_ttt.hosts.moshi.upstream import LMModel, MimiModel

FORMAT = "moshi_ttt.row_state"
VERSION = 1
METADATA = frozenset({"format", "version", "header", CHECKSUM})
RowKind = Literal["memory", "session"]
Value = TypeVar("Value")
GENERATOR = "generator"
"""The name of the generator's state in a session: uint8 ``[N]``."""


@dataclass(frozen=True)
class Origin:
    """What a row's state belongs to. States of equal origin can be exchanged.

    Attributes:
        model: the fingerprint of the base model.
        codec: digest of the codec's weights.
        adapter: digest of the parameters of the blocks, and of a LoRA.
        variants: the configuration of each site's block.
    """

    model: Mapping[str, Any]
    codec: str | None
    adapter: str | None
    variants: Mapping[str, Mapping[str, Any]]

    @classmethod
    def of(cls, model: LMModel, mimi: MimiModel) -> Origin:
        blocks = {str(site): block for site, block in MOSHI_HOST.blocks(model).items()}
        own: dict[str, Tensor] = {}
        for site, block in blocks.items():
            held = {**dict(block.named_parameters()), **block.persistent_buffers()}
            own |= {f"{site}.{name}": tensor for name, tensor in held.items()}
        variants = {
            site: block.config.model_dump(mode="json", exclude={"layers", "distribution"})
            for site, block in blocks.items()
        }
        # As JSON gives them back: a tuple is a list there.
        fingerprint = json.loads(json.dumps(MOSHI_HOST.fingerprint(model)))
        return cls(
            model=fingerprint,
            codec=weight_digest(dict(mimi.named_parameters())),
            adapter=weight_digest({**own, **lora_factors(model)}),
            variants=json.loads(json.dumps(variants)),
        )

    @classmethod
    def read(cls, header: Mapping[str, Any]) -> Origin:
        """What the header of a file says. Raises TypeError and KeyError."""
        variants = _typed(header, "variants", dict)
        for site in variants:
            _typed(variants, site, dict)
        codec, adapter = (None if header[name] is None else _typed(header, name, str) for name in ("codec", "adapter"))
        return cls(_typed(header, "model", dict), codec, adapter, variants)

    def problems(self, other: Origin, kind: RowKind) -> Iterator[str]:
        """Why a state of ``other`` cannot be continued here."""
        if dict(self.model) != dict(other.model):
            names = sorted(self.model.keys() | other.model.keys())
            differ = [name for name in names if self.model.get(name) != other.model.get(name)]
            yield f"it is of another base model: {', '.join(differ)} differ"
        if self.variants != other.variants:
            sites = sorted(self.variants.keys() | other.variants.keys())
            differ = [site for site in sites if self.variants.get(site) != other.variants.get(site)]
            yield f"it was made with other blocks or options at {', '.join(differ)}"
        elif self.adapter != other.adapter:
            yield "it was made with another adapter: the parameters of the blocks, or the LoRA, differ"
        if kind == "session" and self.codec != other.codec:
            yield "it was made with another codec"


@dataclass(frozen=True)
class RowState:
    """The state of one row. The tensors are on the CPU and the caller's own.

    Attributes:
        kind: ``memory`` or ``session``.
        origin: what it belongs to.
        tensors: by the name of the value in the stream; without a dimension of rows.
        counts: frames, tokens and updates until then.
        seed: of the row's generator.
    """

    kind: RowKind
    origin: Origin
    tensors: Mapping[str, Tensor] = field(repr=False)
    counts: RowCounts = field(default_factory=RowCounts)
    seed: int = 0

    @property
    def frames(self) -> int:
        """Of 80 ms, that the row heard."""
        return self.counts.frames

    @property
    def num_bytes(self) -> int:
        """Bytes of the tensors."""
        return sum(tensor.numel() * tensor.element_size() for tensor in self.tensors.values())

    def metadata(self) -> dict[str, str]:
        """What the file says beside its tensors."""
        header = {"kind": self.kind, "seed": self.seed, **asdict(self.counts), **asdict(self.origin)}
        return with_checksum(self.tensors, {"format": FORMAT, "version": str(VERSION), "header": json.dumps(header)})

    def to_bytes(self) -> bytes:
        """The contents of a file."""
        return safetensors.torch.save(dict(self.tensors), self.metadata())

    def save(self, path: str | Path) -> Path:
        """Write a file, whose folder must exist; a reader sees the old file or the whole new one. Returns its path."""
        path = user_path(path)
        with atomic_file(path) as temporary:
            safetensors.torch.save_file(dict(self.tensors), temporary, metadata=self.metadata())
        return path

    @classmethod
    def from_bytes(cls, contents: bytes) -> RowState:
        """What ``to_bytes`` wrote. Raises HostError for anything else."""
        try:
            tensors = safetensors.torch.load(contents)
            length = int.from_bytes(contents[:8], "little")
            metadata = json.loads(contents[8 : 8 + length]).get("__metadata__") or {}
        except (SafetensorError, ValueError, AttributeError, KeyError) as error:
            raise HostError(f"These bytes are not a row's state: {error}.") from None
        return cls._read(metadata, tensors, "These bytes")

    @classmethod
    def load(cls, path: str | Path) -> RowState:
        """A file that ``save`` wrote. Raises HostError for anything else."""
        path = user_path(path)
        try:
            mapped, metadata = read_tensors(path)
        except (OSError, SafetensorError) as error:
            raise HostError(f"Cannot read a kept memory or session from {path}: {error}.") from None
        # Copies: the file may be replaced while they are in use.
        return cls._read(metadata, {name: tensor.clone() for name, tensor in mapped.items()}, str(path))

    @classmethod
    def _read(cls, metadata: Mapping[str, str], tensors: dict[str, Tensor], what: str) -> RowState:
        if metadata.get("format") != FORMAT:
            raise HostError(
                f"{what}: this is no kept memory or session. Give a file that a server or generate --memory-out wrote, "
                "or what Slots.save_row made."
            )
        if metadata.get("version") != str(VERSION):
            raise HostError(
                f"{what}: the state of a row in version {metadata.get('version')} of its format, and this package "
                f"reads version {VERSION}. Read it with the version of moshi-ttt that wrote it."
            )
        try:
            if unknown := sorted(metadata.keys() - METADATA):
                raise ValueError(f"its metadata has {', '.join(unknown)}, which no version writes")
            header = json.loads(metadata["header"])
            if header["kind"] not in get_args(RowKind):
                raise ValueError(f"there is no kind {header['kind']!r}")
            state = cls(
                kind=header["kind"],
                origin=Origin.read(header),
                tensors=tensors,
                counts=RowCounts(
                    frames=_typed(header, "frames", int),
                    tokens=_typed(header, "tokens", int),
                    updates=_by_chunk(header, "updates", int),
                    enabled=_by_chunk(header, "enabled", bool),
                ),
                seed=_typed(header, "seed", int),
            )
        except (KeyError, TypeError, ValueError, AttributeError, RecursionError) as error:
            raise HostError(f"{what}: the header of this row's state is damaged: {error!r}.") from None
        if is_damaged(tensors, metadata):
            raise HostError(
                f"{what}: this row's state is damaged: its checksum is not that of what it holds. Give another file, "
                "or start with an empty memory."
            )
        return state


def require_continuable(state: RowState, values: Mapping[str, StreamValue], origin: Origin) -> None:
    """Raise HostError unless ``state`` can be continued in a row with ``values``, of a model of ``origin``.

    A file may be damaged, and what it holds would reach the other rows: a token without an embedding ends the step of
    all. So values that no stream has are refused too.
    """
    problems = list(origin.problems(state.origin, state.kind))
    if not problems:
        names = set(values) | ({GENERATOR} if state.kind == "session" else set())
        problems += [f"it lacks {name}" for name in sorted(names - state.tensors.keys())]
        problems += [f"it has {name}, which no row has" for name in sorted(state.tensors.keys() - names)]
        shared = {name: value for name, value in values.items() if name in state.tensors}
        problems += [p for name, value in shared.items() if (p := value.row_problem(state.tensors[name])) is not None]
        if GENERATOR in names & state.tensors.keys() and (problem := generator_problem(state.tensors[GENERATOR])):
            problems.append(f"{GENERATOR}: {problem}")
        problems += state.counts.problems()
        if not 0 <= state.seed < 2**63:
            problems.append(f"its seed is {state.seed}, and 0 to 2**63 - 1 are allowed")
    if not problems:
        problems += value_problems(values, state.tensors)
    if problems:
        shown = "; ".join(problems[:4]) + (f"; and {len(problems) - 4} more" if len(problems) > 4 else "")
        raise HostError(
            f"This {state.kind} cannot be continued here: {shown}. Give the state of a row of the same model, adapter "
            "and options, or join without one."
        )


def _typed(header: Mapping[str, Any], name: str, kind: type[Value]) -> Value:
    """``header[name]`` of exactly this type: true is no number, and 2.0 no whole one. Raises TypeError and KeyError."""
    if type(value := header[name]) is not kind:
        raise TypeError(f"{name} is {str(value)[:40]!r}, and {kind.__name__} is expected")
    return value


def _by_chunk(header: Mapping[str, Any], name: str, kind: type[Value]) -> dict[int, Value]:
    """``header[name]``, whose names are the chunks' sizes. Raises TypeError, KeyError and ValueError."""
    found = _typed(header, name, dict)
    return {int(chunk): _typed(found, chunk, kind) for chunk in found}
