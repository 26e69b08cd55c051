"""The session: from taps to a file, in the order of time, until it has enough or is told to end. It is whole then.

Taps hand over blocks, each at its own time: packets are held until nothing older can come from another tap.
"""

import os
import platform
import select
import signal
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from operator import itemgetter
from pathlib import Path
from types import FrameType
from typing import BinaryIO

from relay.cli.capture import pcapng
from relay.cli.capture.offload import on_the_wire, with_tag
from relay.cli.capture.sides import Side
from relay.cli.capture.tap import BLOCK_TIMEOUT_MS, Frame, Tap
from relay.errors import RelayError
from relay.version import VERSION

HELD_NS = 4 * BLOCK_TIMEOUT_MS * 1_000_000  # the kernel's timer may be late on a busy host
BLOCKS_MAX = 8  # taken from one tap before the others' turn: one that is never empty must not keep them waiting
NEVER_NS = (1 << 63) - 1
QUIET_S = 2 * BLOCK_TIMEOUT_MS / 1000  # after which a tap whose filter is closed has nothing more
PACKET_OUTGOING = 4
# linux/if_packet.h: PACKET_HOST, PACKET_BROADCAST, PACKET_MULTICAST, PACKET_OTHERHOST, PACKET_OUTGOING
FLAGS = {
    0: pcapng.FLAG_INBOUND | pcapng.FLAG_UNICAST,
    1: pcapng.FLAG_INBOUND | pcapng.FLAG_BROADCAST,
    2: pcapng.FLAG_INBOUND | pcapng.FLAG_MULTICAST,
    3: pcapng.FLAG_INBOUND | pcapng.FLAG_PROMISCUOUS,
    PACKET_OUTGOING: pcapng.FLAG_OUTBOUND,
}
Packet = tuple[int, int, bytes, int, int]  # time_ns, interface, data, original bytes, flags
_TIME = itemgetter(0)


def packets_of(interface: int, frame: Frame, snaplen_bytes: int) -> list[Packet]:
    """What a frame is in the file: one packet for each datagram, tagged as on the wire, cut to `snaplen_bytes`."""
    packets = []
    for data in on_the_wire(frame.data, frame.left):
        whole = data if frame.tag is None else with_tag(data, *frame.tag)
        missing = max(frame.original_bytes - len(frame.data), 0)  # of a frame that no block has room for: never seen
        flags = FLAGS.get(frame.packet_type, 0)
        packets.append((frame.time_ns, interface, whole[:snaplen_bytes], len(whole) + missing, flags))
    return packets


