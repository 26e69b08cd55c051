"""Growth: what was added to the records of a worker's streams since the last look, for all of them at once.

For who sums up faults over time: the supervisor (relay/supervisor/stream_totals.py) and `mcrctl top`. Records do not
last: one is another stream's after a minute of silence, and a datagram that comes late takes back what was counted as
lost. So what counts is by how much a number has risen above the highest that was seen of its stream. Looks are to be
far closer than a minute: what a stream had when its record went has been counted then.
"""

from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np

from relay.dataplane.counters import StatsSegment
from relay.dataplane.layout import COUNT_MAX, STREAMS_MAX, Payload

COUNTED = ("rtp_lost", "rtp_reordered", "rtp_duplicates", "continuity_errors", "sync_losses")  # fields of STREAM
RTP_COUNTED = 3  # of these
ADDRESS = ("dst_first", "dst_second", "dport", "ring", "src_first", "src_second")  # fields of STREAM, likewise


class Look(NamedTuple):
    """The streams of a worker at one moment: i8[streams] each, but for the tables."""

    addresses: Any  # i8[streams, ADDRESS]
    carried: Any  # Payload, of all that a stream has ever carried
    added: Any  # i8[streams, COUNTED], since the last look
    is_new: Any  # b1: something was added, or is carried for the first time
    jitter_ns: Any  # -1: no RTP now
    last_ns: Any  # CLOCK_MONOTONIC


@dataclass
class Growth:
    """Looks at the records of one segment, again and again; at first all that is in them is new."""

    segment: StatsSegment
    _numbers: Any = field(default_factory=lambda: np.zeros(STREAMS_MAX, np.int64))
    _carried: Any = field(default_factory=lambda: np.zeros(STREAMS_MAX, np.int64))
    _highest: Any = field(default_factory=lambda: np.zeros((STREAMS_MAX, len(COUNTED)), np.int64))

    def look(self) -> Look:
        """A record that changes hands meanwhile waits for the next look. A worker may have written anything."""
        streams = self.segment.streams
        every = streams["number"].copy()
        used = (every > 0).nonzero()[0]
        records, numbers = streams[used], every[used]
        still = streams["number"][used] == numbers
        used, records, numbers = used[still], records[still], numbers[still]
        is_known = self._numbers[used] == numbers
        highest = np.where(is_known[:, None], self._highest[used], 0)
        former = np.where(is_known, self._carried[used], 0)
        counts = np.stack([np.clip(records[name], 0, COUNT_MAX) for name in COUNTED], axis=1)
        kinds = records["kind"].astype(np.int64)
        added, carried = np.maximum(counts - highest, 0), former | kinds
        self._numbers[used], self._carried[used], self._highest[used] = numbers, carried, highest + added
        return Look(
            addresses=np.stack([records[name].astype(np.int64) for name in ADDRESS], axis=1),
            carried=carried,
            added=added,
            is_new=added.any(axis=1) | (carried != former),
            jitter_ns=np.where(kinds & int(Payload.RTP), np.clip(records["jitter_ns_16"], 0, COUNT_MAX) // 16, -1),
            last_ns=np.clip(records["last_ns"], 0, COUNT_MAX),
        )
