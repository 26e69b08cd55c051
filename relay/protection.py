"""What has become of the two legs of a protected rule, as it is told: structures alone.

It loads no NumPy: messages and commands need the structures alone. docs/protection.md says what each number means.
"""

from collections.abc import Sequence

import msgspec

from relay.rules import Rule

LEG_NAMES = ("primary", "secondary")
SILENT_MS = 1000  # a leg that is silent for longer does not deliver, unless the rule's stall_ms says otherwise


def silent_after_ms(rule: Rule) -> int:
    """After how much silence a leg of a rule does not deliver."""
    return rule.stall_ms or SILENT_MS


class LegHealth(msgspec.Struct, frozen=True):
    """One of the two inputs of a rule, since the rule was added."""

    input: str  # [source ]group:port[ on interface]
    delivers: bool
    silent_ms: float | None  # since its last datagram; None before the first
    packets: int
    firsts: int  # of those, let through: with a seamless rule, first copies
    missing: int | None  # by its sequence numbers; None without RTP, or of a fail-over


class ProtectionHealth(msgspec.Struct, frozen=True):
    """The two legs of a rule, and what became of what they brought."""

    mode: str  # "seamless" or "failover"
    active: str | None  # leg that is relayed, of a fail-over; None: both
    switches: int  # from leg to leg; of a seamless rule, how often its sender has begun anew
    withheld: int  # datagrams: second copies, or those of the leg that stands by
    not_rtp: int  # datagrams of a seamless rule that it can't merge: only the primary's are let through
    legs: list[LegHealth]


def is_whole(protection: ProtectionHealth) -> bool:
    """Whether either leg may fail now."""
    return all(leg.delivers for leg in protection.legs)


def summary(protection: ProtectionHealth) -> str:
    """Mode and state in a few words."""
    silent = [name for name, leg in zip(LEG_NAMES, protection.legs, strict=False) if not leg.delivers]
    on = f" on {protection.active}" if protection.active else ""
    return f"{protection.mode}{on}{f', {_listed(silent)} silent' if silent else ''}"


def _listed(names: Sequence[str]) -> str:
    return " and ".join(names)
