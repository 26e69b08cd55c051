"""Typed messages between the supervisor and its children, and their answers.

Framing: SOCK_STREAM unix socket pair, u32 little-endian length, then msgpack. Children are less privileged than the
supervisor, so what they send it has bounds here, which the decoder checks; whether it fits the state is checked where
it is used (link.py, nursery.py), and rules are validated again (rulebook.py).
"""

from typing import Annotated, Any

import msgspec
from msgspec import Meta

from relay.api import ChangeId
from relay.health import MpegTsTotals, RtpTotals, StreamHealth
from relay.protection import ProtectionHealth
from relay.rules import RULE_ID_CHARS_MAX, RULES_MAX, Rule

PID_MAX = 1 << 22  # PID_MAX_LIMIT, linux/threads.h
LATENCY_BOUNDS_NS = [1 << power for power in range(12, 31)]  # of histograms for those who keep many of them
CORE_MAX = 1023  # CPU_SETSIZE of sched.h less one

Number = Annotated[int, Meta(ge=0, le=(1 << 63) - 1)]
Core = Annotated[int, Meta(ge=0, le=CORE_MAX)]
Pid = Annotated[int, Meta(ge=1, le=PID_MAX)]
Word = Annotated[str, Meta(max_length=32)]
RuleId = Annotated[str, Meta(max_length=RULE_ID_CHARS_MAX, pattern=r"\A[A-Za-z0-9][A-Za-z0-9._:@-]*\Z")]
RuleIds = Annotated[tuple[RuleId, ...], Meta(max_length=RULES_MAX)]
Rules = Annotated[tuple[Rule, ...], Meta(max_length=RULES_MAX)]


class ApplyRules(msgspec.Struct, tag=True):
    """Control plane → supervisor: change the active rules at once, all or nothing.

    `remove` names rules to drop before `add` is installed; a replaced rule stands in both.
    """

    request_id: Number
    add: Rules = ()
    remove: RuleIds = ()
    configured: RuleIds | None = None  # given when the configuration asked: its rules' ids
    change_id: ChangeId | None = None  # given by a client that may ask again, which is not carried out twice


class GetStats(msgspec.Struct, tag=True):
    request_id: Number


class ListWorkers(msgspec.Struct, tag=True):
    request_id: Number


class GetOptions(msgspec.Struct, tag=True):
    request_id: Number


class LogLevel(msgspec.Struct, tag=True):
    """Get (level None) or set the level, of all rings or of one facility and/or core."""

    request_id: Number
    level: Word | None = None
    facility: Word | None = None
    core: Core | None = None


class Restart(msgspec.Struct, tag=True):
    """Start the supervisor anew, as another version may be installed; workers relay meanwhile."""

    request_id: Number


class Latency(msgspec.Struct):
    """From the kernel's receive time until a datagram was sent, since the start."""

    datagrams: int
    p50_us: float
    p90_us: float
    p99_us: float
    p99_9_us: float
    p99_99_us: float
    max_us: float
    sum_us: float = 0.0  # of all datagrams, to within 1/32
    at_most: list[int] = []  # datagrams whose latency was at most 4.096 us, 8.192 us, … 1.07 s: LATENCY_BOUNDS_NS


class OutputStats(msgspec.Struct):
    output: str  # "group:port:interface"
    packets: int
    bytes: int
    drops: dict[str, int]
    slot: int  # of its counters in the stats segments


class RuleStats(msgspec.Struct):
    rule_id: str
    state: str  # "active" or "waiting: <why>"
    packets_matched: int
    bytes_matched: int
    packets_relayed: int
    bytes_relayed: int
    packets_per_second: float
    bits_per_second: float
    outputs: list[OutputStats]
    slot: int  # of its counters in the stats segments
    last_packet_unix_s: float | None = None  # when its last datagram came; None before the first
    streams: list[StreamHealth] = []
    input_rings: list[int] = []  # the interfaces that it takes in from, by their numbers in the stats segments
    drops: dict[str, int] = {}  # datagrams that it matched and no output was given, by cause
    rtp: RtpTotals | None = None  # None before the first RTP
    mpeg_ts: MpegTsTotals | None = None
    protection: ProtectionHealth | None = None  # of a rule with two legs


class WorkerStats(msgspec.Struct):
    core: int
    pid: int
    state: str
    uptime_s: float
    packets_in: int
    bytes_in: int
    packets_matched: int
    packets_relayed: int
    bytes_relayed: int
    packets_per_second: float
    bits_per_second: float
    ring_fill_max_percent: int  # the highest level of 50, 80, 95 that was passed, 0 for none
    drops: dict[str, int]
    stats_segment: str  # where its counters are, in /dev/shm
    is_excluded: bool = False  # it keeps failing: others get its traffic
    restarts: int = 0  # processes that ended although nobody told them to
    latency: Latency | None = None  # None: nothing was relayed yet
    packets_withheld: int = 0  # by protected rules
    frames_untracked: int = 0  # of streams for which there was no room: their health is not known
    ring_fill_percent: dict[str, int] = {}  # of the slots of each ring, by interface, within the last 0.1 s


class Stats(msgspec.Struct, tag=True):
    """Supervisor → control plane: totals since start, rates over the last second."""

    request_id: int
    uptime_s: float
    packets_in: int
    bytes_in: int
    packets_matched: int
    packets_relayed: int
    bytes_relayed: int
    packets_per_second: float
    bits_per_second: float
    drops: dict[str, int]
    rules: list[RuleStats]
    workers: list[WorkerStats]
    version: str = ""  # of the supervisor
    packets_withheld: int = 0  # by protected rules: second copies, and what came by a leg that stands by


