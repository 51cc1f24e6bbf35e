"""The models of a configuration: frozen, no unknown keys. Variants, hosts and apps subclass them.

How a file or a mapping becomes one of them is in ``config_parsing``.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, TypeVar, get_args

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    SerializeAsAny,
    SerializerFunctionWrapHandler,
    ValidationError,
    model_serializer,
    model_validator,
)

from moshi_ttt.core.errors import ConfigError, nearest

Length = Annotated[int, Field(ge=1, strict=True)] | Annotated[str, Field(pattern=r"^\d+(\.\d+)?s$")]
"""A length of sequence: a number of tokens, or seconds as in ``20.5s`` (``SiteInfo.tokens`` knows the host's rate)."""


LARGEST_VOLUME = 10.0
"""Of ``output_scale``, and of a volume at run time (``core.volume``)."""

DEFAULT_PRECISION = "fp32_state"
"""The precision policy where none is named."""
Seed = Annotated[int, Field(ge=0, lt=2**32)]
"""What seeds a random generator."""


if TYPE_CHECKING:
    _Model = BaseModel  # a type checker then knows the options of each subclass as keyword arguments
else:

    class _RaisesConfigError(type(BaseModel)):
        """A constructor that is called with wrong options raises ConfigError, as a file with wrong keys does."""

        def __call__(cls, *args: Any, **options: Any) -> Any:
            if args:
                raise ConfigError(
                    f"{cls.__name__} takes its options by name, and got {args[0]!r} without one. Write "
                    f"{cls.__name__}(option=...); allowed: {', '.join(sorted(cls.model_fields))}."
                )
            try:
                return super().__call__(**options)
            except ValidationError as error:
                raise ConfigError(_problems(cls, error, cls.__name__)) from None

    class _Model(BaseModel, metaclass=_RaisesConfigError):
        pass


class FrozenConfig(_Model):
    """Base of every configuration: unknown keys are errors, values do not change after validation.

    A constructor raises ConfigError with one line per problem.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    def __setattr__(self, name: str, value: Any) -> None:
        if name in type(self).model_fields:
            raise ConfigError(
                f"{type(self).__name__}.{name} cannot be set to {value!r}: a configuration does not change. Make "
                "another."
            )
        super().__setattr__(name, value)

    @model_validator(mode="before")
    @classmethod
    def _no_yes_for_a_number(cls, values: Any) -> Any:
        """``chunk: true`` is a mistake, and would be read as 1."""
        if isinstance(values, Mapping):
            for name, value in values.items():
                field = cls.model_fields.get(str(name))
                if isinstance(value, bool) and field is not None and not _takes_bool(field.annotation):
                    raise ValueError(f"{name} cannot be {str(value).lower()}")
        return values


class _Qualified(FrozenConfig):
    """What is named by a registered name, of one distribution where two share it.

    Attributes:
        distribution: whose name is meant; ``name: acme-ttt:fast`` in a config sets it. None where one alone has it.
    """

    distribution: str | None = Field(default=None, repr=False)

    @model_serializer(mode="wrap")
    def _without_none(self, serialize: SerializerFunctionWrapHandler) -> dict[str, Any]:
        # What no config says is in no file: manifests and records of runs stay as they are.
        values: dict[str, Any] = serialize(self)
        if values.get("distribution") is None:
            values.pop("distribution", None)
        return values

    def _qualified(self, name: str) -> str:
        return name if self.distribution is None else f"{self.distribution}:{name}"


class BlockConfig(_Qualified):
    """The options of every variant. A variant adds its own options in a subclass.

    Attributes:
        variant: the registered name of the variant.
        layers: the layer specification (see ``core.layer_spec``); an int or a list of ints means those layers.
        output_scale: what the block adds to the base model is multiplied by it, in training and after it; 0 is the base
            model. See ``core.volume``.
    """

    machine_options: ClassVar[frozenset[str]] = frozenset()
    """Options that say how a machine computes the block, and not what: an adapter does not keep them."""

    variant: str
    layers: str | int | tuple[int, ...] = "all"
    output_scale: float = Field(default=1.0, ge=0.0, le=LARGEST_VOLUME)

    @property
    def qualified_name(self) -> str:
        """The name to look up in the registry: ``variant``, or ``distribution:variant``."""
        return self._qualified(self.variant)

    def learned_options(self) -> dict[str, Any]:
        """What an adapter keeps, as JSON: all options but the layers and those of this machine."""
        return self.model_dump(mode="json", exclude={"layers", "distribution", *self.machine_options})


class HostConfig(_Qualified):
    """The options of every host. A host adds its own options in a subclass."""

    name: str

    @property
    def qualified_name(self) -> str:
        """The name to look up in the registry: ``name``, or ``distribution:name``."""
        return self._qualified(self.name)


class TTTConfig(FrozenConfig):
    """A whole configuration: which host, which precision policy, which blocks where.

    Attributes:
        host: the host's own configuration.
        precision: the registered name of a precision policy.
        seed: seeds the initial values of the blocks; the same on every device and rank.
        ttt: one entry per variant and set of layers.
        extra: sections that an application asked for (``train``, ...), validated by the application's models.
    """

    host: SerializeAsAny[HostConfig]
    precision: str = DEFAULT_PRECISION
    seed: Seed = 0
    ttt: tuple[SerializeAsAny[BlockConfig], ...] = ()
    extra: dict[str, SerializeAsAny[FrozenConfig]] = {}


ModelT = TypeVar("ModelT", bound=BaseModel)


def parse_model(model: type[ModelT], values: Mapping[str, Any], where: str) -> ModelT:
    """Validate ``values`` against ``model``. Raises ConfigError with one line per problem, nearest keys included."""
    try:
        return model.model_validate(dict(values))
    except ValidationError as error:
        raise ConfigError(_problems(model, error, where)) from None


def _problems(model: type[BaseModel], error: ValidationError, where: str) -> str:
    """One line for each problem of ``error``, which ``model`` raised: the key's path, its value, what is allowed."""
    lines = []
    for problem in _one_a_place(model, error.errors()):
        path = ".".join(str(part) for part in problem["loc"]) or "(all)"
        if problem["type"] == "extra_forbidden":
            hint = nearest(str(problem["loc"][-1]), _keys_at(model, problem["loc"][:-1]))
            lines.append(f"{where}: unknown key {path!r}. {hint}")
        elif problem["type"] == "missing":
            lines.append(f"{where}: {path!r} is required.")
        else:
            given = f" = {problem['input']!r}" if problem["loc"] else ""
            lines.append(f"{where}: {path}{given}: {problem['msg']}.")
    return "\n".join(lines)


def _one_a_place(model: type[BaseModel], problems: Sequence[Any]) -> Iterator[dict[str, Any]]:
    """The problems of an error; those with each type that a value may have (``str | int``) are one."""
    found: dict[object, dict[str, Any]] = {}
    for number, problem in enumerate(problems):
        place, said = _place(model, problem["loc"]), problem["msg"]
        if problem["type"] == "model_type" and (keys := _keys_at(model, place)):
            said = f"Give its options as a mapping, some of {', '.join(keys)}"
        if place == problem["loc"] or problem["type"] in ("extra_forbidden", "missing"):
            found[number] = {**problem, "msg": said}
        elif place in found:
            found[place]["msg"] += f", or {said.removeprefix('Input should be ')}"
        else:
            found[place] = {**problem, "loc": place, "msg": said}
    yield from found.values()


def _place(model: type[BaseModel], path: tuple[int | str, ...]) -> tuple[int | str, ...]:
    """The part of an error's path that names fields and indexes, without the type that was tried there."""
    inner: type[BaseModel] | None = model
    for index, part in enumerate(path):
        if isinstance(part, int):
            continue
        if inner is None or part not in inner.model_fields:
            return path[:index]
        inner = _model_in(inner.model_fields[part].annotation)
    return path


def _keys_at(model: type[BaseModel], path: tuple[int | str, ...]) -> list[str]:
    """The keys allowed at a path of an error; parts that name no field (list indexes, union branches) are skipped."""
    for part in path:
        if part in model.model_fields:
            found = _model_in(model.model_fields[str(part)].annotation)
            if found is None:
                return []
            model = found
    return list(model.model_fields)


def _takes_bool(annotation: Any) -> bool:
    return annotation in (bool, Any) or any(_takes_bool(inner) for inner in get_args(annotation))


def _model_in(annotation: Any) -> type[BaseModel] | None:
    """The first model inside an annotation such as ``Gate | None``."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation
    return next((found for inner in get_args(annotation) if (found := _model_in(inner)) is not None), None)
