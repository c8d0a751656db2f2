"""Dataclasses from the plain values of a file: what is missing gets its default, what is wrong is named."""

from __future__ import annotations

from collections.abc import Mapping
from types import UnionType
from typing import Any, TypeVar, Union, get_args, get_origin, get_type_hints

T = TypeVar("T")


def from_plain(cls: type[T], values: Mapping[str, Any], where: str) -> T:
    """`cls(**values)` with types checked; a field that `values` lacks keeps the default of the dataclass.

    Fields may be bool, int, float, str, tuples of these, or any of them or None. A list counts as a tuple (JSON has
    only lists), an int as a float. Raises ValueError that begins with `where` and names the fields and the values.
    """
    if not isinstance(values, Mapping):
        raise ValueError(f"{where}: expected names and values, got {values!r}")
    hints = get_type_hints(cls)
    unknown = sorted(str(name) for name in values if name not in hints)
    if unknown:
        raise ValueError(f"{where}: unknown fields {unknown}")
    converted = {}
    for name, value in values.items():
        plain = tuple(value) if isinstance(value, list) else value
        if not _fits(plain, hints[name]):
            raise ValueError(f"{where}: {name} must be {_name(hints[name])}, got {value!r}")
        converted[name] = plain
    try:
        return cls(**converted)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{where}: {error}") from error


def _fits(value: Any, hint: Any) -> bool:
    if get_origin(hint) in (Union, UnionType):
        return any(_fits(value, each) for each in get_args(hint))
    if get_origin(hint) is tuple:
        kinds = get_args(hint)
        return type(value) is tuple and len(value) == len(kinds) and all(map(_fits, value, kinds))
    return type(value) is hint or (hint is float and type(value) is int)


def _name(hint: Any) -> str:
    return hint.__name__ if isinstance(hint, type) and not get_args(hint) else str(hint)