class Session:
    """One capture."""

    def __init__(
        self,
        rule_id: str,
        sides: Sequence[Side],
        snaplen_bytes: int,
        count: int | None,
        seconds: float | None,
        tell: Callable[[str], None],
    ) -> None:
        self._rule_id = rule_id
        self._sides = sides
        self._snaplen_bytes = snaplen_bytes
        self._count = count
        self._seconds = seconds
        self._tell = tell
        self._held: list[Packet] = []
        self._written = [0] * len(sides)
        self._complete_ns = 0  # nothing older can come from any tap
        self._last_ns = NEVER_NS  # what comes later is not wanted
        self._ending = False

    def end(self, number: int, frame: FrameType | None) -> None:
        """A signal's handler: finish the file."""
        self._ending = True

    def run(self, path: Path | None) -> None:
        """Capture into `path`, None for standard output. Raises RelayError."""
        former = {number: signal.signal(number, self.end) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)}
        try:
            with ExitStack() as stack:
                taps = [stack.enter_context(Tap(side.interface, side.program())) for side in self._sides]
                file = stack.enter_context(_open(path))
                self._capture(taps, file)
        except OSError as error:
            raise RelayError(f"{path or 'standard output'}: {error.strerror}: the capture ends there") from error
        finally:
            for number, handler in former.items():
                signal.signal(number, handler)

    def _capture(self, taps: list[Tap], file: BinaryIO) -> None:
        start_ns = time.time_ns()
        if self._seconds is not None:
            self._last_ns = start_ns + int(self._seconds * 1e9)
        file.write(pcapng.section_header(f"mcrctl {VERSION}", platform.platform(), f"rule {self._rule_id}"))
        for side in self._sides:
            description = side.describe(self._rule_id)
            file.write(pcapng.interface_description(side.interface, description, self._snaplen_bytes))
        file.flush()
        where = ", ".join(f"{side.interface} ({side.describe(self._rule_id)})" for side in self._sides)
        self._tell(f"capturing on {where}: Ctrl-C ends")
        self._until_told(taps, file)
        for tap in taps:
            tap.close_filter()
        while self._collect(taps, QUIET_S):
            pass
        self._write(file, NEVER_NS)
        end_ns = time.time_ns()
        for number, tap in enumerate(taps):
            tap.count()
            file.write(
                pcapng.interface_statistics(number, start_ns, end_ns, tap.accepted, tap.dropped, self._written[number])
            )
        file.flush()
        self._report(taps)

    def _until_told(self, taps: list[Tap], file: BinaryIO) -> None:
        while not (self._ending or self._has_all() or time.time_ns() > self._last_ns):
            self._collect(taps, BLOCK_TIMEOUT_MS / 1000)
            self._write(file, self._complete_ns)

    def _has_all(self) -> bool:
        return self._count is not None and sum(self._written) >= self._count

    def _collect(self, taps: list[Tap], timeout_s: float) -> bool:
        """Take what has been handed over; whether anything was. Wait for it at most so long."""
        poll = select.poll()
        for tap in taps:
            poll.register(tap, select.POLLIN)
        for descriptor, events in poll.poll(max(timeout_s, 0) * 1000):
            if events & select.POLLERR:
                self._tell_error(next(tap for tap in taps if tap.fileno() == descriptor))
        self._complete_ns = time.time_ns() - HELD_NS  # before, as this process may be kept waiting in the middle
        taken = [self._take(number, tap) for number, tap in enumerate(taps)]
        return any(taken)

    def _take(self, number: int, tap: Tap) -> bool:
        """Take what one tap has handed over; whether it was anything. A tap that has more yet holds the others up."""
        time_ns = 0
        for frame in tap.take(BLOCKS_MAX):
            time_ns = frame.time_ns
            if time_ns <= self._last_ns:
                self._held += packets_of(number, frame, self._snaplen_bytes)
        if tap.has_more():
            self._complete_ns = min(self._complete_ns, time_ns)
        return time_ns > 0

    def _tell_error(self, tap: Tap) -> None:
        error = tap.take_error()
        if error:
            self._tell(f"{tap.interface}: {os.strerror(error)}; what comes later is captured again")

    def _write(self, file: BinaryIO, until_ns: int) -> None:
        """Write what is older than `until_ns`, as far as it is wanted."""
        self._held.sort(key=_TIME)
        wanted = len(self._held) if self._count is None else max(self._count - sum(self._written), 0)
        done = 0
        for time_ns, interface, data, original_bytes, flags in self._held:
            if done == wanted or time_ns > until_ns:
                break
            file.write(pcapng.enhanced_packet(interface, time_ns, data, original_bytes, flags))
            self._written[interface] += 1
            done += 1
        del self._held[:done]
        if done:
            file.flush()

    def _report(self, taps: list[Tap]) -> None:
        each = "; ".join(
            f"{tap.interface}: {self._written[number]} packets, {tap.dropped} frames lost by the kernel"
            for number, tap in enumerate(taps)
        )
        self._tell(f"{sum(self._written)} packets captured. {each}")


def _open(path: Path | None) -> BinaryIO:
    if path is None:
        return os.fdopen(os.dup(sys.stdout.fileno()), "wb")
    try:
        return path.open("wb")
    except OSError as error:
        raise RelayError(f"{path}: {error.strerror}: give another file with -o") from error
