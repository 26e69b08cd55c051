"""The tables of docs/configuration.md, made from the typed definition of the configuration.

python -m tools.configuration_reference        writes them into the page
"""

import re
import types
from collections.abc import Iterator
from typing import Annotated, Any, Literal, Union, get_args, get_origin

import msgspec
from msgspec import Meta

from relay.config import Options
from relay.ranges import ConfiguredOutput, ConfiguredRule, ConfiguredSecondary
from relay.rules import TEXT_CHARS_MAX
from tools.environment import CHECKOUT

PAGE = CHECKOUT / "docs" / "configuration.md"
TABLES: dict[str, type[msgspec.Struct]] = {
    "options": Options,
    "rules": ConfiguredRule,
    "outputs": ConfiguredOutput,
    "secondary": ConfiguredSecondary,
}
SECTION = re.compile(r"(<!-- (\w+): generated -->\n).*?(<!-- end -->)", re.DOTALL)
PLAIN = {str: "text", int: "number", bool: "`true` or `false`"}


def page(text: str) -> str:
    """The page with its tables as they should be."""
    return SECTION.sub(lambda match: match[1] + table(TABLES[match[2]]) + match[3], text)


def table(kind: type[msgspec.Struct]) -> str:
    """A row for each key."""
    rows = [
        f"| `{field.name}` | {described(field.type)} | {default(field)} | {meaning(field)} |" for field in fields(kind)
    ]
    return "\n".join(("| key | type | default | meaning |", "|---|---|---|---|", *rows, ""))


def fields(kind: type[msgspec.Struct]) -> tuple[msgspec.structs.FieldInfo, ...]:
    """The keys of a table, in the order of its definition."""
    return msgspec.structs.fields(kind)


def metas(kind: Any) -> Iterator[Meta]:
    """What a type is annotated with, the outermost first."""
    while get_origin(kind) is Annotated:
        kind, *annotations = get_args(kind)
        yield from (annotation for annotation in reversed(annotations) if isinstance(annotation, Meta))


def meaning(field: msgspec.structs.FieldInfo) -> str:
    """What a key is for. Raises ValueError for one that does not say it."""
    for meta in metas(field.type):
        if meta.description:
            return meta.description.replace("|", "\\|")
    raise ValueError(f"{field.name} has no Meta(description=…)")


def default(field: msgspec.structs.FieldInfo) -> str:
    """The value of a key that is not there, as TOML writes it."""
    if field.required:
        return "needed"
    if field.default is None:
        return "none"
    return f"`{msgspec.json.encode(field.default).decode()}`"


def described(kind: Any) -> str:
    """A type in words, with its limits."""
    limits = [limit for meta in metas(kind) for limit in limits_of(meta)]
    while get_origin(kind) is Annotated:
        kind = get_args(kind)[0]
    return ", ".join((bare(kind), *limits))


def limits_of(meta: Meta) -> Iterator[str]:
    """Bounds of a number, and of a text unless it is the one of all texts."""
    if meta.ge is not None:
        yield f"{meta.ge} to {meta.le}" if meta.le is not None else f"from {meta.ge}"
    if meta.pattern is not None:
        yield f"`{meta.pattern}`"
    if meta.max_length not in (None, TEXT_CHARS_MAX):
        yield f"at most {meta.max_length}"


def bare(kind: Any) -> str:
    """A type without annotations in words; None means that the key may be left out, which its default says."""
    if get_origin(kind) in (Union, types.UnionType):
        return " or ".join(described(choice) for choice in get_args(kind) if choice is not type(None))
    if get_origin(kind) is Literal:
        return ", ".join(f'`"{word}"`' for word in get_args(kind))
    if get_origin(kind) is tuple:
        return f"list of {described(get_args(kind)[0]).replace(' or ', ' and ')}"
    return PLAIN.get(kind, "table")


if __name__ == "__main__":
    PAGE.write_text(page(PAGE.read_text()))
