"""The rule table: compiled from rules by the supervisor, mapped read-only by every worker.

Each generation is a sealed memory file of its own, as large as its rules need. Workers go over to a new one
between two passes, so no packet ever sees half a change.
"""

import fcntl
import mmap
import os
import socket
import struct
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from relay.addresses import ANY, Halves, halves, is_ipv6
from relay.dataplane import layout
from relay.dataplane.hashing import fold, hash_key
from relay.dataplane.memory import TABLE_ENTRIES_MAX, address_of
from relay.errors import RuleError
from relay.sockaddr import scope

SEALS = fcntl.F_SEAL_SEAL | fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_WRITE
ALIGNMENT_BYTES = 64
OUTPUT_ROW = struct.Struct(f"<{layout.SOCKADDR_IN6.itemsize}sHHii")  # layout.OUTPUT; NumPy takes longer for one

# The arrays behind the header: their name in TABLE, their count's in TABLE_HEADER, and their layout, in file order.
SECTIONS: tuple[tuple[str, str, Any], ...] = (
    ("keys", "key_slots", layout.KEY),
    ("entries", "entries", layout.ENTRY),
    ("routes", "routes", layout.ROUTE),
    ("route_outputs", "route_outputs", layout.ROUTE_OUTPUT),
    ("outputs", "outputs", layout.OUTPUT),
    ("own", "own_slots", layout.OWN_SOURCE),
    ("rule_names", "rules", layout.RULE_NAME),
    ("guards", "guards", layout.GUARD),
    ("protected", "protected", layout.PROTECTED),
)


@dataclass(frozen=True)
class TableOutput:
    """An output as the data plane needs it."""

    slot: int  # of its counters
    address: str
    port: int
    socket: int  # number of the egress socket
    gso_segment_bytes_max: int
    connected: bool
    ttl_decrement: bool
    waiting: bool = False  # has no socket
    ifindex: int = 0  # of its interface, the scope of a link-local IPv6 address


@dataclass(frozen=True)
class TableProtection:
    """Which leg of a protected rule an input is."""

    record: int  # number of its PROTECTION
    leg: int
    mode: int  # layout.SEAMLESS, FAILOVER
    stall_ns: int = 0


@dataclass(frozen=True)
class TableRule:
    """A rule as the data plane needs it; one with two legs comes twice."""

    slot: int  # of its counters
    name: str
    group: str
    port: int
    source: str | None  # None: any
    rings: tuple[int, ...]  # ingress interfaces, by number
    preserve_source: bool
    outputs: tuple[TableOutput, ...]
    max_pps: int = 0  # datagrams a second; 0: no limit
    max_bps: int = 0  # bits of payload
    protection: TableProtection | None = None


@dataclass(frozen=True)
class OwnSource:
    """An egress socket of this relay; `address` None when it preserves sources."""

    address: str | None
    port: int
    destination: str
    destination_port: int


@dataclass
class _Entry:
    rules: list[TableRule] = field(default_factory=list)
    has_sources: bool = False


_Key = tuple[Halves, int, int, Halves]  # destination, port, ring, source


def _power_of_two_above(count: int) -> int:
    return 1 << max(4, (count * 2).bit_length())


def _entries(rules: Iterable[TableRule]) -> dict[_Key, _Entry]:
    """Group rules by key. An entry with a source holds the rules without one, too."""
    entries: dict[_Key, _Entry] = {}
    for rule in rules:
        group, source = halves(rule.group), halves(rule.source) if rule.source else ANY
        for ring in rule.rings:
            if source != ANY:
                wildcard = entries.setdefault((group, rule.port, ring, ANY), _Entry())
                wildcard.has_sources = True
            entries.setdefault((group, rule.port, ring, source), _Entry()).rules.append(rule)
    for (group, port, ring, source), entry in entries.items():
        if source != ANY:
            entry.rules += entries[group, port, ring, ANY].rules
    return entries


def _twins(entries: Sequence[_Entry]) -> dict[int, tuple[TableRule, ...]]:
    """By their number, entries with a protected rule, and what they would be without it. Raises RuleError for two."""
    twins = {}
    for index, entry in enumerate(entries):
        protected = [rule for rule in entry.rules if rule.protection is not None]
        if len(protected) > 1:
            raise RuleError(f"rules {protected[0].name} and {protected[1].name} both protect an input: remove one")
        if protected:
            twins[index] = tuple(rule for rule in entry.rules if rule.protection is None)
    return twins


