"""Match: from a datagram to an entry of the rule table, in one or two hash probes at any table size.

The table is compiled by the supervisor (table.py); here it is only read.
"""

from typing import Any

from numba import njit

from logging_shm.atomics import int64
from relay.dataplane import hashing
from relay.dataplane.layout import ENTRY_HAS_SOURCES

NO_ENTRY = -1

hash_key = njit(cache=True, nogil=True)(hashing.hash_key)


@njit(cache=True, nogil=True, _nrt=False)
def find_key(keys: Any, dst: int, port: int, ring: int, src: int) -> int:
    """The entry of exactly this key in `keys` (KEY records, a power of two, never full), or NO_ENTRY."""
    mask = len(keys) - 1
    slot = hash_key(dst, port, ring, src) & mask
    for _ in range(len(keys)):
        key = keys[slot]
        if key.entry < 0:
            return NO_ENTRY
        if key.dst == dst and key.port == port and key.ring == ring and key.src == src:
            return int64(key.entry)
        slot = (slot + 1) & mask
    return NO_ENTRY


@njit(cache=True, nogil=True, _nrt=False)
def match(keys: Any, entries: Any, dst: int, port: int, ring: int, src: int) -> int:
    """The entry for a datagram from `src`, all in host order, or NO_ENTRY.

    The entry without a source comes first: it says whether any rule asks for a source at all.
    """
    entry = find_key(keys, dst, port, ring, 0)
    if entry == NO_ENTRY:
        return NO_ENTRY
    if entries[entry].flags & ENTRY_HAS_SOURCES:
        specific = find_key(keys, dst, port, ring, src)
        if specific != NO_ENTRY:
            return specific
    if entries[entry].routes == 0:
        return NO_ENTRY
    return entry


@njit(cache=True, nogil=True, _nrt=False)
def is_own_source(own: Any, src: int, sport: int, dst: int, dport: int) -> bool:
    """Whether a datagram left one of this relay's egress sockets (`own`: OWN_SOURCE records)."""
    mask = len(own) - 1
    slot = hash_key(0, sport, 0, 0) & mask
    for _ in range(len(own)):
        sender = own[slot]
        if sender.used == 0:
            return False
        if sender.port == sport:
            if sender.addr == 0:
                if sender.dst == dst and sender.dport == dport:
                    return True
            elif sender.addr == src:
                return True
        slot = (slot + 1) & mask
    return False
