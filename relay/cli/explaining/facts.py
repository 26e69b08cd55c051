"""What an explanation is made of and made from: values alone."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import msgspec

from relay.addresses import endpoint, is_ipv6
from relay.cli.host import Joined, SourceFilters, UdpSocket
from relay.supervisor.interfaces import Interface
from relay.supervisor.plan import Plan

Verdict = Literal["pass", "stop", "note"]


@dataclass(frozen=True)
class Datagram:
    """What is asked about. Addresses are valid, and of one family."""

    source: str
    source_port: int | None
    group: str
    port: int
    interface: str
    ttl: int | None = None  # as it arrives; None: not told
    assumed: str | None = None  # why this interface, when nobody named it

    @property
    def destination(self) -> str:
        """`group:port`."""
        return endpoint(self.group, self.port)

    @property
    def is_ipv6(self) -> bool:
        """Whether it is an IPv6 datagram."""
        return is_ipv6(self.group)


class Step(msgspec.Struct):
    """One step of a datagram's way."""

    step: str
    verdict: Verdict
    reason: str
    remedy: str | None = None


class Explanation(msgspec.Struct):
    """All steps, and what they come to."""

    relayed: bool
    summary: str
    source: str
    destination: str
    interface: str
    steps: list[Step]


@dataclass(frozen=True)
class Facts:
    """The relay and its host as they are."""

    plan: Plan
    interfaces: Mapping[str, Interface]
    flags: Mapping[str, int]  # IFF_… by interface
    has_carrier: Mapping[str, bool]
    joined: Mapping[str, Joined] | None  # None: not readable
    source_filters: SourceFilters
    sockets: Sequence[UdpSocket]
    own_inodes: frozenset[int] | None  # sockets of the supervisor, None: may not be looked at
    memberships_max: int | None  # igmp_max_memberships
    ttl_default: int
    hop_limits: Mapping[str, int]  # of IPv6 unicast, by interface
    rule_stats: Mapping[str, Any]
    workers: Sequence[Any]
