"""Configuration is data: one pydantic model per command, filled from YAML, then overridden from flags.

A key that the model does not have is an error that names the key, the file, and the nearest key that exists.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping
from difflib import get_close_matches
from pathlib import Path
from reprlib import Repr
from typing import Annotated, Any, TypeVar, get_args

import yaml
from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError

from .devices import pick_device
from .errors import ConfigError

ConfigT = TypeVar("ConfigT", bound="Config")

Device = Annotated[str, AfterValidator(pick_device)]  # in a configuration: one that is there
Seed = Annotated[int, Field(ge=0, lt=2**63)]  # whatever is added to it, a generator takes it
Weight = Annotated[float, Field(ge=0)]  # of a term of a loss
SEEDS = 2**64  # that a generator takes: what is made of a seed and a step is taken modulo this (a CPU's reads 32 bits)


def _json_alone(value: dict[str, Any]) -> dict[str, Any]:
    """What can be written into a model's file, said before the training and not at its first save."""
    try:
        json.dumps(value, allow_nan=False, ensure_ascii=False).encode()  # half a surrogate pair is no text either
    except (TypeError, ValueError) as error:
        raise ValueError(f"text, finite numbers, lists and mappings alone can be kept ({error})") from None
    return value


Card = Annotated[dict[str, Any], AfterValidator(_json_alone)]

SHORT = Repr()  # of wrong values in messages: a file can hold any amount of them
SHORT.maxstring, SHORT.maxlist, SHORT.maxlevel = 200, 12, 2


def seed_of_step(seed: int, step: int) -> int:
    """What a step's generator is seeded with: the same in a run that was stopped and goes on."""
    return (seed * 1_000_003 + step) % SEEDS


class Config(BaseModel):
    """Base of every configuration: typed fields with defaults, nothing else accepted."""

    model_config = ConfigDict(extra="forbid", populate_by_name=True, validate_default=True, protected_namespaces=(),
                              allow_inf_nan=False)

    def __init__(self, /, **data: Any) -> None:
        """Raises ConfigError, as `from_dict` does."""
        try:
            super().__init__(**data)
        except ValidationError as error:
            raise _explained(type(self), error, type(self).__name__) from None

    # pydantic fills sections itself, as without an __init__ here: their problems keep the whole key.
    __init__.__pydantic_base_init__ = True

    @classmethod
    def from_yaml(
        cls: type[ConfigT],
        path: str | Path | None = None,
        overrides: Mapping[str, Any] | Iterable[str] = (),
    ) -> ConfigT:
        """Read a YAML file, apply `overrides`, and validate.

        path: the file, or None for the defaults alone.
        overrides: a (possibly nested) mapping {"train": {"lr": 1e-3}}, or strings "train.lr=1e-3" whose
            right-hand side is YAML; later ones win over earlier ones and over the file.
        Raises ConfigError: no such file, not YAML, an unknown key or a value of the wrong type.
        """
        data = read_yaml(path) if path is not None else {}
        given = list(_assignments(overrides))
        for keys, value in given:
            _assign(data, keys, value)
        source = str(path) if path is not None else "configuration"
        return cls.from_dict(data, source=source, flags={".".join(keys) for keys, _ in given})

    @classmethod
    def from_dict(
        cls: type[ConfigT], data: Mapping[str, Any], source: str = "configuration", flags: Iterable[str] = ()
    ) -> ConfigT:
        """Validate a mapping. `source` (and `flags`: dotted keys that came from flags) only name the culprit."""
        try:
            return cls.model_validate(data)
        except ValidationError as error:
            raise _explained(cls, error, source, flags) from None

    @classmethod
    def as_stored(cls, text: str, without: Iterable[str] | Mapping[str, Any] = ()) -> dict[str, Any]:
        """The configuration that a run kept as JSON, with today's defaults for settings that it did not know, and
        without some, given as pydantic's `exclude`. Raises ConfigError for one that is of another version."""
        free = without if isinstance(without, Mapping) else dict.fromkeys(without, True)
        kept = {key: value for key, value in json.loads(text).items() if free.get(key) is not True}
        return cls.from_dict(kept, source="the run's own configuration").model_dump(mode="json", exclude=free)


def read_yaml(path: str | Path) -> dict[str, Any]:
    """The mapping in a YAML file (an empty file is an empty mapping). Raises ConfigError."""
    try:
        data = yaml.load(Path(path).read_text(encoding="utf-8"), Loader=_Loader)
    except FileNotFoundError:
        raise ConfigError(f"{path}: no such configuration file") from None
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: cannot be read as text ({_one_line(error)})") from None
    except Exception as error:  # its constructors raise nearly anything, for a date such as 2024-13-45
        raise ConfigError(f"{path}: not valid YAML ({_one_line(error)})") from None
    if data is None:
        return {}
    if not isinstance(data, dict):
        raise ConfigError(f"{path}: expected 'key: value' lines at the top, found a {type(data).__name__}")
    return data


