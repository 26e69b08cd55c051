"""Numbers of what workers have in arrays: rules, outputs, sockets, rings. Pure."""

from collections.abc import Collection, Iterable

from relay.errors import RuleError


class Numbers:
    """Hands out the smallest free numbers of a range; given back, they are free again."""

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._next = 0
        self._free: list[int] = []

    def take(self) -> int:
        """A free number. Raises RuleError when the range is used up."""
        if self._free:
            return self._free.pop()
        if self._next == self._limit:
            raise RuleError(f"more than {self._limit} at once: remove rules first")
        self._next += 1
        return self._next - 1

    def reserve(self, numbers: Collection[int]) -> None:
        """At the beginning: these are in use."""
        self._next = max(numbers, default=-1) + 1
        self._free = [number for number in range(self._next) if number not in numbers]

    def left(self) -> int:
        """How many are free."""
        return len(self._free) + self._limit - self._next

    def give_back(self, numbers: Iterable[int]) -> None:
        """Free numbers that nothing uses any more."""
        self._free += numbers