class Workers(msgspec.Struct, tag=True):
    request_id: int
    workers: list[WorkerStats]


class StartedWith(msgspec.Struct, tag=True):
    """Supervisor → control plane: the options in effect, those of the command line by name, the configuration file."""

    request_id: int
    options: dict[str, Any]
    command_line: tuple[str, ...]
    file: str | None


class Levels(msgspec.Struct, tag=True):
    request_id: int
    levels: dict[str, str]  # facility → severity name


class Done(msgspec.Struct, tag=True):
    """Supervisor → control plane: the request was carried out; `warnings` go to the user."""

    request_id: int
    warnings: tuple[str, ...] = ()


class Refused(msgspec.Struct, tag=True):
    """Supervisor → control plane: nothing was changed, and why."""

    request_id: int
    error: str


class Restore(msgspec.Struct, tag=True):
    """Supervisor → control plane, first message: the rules that are active already."""

    rules: tuple[Rule, ...] = ()
    configured: tuple[str, ...] = ()  # ids of those that the configuration put there
    interfaces: tuple[str, ...] = ()  # the relay's default ingress interfaces
    carried_out: tuple[str, ...] = ()  # ids of clients' changes that need no second time, the oldest first


class Ready(msgspec.Struct, tag=True):
    """Control plane → supervisor: clients are served from now on."""


class Configure(msgspec.Struct, tag=True):
    """Supervisor → control plane: install exactly these configuration rules (start, SIGHUP).

    Rules that clients added stay; rules of the former configuration that are missing here go.
    """

    rules: tuple[Rule, ...] = ()


ToSupervisor = Ready | ApplyRules | GetOptions | GetStats | ListWorkers | LogLevel | Restart
ToControlPlane = Stats | StartedWith | Workers | Levels | Done | Refused | Restore | Configure


# --- supervisor ↔ template: SOCK_SEQPACKET, relay/descriptors.py ------------------------------------


class Spawn(msgspec.Struct, tag=True):
    """Fork a worker pinned to `core`. Descriptors: the worker's end of its channel, its copy arena."""

    core: int
    instance: str | None
    idle: str
    stream_health: str = "full"


class Spawned(msgspec.Struct, tag=True):
    """Template → supervisor: forked. The pid is checked (kin.py) before anything is done to it."""

    core: Core
    pid: Pid


class Exited(msgspec.Struct, tag=True):
    """A worker ended; `status` as from waitpid."""

    core: Core
    pid: Pid
    status: Annotated[int, Meta(ge=0, le=0xFFFF)]


class TemplateReady(msgspec.Struct, tag=True):
    """The compiled code is loaded and privileges are dropped: workers can be forked."""


# --- supervisor → worker ---------------------------------------------------------------------------


class AddRing(msgspec.Struct, tag=True):
    """Read this ring as number `index`. Descriptor: the packet socket."""

    index: int
    frame_bytes: int
    frame_count: int


class RemoveRing(msgspec.Struct, tag=True):
    index: int


class SetSockets(msgspec.Struct, tag=True):
    """Use these egress sockets from now on. Descriptors: one a number."""

    numbers: tuple[int, ...]


class CloseSockets(msgspec.Struct, tag=True):
    numbers: tuple[int, ...]


class SetGuardCells(msgspec.Struct, tag=True):
    """The buckets of guarded rules, before the first table. Descriptor: their memory file, shared by all workers."""


class SetTable(msgspec.Struct, tag=True):
    """Go over to this rule table. Descriptor: its memory file."""

    generation: int


class Started(msgspec.Struct, tag=True):
    """Worker → supervisor: set up, the compiled loop runs."""


class TableInUse(msgspec.Struct, tag=True):
    """Worker → supervisor: no packet is handled by an older table any more."""

    generation: Number


# --- what outlives the supervisor, relay/supervisor/keeper.py and orphans.py ------------------------


class Keep(msgspec.Struct, tag=True):
    """Supervisor → template: hold these for the next supervisor. Descriptors: one a name."""

    names: tuple[str, ...]


class Forget(msgspec.Struct, tag=True):
    """Supervisor → template: close what is kept under these names."""

    names: tuple[str, ...]


class Leave(msgspec.Struct, tag=True):
    """Supervisor → template: close everything that is kept, and end with the last worker."""


class Kept(msgspec.Struct, tag=True):
    """Template → the next supervisor. Descriptors: one a name."""

    names: tuple[str, ...]


class KeptAll(msgspec.Struct, tag=True):
    """Template → the next supervisor: that was all."""


class Outlive(msgspec.Struct, tag=True):
    """Supervisor → worker: the next supervisor could take over now, so go on when this one is gone."""

    is_restart: bool = False  # it starts anew, and goes for that reason alone


class Drain(msgspec.Struct, tag=True):
    """Supervisor → worker: let nothing more in, relay what the rings hold, end."""


ToTemplate = Spawn | Keep | Forget | Leave
FromTemplate = Spawned | Exited | TemplateReady
FromOrphans = Kept | KeptAll | Exited
ToWorker = AddRing | RemoveRing | SetSockets | CloseSockets | SetGuardCells | SetTable | Outlive | Drain
FromWorker = Started | TableInUse