class _Loader(yaml.SafeLoader):
    """YAML in which a key given twice is an error: the second would silently win."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict:
        seen = set()
        for key, _ in node.value:
            if not isinstance(key, yaml.ScalarNode):
                raise yaml.constructor.ConstructorError(None, None, "a key that is no word", key.start_mark)
            if key.tag != "tag:yaml.org,2002:merge" and key.value in seen:
                raise yaml.constructor.ConstructorError(None, None, f"key '{key.value}' given twice", key.start_mark)
            seen.add(key.value)
        return super().construct_mapping(node, deep)

    def construct_scalar(self, node: yaml.ScalarNode) -> str:
        if "\0" in node.value:  # which no name of a file can hold
            raise yaml.constructor.ConstructorError(None, None, "a text with a NUL in it", node.start_mark)
        return super().construct_scalar(node)


def same_run(place: str | Path, then: Mapping[str, Any], now: Mapping[str, Any], advice: str) -> None:
    """Raises ConfigError, naming the key, when the run that lies at `place` was of another configuration."""
    then, now = flat(then), flat(now)
    for key in sorted(then.keys() | now.keys()):
        if then.get(key) != now.get(key):
            raise ConfigError(f"{place} holds a run with {key} = {then.get(key)}, now it is {now.get(key)}; {advice}")


def flat(values: Any, prefix: str = "") -> dict[str, Any]:
    """{"a": [{"b": 1}, {"b": 2}]} -> {"a.0.b": 1, "a.1.b": 2}; lists of anything but mappings stay whole."""
    if isinstance(values, list) and values and all(isinstance(value, dict) for value in values):
        values = dict(enumerate(values))
    if not isinstance(values, dict) or not values:
        return {prefix: values}
    parts = [flat(value, f"{prefix}.{key}" if prefix else str(key)) for key, value in values.items()]
    return {key: value for part in parts for key, value in part.items()}


def _assignments(overrides: Mapping[str, Any] | Iterable[str]) -> Iterator[tuple[list[str], Any]]:
    """Each override as (keys, value); strings are split at the first '='."""
    if isinstance(overrides, Mapping):
        for key, value in overrides.items():
            if isinstance(value, Mapping) and value:
                yield from ((key.split(".") + rest, leaf) for rest, leaf in _assignments(value))
            else:
                yield key.split("."), value
        return
    if isinstance(overrides, str):
        raise TypeError("overrides must be a mapping or a list of strings, not one string")
    for text in overrides:
        key, equals, value = text.partition("=")
        if not equals or not all(part.strip() for part in key.split(".")):
            raise ConfigError(f"'{text}': expected KEY=VALUE, for example train.lr=1e-3")
        try:
            yield [part.strip() for part in key.split(".")], yaml.load(value, Loader=_Loader)
        except Exception as error:  # as in read_yaml
            raise ConfigError(f"'{text}': the value is not valid YAML ({_one_line(error)})") from None


def _assign(data: dict[str, Any], keys: list[str], value: Any) -> None:
    for depth, key in enumerate(keys[:-1], start=1):
        below = data.get(key)
        if not isinstance(below, dict | None):
            raise ConfigError(f"{'.'.join(keys)!r}: {'.'.join(keys[:depth])!r} holds a value, not a section")
        data[key] = below = dict(below or {})  # a copy: of a YAML alias there is one, in two places
        data = below
    data[keys[-1]] = value


def _explained(model: type[BaseModel], error: ValidationError, source: str, flags: Iterable[str] = ()) -> ConfigError:
    lines = [_explain(model, problem, source, set(flags)) for problem in error.errors()]
    return ConfigError("; ".join(dict.fromkeys(lines)))


def _explain(model: type[BaseModel], problem: Mapping[str, Any], source: str, flags: set[str]) -> str:
    """One line for one of pydantic's problems."""
    keys = [str(part) for part in problem["loc"]]
    dotted = ".".join(keys)
    key = repr(dotted)  # a key may hold anything, a line break too
    if any(dotted == flag or dotted.startswith(flag + ".") for flag in flags):
        source = "override"
    if problem["type"] == "extra_forbidden":
        known = _field_names(model, keys[:-1])
        near = get_close_matches(keys[-1], known, n=1, cutoff=0.5)
        hint = f"did you mean '{'.'.join(keys[:-1] + near)}'?" if near else f"known here: {', '.join(sorted(known))}"
        return f"{source}: unknown key {key}; {hint}"
    if problem["type"] == "missing":
        return f"{source}: key {key} is required"
    message = problem["msg"].removeprefix("Value error, ")
    where = f"{source}: {key}" if dotted else source
    given = problem["input"]
    shown = f", not {SHORT.repr(given)}" if isinstance(given, (str, int, float, bool, list, type(None))) else ""
    return f"{where}: {_one_line(message[:1].lower() + message[1:])}{shown}"


def _field_names(model: type[BaseModel] | None, keys: list[str]) -> list[str]:
    """Names (and aliases) of the fields of the section found by walking `keys` down from `model`."""
    for key in keys:
        field = next((f for n, f in model.model_fields.items() if key in (n, f.alias)), None) if model else None
        # A key that is no field is a list index, a mapping key or a union's tag: the section stays the same.
        model = _section_of(field.annotation) if field else model
    if model is None:
        return []
    return [name for n, f in model.model_fields.items() for name in {n, f.alias or n}]


def _section_of(annotation: Any) -> type[BaseModel] | None:
    """The pydantic model inside an annotation such as `Optional[M]`, `list[M]` or `dict[str, M]`."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation
    return next((found for inner in get_args(annotation) if (found := _section_of(inner))), None)


def _one_line(error: object) -> str:
    return " ".join(str(error).split())
