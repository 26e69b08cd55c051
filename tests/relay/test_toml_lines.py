"""The lines of a TOML text's keys: wherever the grammar lets them stand, and for every key that tomllib finds."""

import tomllib
from collections.abc import Iterator
from typing import Any

import pytest
import tomlkit
from hypothesis import given, settings
from hypothesis import strategies as st

from relay.rules import KeyPath
from relay.toml_lines import lines_of, nearest_line

TEXT = '''# a comment = 1
title = "a [b] # c = 2"   # not a key = 3
numbers = [ 1, # one = 1
  [2, 3],

  { x = 1, y = [ "z", 'w' ] },
]
long = """
[[rules]]
key = "value" \\""" more"""""
literal = \'\'\'
[table]
\'\'\'\'
"quoted \\u00e9" = 1979-05-27 07:32:00
a . b.'c' = true

[[rules]]
id = 1
[[rules.outputs]]
port = 1
[[rules.outputs]]
port = 2
[ rules . sub ]
deep = {a.b = 1}

[[ rules ]]  # second
id = 2
'''


@pytest.mark.parametrize(
    ("path", "line"),
    [
        (("title",), 2),
        (("numbers",), 3),
        (("numbers", 0), 3),
        (("numbers", 1, 1), 4),
        (("numbers", 2, "y", 1), 6),
        (("long",), 8),
        (("literal",), 11),
        (("quoted é",), 14),
        (("a", "b", "c"), 15),
        (("rules", 0), 17),
        (("rules", 0, "outputs", 0, "port"), 20),
        (("rules", 0, "outputs", 1), 21),
        (("rules", 0, "sub", "deep", "a", "b"), 24),
        (("rules", 1), 26),
        (("rules", 1, "id"), 27),
    ],
)
def test_every_key_and_element_has_its_line(path: KeyPath, line: int) -> None:
    assert lines_of(TEXT)[path] == line


def test_what_a_text_lacks_is_where_it_should_stand() -> None:
    lines = lines_of(TEXT)
    assert nearest_line(lines, ("rules", 1, "outputs", 0)) == 26
    assert nearest_line(lines, ("nothing",)) is None


def paths(value: Any, path: KeyPath = ()) -> Iterator[KeyPath]:
    """The path of every value in a document."""
    if path:
        yield path
    children = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, child in children:
        yield from paths(child, (*path, key))


def test_the_example_has_lines_for_all_that_is_in_it() -> None:
    assert set(lines_of(TEXT)) == set(paths(tomllib.loads(TEXT)))


scalars = st.integers(-9, 9) | st.booleans() | st.text("ab\"'\\#[]{},=\n é", max_size=8)
values = st.recursive(
    scalars,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text("ab. \"'", max_size=3), inner, max_size=3),
)


@settings(max_examples=50)
@given(st.dictionaries(st.text("abc. -\"'#", max_size=4), values, max_size=5))
def test_whatever_a_document_holds_every_value_has_a_line(document: dict[str, Any]) -> None:
    text = tomlkit.dumps(document)
    assert set(lines_of(text)) == set(paths(tomllib.loads(text)))
