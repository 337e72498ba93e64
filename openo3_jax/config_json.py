"""Settings of a run <-> JSON, as runs, checkpoints and plans keep them."""

import dataclasses
import json
import typing
from collections.abc import Mapping
from typing import Any, Literal, TypeVar

from openo3_jax.errors import InputError

Config = TypeVar("Config")


def to_json(config: Any) -> dict[str, Any]:
    """All fields of a config dataclass, as JSON gives them back: lists for tuples."""
    return json.loads(json.dumps(dataclasses.asdict(config)))


def from_json(cls: type[Config], values: Mapping[str, Any], where: str) -> Config:
    """The inverse of `to_json`. Fields that are left out have their defaults.

    Raises: InputError for a field that `cls` does not have, for one of another type, and for what `cls` refuses.
    """
    types = typing.get_type_hints(cls)
    fields = {field.name: field for field in dataclasses.fields(cls)}
    unknown = sorted(set(values) - set(fields))
    if unknown:
        raise InputError(f"{where}: unknown field {', '.join(unknown)}; expected some of {', '.join(fields)}")
    missing = [name for name, f in fields.items() if f.default is dataclasses.MISSING and name not in values]
    if missing:
        raise InputError(f"{where}: missing {', '.join(missing)}")
    return cls(**{name: _read_value(types[name], value, f"{where}: {name}") for name, value in values.items()})


def _read_value(expected: Any, value: Any, where: str) -> Any:
    """A value of JSON as the type of its field has it."""
    if dataclasses.is_dataclass(expected):
        if not isinstance(value, Mapping):
            raise InputError(f"{where} is {value!r}; expected an object")
        return from_json(expected, value, where)
    origin, parts = typing.get_origin(expected), typing.get_args(expected)
    if origin is Literal:
        fits = value in parts
    elif origin is tuple:
        if isinstance(value, list) and (parts[-1] is Ellipsis or len(parts) == len(value)):
            return tuple(
                _read_value(parts[0] if parts[-1] is Ellipsis else parts[i], v, where) for i, v in enumerate(value)
            )
        fits = False
    elif parts:  # a union with None
        inner = next((part for part in parts if dataclasses.is_dataclass(part)), None)
        if inner is not None and value is not None:
            return _read_value(inner, value, where)
        fits = value is None or any(_is_a(part, value) for part in parts if part is not type(None))
    else:
        fits = _is_a(expected, value)
    if not fits:
        raise InputError(f"{where} is {value!r}; expected {' | '.join(map(str, parts)) or expected.__name__}")
    return value


def _is_a(expected: type, value: Any) -> bool:
    """A whole number serves as float; a truth value is no number."""
    if isinstance(value, bool) or expected is bool:
        return isinstance(value, bool) and expected is bool
    return isinstance(value, int | float) if expected is float else isinstance(value, expected)
