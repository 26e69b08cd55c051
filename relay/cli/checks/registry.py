"""The registry of checks, and what they find."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Literal

import msgspec

from relay.cli.checks.situation import Situation

Severity = Literal["ok", "note", "warning", "problem"]
SEVERITIES: tuple[Severity, ...] = ("problem", "warning", "note", "ok")  # the gravest first


@dataclass(frozen=True)
class Found:
    """What a check says of one thing."""

    severity: Severity
    text: str
    read: str  # the file or command that says so
    remedy: str | None = None


class Finding(msgspec.Struct):
    """The same for the user: with the check's name, and why it matters for relaying multicast."""

    check: str
    severity: Severity
    finding: str
    read: str
    why: str
    remedy: str | None = None


Check = Callable[[Situation], Iterator[Found]]


@dataclass(frozen=True)
class Registered:
    """A check with its name and reason."""

    name: str
    why: str
    find: Check


REGISTRY: dict[str, Registered] = {}


def check(why: str) -> Callable[[Check], Check]:
    """Register a check under its function's name. `why`: what it means for relaying multicast."""

    def register(find: Check) -> Check:
        name = find.__name__.replace("_", "-")
        REGISTRY[name] = Registered(name, why, find)
        return find

    return register


def run(situation: Situation) -> list[Finding]:
    """Every finding of every check, the gravest first."""
    findings = [
        Finding(registered.name, found.severity, found.text, found.read, registered.why, found.remedy)
        for registered in REGISTRY.values()
        for found in registered.find(situation)
    ]
    return sorted(findings, key=lambda finding: SEVERITIES.index(finding.severity))
