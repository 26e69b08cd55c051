"""All that is wrong with a value of some type, where msgspec tells the first alone. Pure."""

import re
import types
from collections.abc import Iterator
from typing import Annotated, Any, Literal, Union, get_args, get_origin

import msgspec

from relay.rules import KeyPath


def faults(value: Any, kind: Any, path: KeyPath = ()) -> Iterator[tuple[KeyPath, str]]:
    """The place of each fault in a value that is meant to be of type `kind`, and what is allowed there."""
    try:
        msgspec.convert(value, kind)
    except msgspec.ValidationError as error:
        inner = list(_inside(value, kind, path))
        reason = str(error).partition(" - at `")[0]
        yield from inner or [(path, re.sub(r"\bobject\b(?=`| \|)", "table", reason) + _allowed(kind))]


def _inside(value: Any, kind: Any, path: KeyPath) -> Iterator[tuple[KeyPath, str]]:
    for choice in _choices(kind):
        if isinstance(value, dict) and isinstance(choice, type) and issubclass(choice, msgspec.Struct):
            yield from _of_struct(value, choice, path)
        elif isinstance(value, list | tuple) and get_origin(choice) is tuple:
            for index, element in enumerate(value):
                yield from faults(element, get_args(choice)[0], (*path, index))


def _of_struct(value: dict[str, Any], kind: type[msgspec.Struct], path: KeyPath) -> Iterator[tuple[KeyPath, str]]:
    fields = {field.encode_name: field for field in msgspec.structs.fields(kind)}
    for key, element in value.items():
        if key in fields:
            yield from faults(element, fields[key].type, (*path, key))
        else:
            yield (*path, key), f"unknown key; allowed are {', '.join(fields)}"
    for name, field in fields.items():
        if field.required and name not in value:
            yield path, f"{name} is missing: give it"


def _choices(kind: Any) -> tuple[Any, ...]:
    """The members of a union, a type itself without; whatever is annotated is bared."""
    while get_origin(kind) is Annotated:
        kind = get_args(kind)[0]
    if get_origin(kind) in (Union, types.UnionType):
        return tuple(choice for member in get_args(kind) for choice in _choices(member))
    return (kind,)


def _allowed(kind: Any) -> str:
    words = [str(word) for choice in _choices(kind) if get_origin(choice) is Literal for word in get_args(choice)]
    return f"; allowed are {', '.join(words)}" if words else ""
