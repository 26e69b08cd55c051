"""The view: what the user chose to see of a frame - order, filter, place, pause - and what keys do to that. Pure.

Keys are named as keys.py names them.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np

from relay.cli.top.columns import COLUMNS
from relay.cli.top.watch import Frame

NAME_KEY = "n"
SORT_KEYS = (NAME_KEY, *(column.key for column in COLUMNS))
FILTER_CHARS_MAX = 64
FAR = 1 << 32  # beyond every row


@dataclass
class View:
    """The user's choice."""

    sort_key: str = "b"
    ascending: bool = False
    wanted: str = ""  # words that must all be found
    first: int = 0  # the row at the top
    rows: int = 1  # how many there was room for when it was drawn last
    paused: bool = False
    help: bool = False
    quitting: bool = False
    typing: bool = False  # into the filter
    _before: str = ""  # the filter before typing
    _ordered: tuple[Frame | None, object, Any] = (None, None, None)

    def order(self, frame: Frame) -> Any:
        """The rules to show, i8[n]: indexes, sorted and filtered."""
        choice = (self.sort_key, self.ascending, self.wanted)
        former, former_choice, order = self._ordered
        if former is not frame or former_choice != choice:
            order = self._arrange(frame)
            self._ordered = (frame, choice, order)
        return order

    def _arrange(self, frame: Frame) -> Any:
        kept = matching(frame, self.wanted)
        if self.sort_key == NAME_KEY:
            ids = frame.rules.ids
            return np.array(sorted(kept.tolist(), key=ids.__getitem__, reverse=not self.ascending), np.int64)
        column = next(column for column in COLUMNS if column.key == self.sort_key)
        values = rounded(column.values(frame)[kept])
        return kept[np.argsort(values if self.ascending else -values, kind="stable")]

    def scrolled(self, total: int) -> int:
        """The row at the top, inside what there is."""
        self.first = max(min(self.first, total - self.rows), 0)
        return self.first

    def press(self, key: str) -> None:
        """Do what a key says; others do nothing."""
        if self.typing:
            self._type(key)
        elif self.help:
            self.help = False
            self.quitting = key == "q"
        elif key in SORT_KEYS:
            self._sort_by(key)
        else:
            self._command(key)

    def _type(self, key: str) -> None:
        if key in ("enter", "escape"):
            self.typing = False
            self.wanted = self.wanted if key == "enter" else self._before
        elif key == "backspace":
            self.wanted = self.wanted[:-1]
        elif key == "kill":
            self.wanted = ""
        elif len(key) == 1 and len(self.wanted) < FILTER_CHARS_MAX:
            self.wanted += key

    def _sort_by(self, key: str) -> None:
        """Names from the first on, numbers from the greatest; the same key again turns the order round."""
        if key == self.sort_key:
            self.ascending = not self.ascending
        else:
            self.sort_key, self.ascending = key, key == NAME_KEY
        self.first = 0

    def _step(self, by: int) -> None:
        self._sort_by(SORT_KEYS[(SORT_KEYS.index(self.sort_key) + by) % len(SORT_KEYS)])

    def _command(self, key: str) -> None:
        match key:
            case "q":
                self.quitting = True
            case "s" | "right":
                self._step(1)
            case "left":
                self._step(-1)
            case "r":
                self._sort_by(self.sort_key)
            case "p" | " ":
                self.paused = not self.paused
            case "/":
                self.typing, self._before = True, self.wanted
            case "escape":
                self.wanted = ""
            case "?" | "h":
                self.help = True
            case _:
                self._move(key)

    def _move(self, key: str) -> None:
        steps = {"down": 1, "j": 1, "up": -1, "k": -1, "page down": self.rows, "page up": -self.rows}
        ends = {"home": 0, "g": 0, "end": FAR, "G": FAR}
        self.first = ends.get(key, max(self.first + steps.get(key, 0), 0))


def rounded(values: Any) -> Any:
    """Numbers with the three digits that are shown: rules that look alike keep their order from frame to frame."""
    values = np.asarray(values, np.float64)
    unit = 10.0 ** (np.floor(np.log10(np.maximum(np.abs(values), 1))) - 2)
    return np.round(values / unit) * unit


def matching(frame: Frame, wanted: str) -> Any:
    """The rules in whose name, input, source, outputs or state all words are found: i8[n]."""
    words = wanted.lower().split()
    if not words:
        return np.arange(len(frame.rules.ids))
    return np.array([i for i, text in enumerate(frame.rules.searched) if all(word in text for word in words)], np.int64)
