"""What the filter of a unit of packaging/systemd lets pass, as systemd itself resolves its groups."""

import re
import subprocess
from pathlib import Path


def allowed_calls(unit: Path) -> set[str]:
    """The names of the system calls of a unit's SystemCallFilter= lines, in their order. man 5 systemd.exec."""
    command = ["systemd-analyze", "syscall-filter", "--no-pager"]
    printed = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    groups: dict[str, set[str]] = {}
    for line in printed.splitlines():
        if line.startswith("@"):
            groups[line] = members = set()
        elif line.startswith("    ") and "#" not in line:
            members.add(line.strip())

    def calls(word: str) -> set[str]:
        return set().union(*map(calls, groups[word])) if word.startswith("@") else {word}

    allowed: set[str] = set()
    for line in re.findall(r"^SystemCallFilter=(.*)$", unit.read_text(), re.MULTILINE):
        named = set().union(*map(calls, line.removeprefix("~").split()))
        allowed = allowed - named if line.startswith("~") else allowed | named
    return allowed
