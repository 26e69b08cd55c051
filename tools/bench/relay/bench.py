"""What parts share: the plan, the arenas that are open, the results so far."""

import contextlib
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from tools.bench.relay.peers import CONTENDER_LOG, Peer, Running, Setup
from tools.bench.relay.results import FLAT_OUT, ON_RELAYS_CORE, ON_SENDERS_CORE, SUPER, WIRE, Results
from tools.bench.relay.topology import Arena, EndedError, mtu_for

USUAL_SIZE = 1316  # seven packets of MPEG-TS


@dataclass(frozen=True)
class Plan:
    """What to measure, and for how long."""

    rounds: int = 3
    seconds: float = 3.0
    confirm_s: float = 10.0
    search_steps: int = 7
    sizes: Sequence[int] = (64, 256, 1316, 1472, 8972)
    streams: Sequence[int] = (1, 16, 256)
    outputs: Sequence[int] = (1, 4, 50)
    rules: Sequence[int] = (1, 1000, 10_000)
    workers: Sequence[int] = (1, 2)
    cpu_rates: Sequence[float] = (100_000, 300_000, FLAT_OUT)
    latency_rates: Sequence[float] = (100, 2_000, 20_000, 100_000)
    idles: Sequence[str] = ("spin", "adaptive", "sleep")
    interrupts: Sequence[str] = (ON_SENDERS_CORE, ON_RELAYS_CORE)
    backlogs: int = 20
    endurance_s: float = 600.0
    ring_mib: int = 16
    cut_egress: bool = False
    peers: Sequence[Peer] = ()
    peer_frames: Sequence[str] = (WIRE, SUPER)


@dataclass
class Bench:
    """Where parts run: the plan, the arenas that are open, and the results so far."""

    plan: Plan
    results: Results
    _stack: contextlib.ExitStack = field(default_factory=contextlib.ExitStack)
    _arenas: dict[int, Arena] = field(default_factory=dict)

    def arena(self, size: int = USUAL_SIZE) -> Arena:
        """The arena for payloads of this size."""
        mtu = mtu_for(size)
        if mtu not in self._arenas:
            self._arenas[mtu] = self._stack.enter_context(Arena(mtu, self.plan.cut_egress))
        return self._arenas[mtu]

    @contextlib.contextmanager
    def running(self, peer: Peer | None, arena: Arena, **setup: Any) -> Iterator[Running | None]:
        """A contender at work, None in place of one that could not start, with a note. No peer: nothing runs."""
        with contextlib.ExitStack() as stack:
            running = None
            try:
                if peer is None:
                    running = Running()
                else:
                    running = stack.enter_context(peer.running(arena, Setup(ring_mib=self.plan.ring_mib, **setup)))
            except (RuntimeError, AssertionError) as error:
                assert peer is not None
                self.results.note(f"{peer.name} did not start ({setup}): {str(error).splitlines()[0]}")
            try:
                yield running
            except EndedError as error:
                assert peer is not None
                self.results.note(f"{peer.name} {error}: the rest of its part is missing{last_line(arena)}")

    def close(self) -> None:
        """End all arenas."""
        self._stack.close()


def last_line(arena: Arena) -> str:
    """What a contender said last, if anything."""
    log = arena.folder / CONTENDER_LOG
    lines = log.read_text().splitlines() if log.exists() else []
    return f": {lines[-1]}" if lines else ""


def progress(text: str) -> None:
    """A line for whoever waits."""
    print(f"  {text}", file=sys.stderr, flush=True)
