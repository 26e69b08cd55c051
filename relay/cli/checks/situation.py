"""What checks look at. Values and files: nothing here asks the kernel."""

from collections.abc import Mapping
from dataclasses import dataclass, field

from relay.cli.host import Files
from relay.cli.running import Running
from relay.supervisor.interfaces import Interface
from relay.supervisor.plan import Plan

COUNTERS = (  # of which two looks tell whether they grow
    "sys/class/net/*/statistics/rx_missed_errors",
    "sys/class/net/*/statistics/rx_fifo_errors",
    "sys/class/net/*/statistics/rx_dropped",
    "sys/class/net/*/statistics/tx_dropped",
    "proc/net/softnet_stat",
)


@dataclass(frozen=True)
class Probes:
    """What no file tells. None: it could not be found out."""

    io_uring_refusal: str | None = None  # None: workers can have one
    clock_is_synchronised: bool | None = None
    shm_free_bytes: int | None = None
    descriptors_used: int | None = None  # by the supervisor
    offloads: Mapping[str, Mapping[str, bool]] = field(default_factory=dict)  # by interface, names as ethtool has them
    queriers: Mapping[str, str] | None = None  # addresses whose IGMP queries were heard, by interface
    mld_queriers: Mapping[str, str] | None = None  # the same of MLD
    exclusive: Mapping[str, str] = field(default_factory=dict)  # nftables table that keeps datagrams, by interface
    log_dropped: Mapping[str, int] | None = None  # records, by segment


@dataclass(frozen=True)
class Situation:
    """The host and the relay at the end of `interval_s`, and some of both at its beginning."""

    files: Files
    interfaces: Mapping[str, Interface] = field(default_factory=dict)
    ingress: tuple[str, ...] = ()  # relayed from; without a relay those that it could be
    probes: Probes = field(default_factory=Probes)
    interval_s: float = 0.0
    earlier: Mapping[str, str] = field(default_factory=dict)  # texts of COUNTERS
    relay: Running | None = None
    silence: str = "no relay answers"  # why there is none
    relay_earlier: Running | None = None
    plan: Plan = field(default_factory=Plan)

    @property
    def egress(self) -> tuple[str, ...]:
        """The interfaces that rules send to."""
        names = (output.output.interface for rule in self.plan.rules for output in rule.outputs)
        return tuple(name for name in dict.fromkeys(names) if name in self.interfaces)

    @property
    def process(self) -> str:
        """The folder of the supervisor in /proc, this process's where that is not visible."""
        return f"proc/{self.relay.pid}" if self.relay is not None and self.relay.has_private_view else "proc/self"

    def grown(self, path: str) -> tuple[int, int]:
        """A counter's value, and by how much it grew in the interval."""
        now = self.files.number(path) or 0
        before = self.earlier.get(path, "")
        return now, max(now - int(before), 0) if before.isdecimal() else 0


def count(files: Files) -> dict[str, str]:
    """The texts of COUNTERS now."""
    paths = [path for pattern in COUNTERS for path in files.find(pattern)]
    return {path: text for path in paths if (text := files.text(path)) is not None}
