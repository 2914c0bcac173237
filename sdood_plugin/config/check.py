"""Checks of settings, made when a configuration is made."""

from __future__ import annotations

import math
import types
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from ..errors import UsageError

_WORDS = {bool: "true or false", int: "a whole number", float: "a number", str: "text", type(None): "null"}


def require(ok: bool, name: str, value: object, expected: str, remedy: str = "change this setting") -> None:
    """Raise UsageError unless `ok`."""
    if not ok:
        raise UsageError(name, value, expected, remedy)


def require_positive(stage: str, config: Any, *names: str) -> None:
    """Raise UsageError unless these settings of a stage are finite and above 0."""
    for name in names:
        value = getattr(config, name)
        require(math.isfinite(value) and value > 0, f"{stage}.{name}", value, "a number above 0")


def require_types(name: str, config: Any) -> None:
    """Raise UsageError unless every setting of a dataclass is of its annotated type.

    A whole number is a number too; true and false are neither.

    Args:
        name: What users call a setting, with {} in place of the field's name.
        config: The dataclass; its fields are plain values, dataclasses, or lists, tuples, unions or literals of them.
    """
    for field, hint in get_type_hints(type(config)).items():
        value = getattr(config, field)
        require(_is_a(value, hint), name.format(field), repr(value), _in_words(hint))


def _is_a(value: object, hint: Any) -> bool:
    kind, parts = get_origin(hint), get_args(hint)
    if kind is Literal:
        return any(type(value) is type(part) and value == part for part in parts)
    if kind in (Union, types.UnionType):
        return any(_is_a(value, part) for part in parts)
    if kind in (list, tuple):
        return isinstance(value, kind) and all(_is_a(one, parts[0]) for one in value)
    if isinstance(value, bool):
        return hint is bool
    return isinstance(value, (int, float) if hint is float else hint)


def _in_words(hint: Any) -> str:
    kind, parts = get_origin(hint), get_args(hint)
    if kind in (list, tuple):
        return f"a list, each {_in_words(parts[0])}"
    if not parts:
        return _WORDS.get(hint, hint.__name__)
    *others, last = [str(part) if kind is Literal else _in_words(part) for part in parts]
    return f"{', '.join(others)} or {last}" if others else last
