"""Words that what is told to people has in common. Pure."""


def counted(count: int, thing: str) -> str:
    """`1 worker`, `2 workers`: a count and a word whose plural ends in s."""
    return f"{count} {thing}" if count == 1 else f"{count} {thing}s"