def _hash_keys(keys: Sequence[_Key]) -> Any:
    table = np.zeros(_power_of_two_above(len(keys)), layout.KEY)
    table["entry"] = -1
    mask = len(table) - 1
    used = np.zeros(len(table), bool)
    for index, (group, port, ring, source) in enumerate(keys):
        slot = hash_key(fold(*group), port, ring, fold(*source)) & mask
        while used[slot]:
            slot = (slot + 1) & mask
        used[slot] = True
        table[slot] = (*group, *source, port, ring, index)
    return table


def _hash_own(own: Sequence[OwnSource]) -> Any:
    table = np.zeros(_power_of_two_above(len(own)), layout.OWN_SOURCE)
    mask = len(table) - 1
    used = np.zeros(len(table), bool)
    for source in own:
        slot = hash_key(0, source.port, 0, 0) & mask
        while used[slot]:
            slot = (slot + 1) & mask
        used[slot] = True
        address = halves(source.address) if source.address else ANY
        table[slot] = (*address, *halves(source.destination), source.port, source.destination_port, 1)
    return table


def sockaddr(address: str, port: int, ifindex: int) -> bytes:
    """struct sockaddr_in, or sockaddr_in6 with a scope where the address has one (RFC 4007)."""
    if not is_ipv6(address):
        return struct.pack("=HH4s8x", socket.AF_INET, socket.htons(port), socket.inet_aton(address))
    raw = socket.inet_pton(socket.AF_INET6, address)
    return struct.pack("=HHI16sI", socket.AF_INET6, socket.htons(port), 0, raw, scope(address, ifindex))


def _output_row(output: TableOutput, preserve_source: bool) -> bytes:
    """An OUTPUT record."""
    flags = layout.OUTPUT_CONNECTED if output.connected else 0
    flags |= layout.OUTPUT_PRESERVE_SOURCE if preserve_source else 0
    flags |= layout.OUTPUT_TTL_DECREMENT if output.ttl_decrement else 0
    flags |= layout.OUTPUT_WAITING if output.waiting else 0
    flags |= layout.OUTPUT_IPV6 if is_ipv6(output.address) else 0
    name = sockaddr(output.address, output.port, output.ifindex)
    return OUTPUT_ROW.pack(name, len(name), flags, output.socket, output.gso_segment_bytes_max)


