"""What a rule is: values and pure functions on them, no sockets.

The control plane builds rules from requests and configuration, the supervisor opens what they
need, and the data plane sees only the tables compiled from them.
"""

from typing import Literal

import msgspec


class Output(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """One destination of a rule: an IPv4 `group` (multicast or unicast), `port`, egress `interface`."""

    group: str
    port: int
    interface: str
    ttl: int | Literal["decrement"] | None = None  # None: 1 for multicast, the host's default for unicast
    dscp: int | None = None


class Rule(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Datagrams to `input_group`:`input_port` leave once through each output."""

    rule_id: str
    input_group: str
    input_port: int
    outputs: tuple[Output, ...]
    input_interface: str | None = None  # None: every interface of the relay
    source: str | None = None  # IPv4 address; None: any
    preserve_source: bool = False
