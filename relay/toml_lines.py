"""The line of every key and element of a TOML text, which parsers do not tell. Pure.

    lines_of('a = 1\n[[rules]]\noutputs = ["x"]') → {("a",): 1, ("rules", 0): 2, ("rules", 0, "outputs"): 3, …}

The text must be valid: tomllib has read it before. Source: the grammar of toml.io/en/v1.0.0.
"""

import bisect
import re
import tomllib
from collections.abc import Sequence

from relay.rules import KeyPath

BLANK = re.compile(r"(?:[ \t\r\n]+|#[^\n]*)+")
SPACES = re.compile(r"[ \t]*")
KEY = re.compile(r"[A-Za-z0-9_-]+|\"(?:\\.|[^\"\\])*\"|'[^']*'")
STRING = re.compile(
    r"\"\"\"(?:\\.|[^\\])*?\"{3,5}|'''.*?'{3,5}|\"(?:\\.|[^\"\\])*\"|'[^']*'",
    re.DOTALL,  # the end of a long string may follow one or two quotes of its content
)
SCALAR = re.compile(r"[^,\n\]}#]*")


class _Scanner:
    """Goes through a text once; `at` is where it stands."""

    def __init__(self, text: str) -> None:
        self.text = text
        self.at = 0
        self.lines: dict[KeyPath, int] = {}
        self._ends = [match.start() for match in re.finditer("\n", text)]
        self._tables: dict[KeyPath, int] = {}  # the last index of each array of tables

    def run(self) -> None:
        """Find every line."""
        table: KeyPath = ()
        self._skip(BLANK)
        while self.at < len(self.text):
            if self.text[self.at] == "[":
                table = self._header()
            else:
                self._pair(table)
            self._skip(BLANK)

    def _skip(self, pattern: re.Pattern[str]) -> str:
        match = pattern.match(self.text, self.at)
        if match is None:
            return ""
        self.at = match.end()
        return match[0]

    def _take(self, mark: str) -> bool:
        """Whether `mark` stands next, which is passed then, and what is blank behind it."""
        if not self.text.startswith(mark, self.at):
            return False
        self.at += len(mark)
        self._skip(BLANK)
        return True

    def _note(self, path: KeyPath) -> None:
        self.lines.setdefault(path, bisect.bisect_left(self._ends, self.at) + 1)

    def _key(self) -> list[str]:
        words = []
        while True:
            self._skip(SPACES)
            word = self._skip(KEY)
            words.append(tomllib.loads(f"key = {word}")["key"] if word[:1] in ('"', "'") else word)
            self._skip(SPACES)
            if not self.text.startswith(".", self.at):
                return words
            self.at += 1

    def _header(self) -> KeyPath:
        is_array = self.text.startswith("[[", self.at)
        start = self.at
        self.at += 2 if is_array else 1
        words = self._key()
        end, self.at = self.at, start
        path: KeyPath = ()
        for word in words[:-1]:
            path += (word,)
            self._note(path)
            if path in self._tables:
                path += (self._tables[path],)
        path += (words[-1],)
        self._note(path)
        if is_array:
            self._tables[path] = self._tables.get(path, -1) + 1
            path += (self._tables[path],)
            self._note(path)
        self.at = end + (2 if is_array else 1)
        return path

    def _pair(self, table: KeyPath) -> None:
        start = self.at
        words = self._key()
        end, self.at = self.at, start
        for count in range(1, len(words) + 1):
            self._note((*table, *words[:count]))
        self.at = end + 1  # the equals sign
        self._skip(SPACES)
        self._value((*table, *words))

    def _value(self, path: KeyPath) -> None:
        if self._take("["):
            index = 0
            while not self._ends_with("]"):
                self._note((*path, index))
                self._value((*path, index))
                index += 1
                self._next()
        elif self._take("{"):
            while not self._ends_with("}"):
                self._pair(path)
                self._next()
        elif not self._skip(STRING):
            self._skip(SCALAR)

    def _ends_with(self, mark: str) -> bool:
        if not self.text.startswith(mark, self.at):
            return False
        self.at += 1
        return True

    def _next(self) -> None:
        self._skip(BLANK)
        self._take(",")


def lines_of(text: str) -> dict[KeyPath, int]:
    """The line of every table, key and element of a valid TOML text."""
    scanner = _Scanner(text)
    scanner.run()
    return scanner.lines


def nearest_line(lines: dict[KeyPath, int], path: Sequence[str | int]) -> int | None:
    """The line of a path, or of what it stands in; None for what the text does not have at all."""
    for count in range(len(path), 0, -1):
        if (line := lines.get(tuple(path[:count]))) is not None:
            return line
    return None