def compile_table(rules: Sequence[TableRule], own: Sequence[OwnSource], generation: int) -> bytes:
    """Compile rules to the bytes of a table.

    Raises RuleError when they are more than the tables of a worker hold.
    """
    grouped = _entries(rules)
    twins = _twins(list(grouped.values()))
    every = [*grouped.values(), *(_Entry(list(twin)) for twin in twins.values() if twin)]
    if len(every) > TABLE_ENTRIES_MAX:
        raise RuleError(f"{len(every)} distinct inputs are over the limit of {TABLE_ENTRIES_MAX}")
    entries = np.zeros(len(every), layout.ENTRY)
    protected = np.zeros(len(twins), layout.PROTECTED)
    routes: list[tuple[int, int, int, int]] = []
    route_outputs: list[int] = []
    rows: list[bytes] = []
    first_output: dict[int, int] = {}
    guarded = [rule for rule in rules if rule.max_pps or rule.max_bps]
    guards = {rule.slot: number for number, rule in enumerate(guarded, 1)}
    outputs_used = 1 + max((output.slot for rule in rules for output in rule.outputs), default=-1)
    rules_used = 1 + max((rule.slot for rule in rules), default=-1)
    outputs = np.zeros(max(outputs_used, 1), layout.OUTPUT)
    names = np.zeros(max(rules_used, 1), layout.RULE_NAME)

    for rule in rules:
        name = rule.name.encode()[: layout.LOG_RULE_NAME_BYTES_MAX]
        names[rule.slot]["length"] = len(name)
        names[rule.slot]["name"][: len(name)] = np.frombuffer(name, np.uint8)
        if rule.slot in first_output:
            continue
        first_output[rule.slot] = len(route_outputs)
        for output in rule.outputs:
            rows.append(_output_row(output, rule.preserve_source))
            route_outputs.append(output.slot)
    outputs[route_outputs] = np.frombuffer(b"".join(rows), layout.OUTPUT, len(rows))

    for index, entry in enumerate(every):
        flags = layout.ENTRY_HAS_SOURCES if entry.has_sources else 0
        if any(rule.preserve_source for rule in entry.rules):
            flags |= layout.ENTRY_VARIES_BY_SOURCE
        if any(output.ttl_decrement for rule in entry.rules for output in rule.outputs):
            flags |= layout.ENTRY_VARIES_BY_TTL
        entries[index] = (len(routes), len(entry.rules), flags, 0)
        routes += [
            (rule.slot, first_output[rule.slot], len(rule.outputs), guards.get(rule.slot, 0)) for rule in entry.rules
        ]

    next_twin = len(grouped)
    for row, (index, twin) in enumerate(twins.items()):
        entries[index]["protection"] = row + 1
        (leg,) = [rule.protection for rule in every[index].rules if rule.protection is not None]
        protected[row] = (leg.record, leg.leg, leg.mode, next_twin if twin else -1, leg.stall_ns, 0)
        next_twin += bool(twin)

    arrays = (
        _hash_keys(list(grouped)),
        entries,
        np.array(routes, layout.ROUTE),
        np.array(route_outputs, np.dtype("<u4")).view(layout.ROUTE_OUTPUT),
        outputs,
        _hash_own(own),
        names,
        np.array([(rule.max_pps, rule.max_bps) for rule in guarded], layout.GUARD),
        protected,
    )
    header = np.zeros(1, layout.TABLE_HEADER)
    header["magic"] = layout.TABLE_MAGIC
    header["generation"] = generation
    for (_, count_name, _), array in zip(SECTIONS, arrays, strict=True):
        header[count_name] = len(array)
    parts = [header.tobytes(), *(array.tobytes() for array in arrays)]
    return b"".join(part.ljust(-(-len(part) // ALIGNMENT_BYTES) * ALIGNMENT_BYTES, b"\0") for part in parts)


def publish(table: bytes) -> int:
    """A sealed memory file with the table; the caller passes the descriptor on and closes it."""
    fd = os.memfd_create("mcr_rules", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    try:
        view = memoryview(table)
        while view:
            view = view[os.write(fd, view) :]
        fcntl.fcntl(fd, fcntl.F_ADD_SEALS, SEALS)
    except BaseException:
        os.close(fd)
        raise
    return fd


class Table:
    """Views of a table's arrays by their names in SECTIONS, and `view`, the TABLE record that compiled code takes."""

    def __init__(self, generation: int, arrays: dict[str, Any]) -> None:
        self.generation = generation
        self.arrays = arrays
        self._record = np.zeros(1, layout.TABLE)
        self.view: Any = self._record[0]
        self.view["generation"] = generation
        self.view["keys_mask"] = len(arrays["keys"]) - 1
        self.view["own_mask"] = len(arrays["own"]) - 1
        for name, array in arrays.items():
            self.view[name] = address_of(array)

    def __getitem__(self, name: str) -> Any:
        """An array by its name."""
        return self.arrays[name]


def map_table(fd: int) -> Table:
    """Map a published table, its pages present.

    Raises ValueError when the file is no table.
    """
    size = os.fstat(fd).st_size
    mapped = mmap.mmap(fd, size, mmap.MAP_SHARED | mmap.MAP_POPULATE, mmap.PROT_READ)
    return view_table(mapped)


def view_table(buffer: Any) -> Table:
    """The views of a table's bytes, which must stay in place. Raises ValueError when they are no table."""
    header = np.frombuffer(buffer, layout.TABLE_HEADER, count=1)[0]
    if header["magic"] != layout.TABLE_MAGIC:
        raise ValueError("not a rule table")
    at = -(-layout.TABLE_HEADER.itemsize // ALIGNMENT_BYTES) * ALIGNMENT_BYTES
    arrays = {}
    for name, count_name, dtype in SECTIONS:
        count = int(header[count_name])
        arrays[name] = np.frombuffer(buffer, dtype, count=count, offset=at)
        at += -(-count * dtype.itemsize // ALIGNMENT_BYTES) * ALIGNMENT_BYTES
    return Table(int(header["generation"]), arrays)
