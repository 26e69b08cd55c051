"""The template: a process that has the compiled code loaded, and of which every worker is a fork.

So a worker starts in milliseconds. It starts privileged, to read the code wherever it lies; it gives up privileges
and confines itself before it forks. It obeys the supervisor (Spawn) and tells it of exits. It also holds the
descriptors that must outlive a supervisor: when that one is gone, the next one fetches them at the hand-over socket
(`Kept`), and the workers go on meanwhile. It ends when it is told to leave, or some seconds after its last worker:
until then another one can go on in the rings that those left.
"""

import argparse
import contextlib
import gc
import os
import select
import signal
import socket
import sys
import traceback
from collections.abc import Iterable, Sequence

import numpy as np

from relay.confinement.roles import confine_template
from relay.credentials import peer_of
from relay.dataplane import CACHE_DIRECTORY, layout, loop, memory
from relay.dataplane.copies import COPIES_BYTES
from relay.dataplane.ring import find_cursor, resume_copies
from relay.dataplane.streams import prune, rebuild_index
from relay.dataplane.syscalls import load_liburing
from relay.dataplane.table import compile_table, view_table
from relay.dataplane.worker import main as run_worker
from relay.descriptors import DESCRIPTORS_MAX, Channel, ChannelClosedError
from relay.errors import PreflightError
from relay.messages import Exited, Forget, Keep, Kept, KeptAll, Leave, Spawn, Spawned, TemplateReady, ToTemplate
from relay.privileges import drop_to
from relay.trust import check_cache, trusted_uids

WORKER_NICE = -10  # nine times the time of others, where a core is shared after all
LINGER_S = 5.0  # without supervisor and workers: the next supervisor's are there a second after its start
LOG_BYTES = 16_384  # of the log segment that warming up writes into: a header is all it needs


def load_compiled_code() -> None:
    """Compile the loop, or load it from the cache: run it once, with empty rings and nothing to do."""
    load_liburing()
    log = np.zeros(LOG_BYTES, np.uint8)
    worker_memory = memory.Memory(
        np.zeros(memory.SQ_ENTRIES, layout.IO_URING_SQE),
        np.zeros(2 * memory.SQ_ENTRIES, layout.IO_URING_CQE),
        np.zeros(layout.STATS_BYTES, np.uint8),
        np.zeros(COPIES_BYTES, np.uint8),
        (log, log, log, log),
    )
    worker_memory.worker["draining"] = 1
    worker_memory.worker["control_fd"] = -1
    table = view_table(compile_table((), (), 0))
    reason = loop.run(worker_memory.worker, table.view)
    assert reason == loop.DRAINED
    frame = np.zeros(layout.TPACKET2_HDR.itemsize, np.uint8)
    find_cursor(memory.address_of(frame), 1, len(frame), 0)
    resume_copies(worker_memory.worker, 0)
    rebuild_index(worker_memory.worker)
    prune(worker_memory.worker, table.view)
    loop.run_pass(worker_memory.worker, table.view)


class Template:
    """Forks workers and reaps them; keeps descriptors for the next supervisor, whose user is `heir_uid`."""

    def __init__(self, channel: Channel[ToTemplate], handover: socket.socket, heir_uid: int) -> None:
        self._channel: Channel[ToTemplate] | None = channel
        self._handover = handover
        self._heir_uid = heir_uid
        self._cores: dict[int, int] = {}  # by pid
        self._kept: dict[str, int] = {}  # descriptors by name

    def run(self, wakeup: socket.socket) -> None:
        """Serve supervisors, one after the other, until one says to leave or nobody is left and nobody comes."""
        while self._serve(wakeup):
            pass

    def _serve(self, wakeup: socket.socket) -> bool:
        """Wait for the next event and deal with it; False when told to leave, or when none came for too long."""
        supervisor = self._channel or self._handover
        waiting = select.poll()  # select(2) takes no descriptor above 1 023, and thousands may be kept
        waiting.register(supervisor, select.POLLIN)
        waiting.register(wakeup, select.POLLIN)
        is_alone = self._channel is None and not self._cores
        readable = {descriptor for descriptor, _ in waiting.poll(LINGER_S * 1000 if is_alone else None)}
        if not readable:
            return False
        if wakeup.fileno() in readable:
            wakeup.recv(4096)
            self._reap()
        if supervisor.fileno() not in readable:
            return True
        if self._channel is None:
            self._accept()
            return True
        try:
            message, descriptors = self._channel.receive()
        except ChannelClosedError:
            self._channel.close()
            self._channel = None
            return bool(self._kept)  # with nothing for an heir, there is no reason to stay
        match message:
            case Spawn():
                self._spawn(self._channel, message, descriptors)
            case Keep():
                self._forget(message.names)
                self._kept |= zip(message.names, descriptors, strict=True)
            case Forget():
                self._forget(message.names)
            case Leave():
                return False
        return True

    def _forget(self, names: Iterable[str]) -> None:
        for name in names:
            descriptor = self._kept.pop(name, None)
            if descriptor is not None:
                os.close(descriptor)

    def _accept(self) -> None:
        """Hand everything that is kept to the next supervisor, if it is one."""
        end, _ = self._handover.accept()
        _, uid, _ = peer_of(end)
        if uid not in (0, self._heir_uid):
            end.close()
            return
        channel: Channel[ToTemplate] = Channel(end, ToTemplate)
        names = list(self._kept)
        try:
            for at in range(0, len(names), DESCRIPTORS_MAX):
                some = names[at : at + DESCRIPTORS_MAX]
                channel.send(Kept(tuple(some)), [self._kept[name] for name in some])
            channel.send(KeptAll())
        except (ChannelClosedError, OSError):
            channel.close()
            return
        self._channel = channel

    def _spawn(self, channel: Channel[ToTemplate], spawn: Spawn, descriptors: Sequence[int]) -> None:
        pid = os.fork()
        if pid == 0:
            self._become_worker(spawn, *descriptors)
        for descriptor in descriptors:
            os.close(descriptor)
        self._cores[pid] = spawn.core
        with contextlib.suppress(ChannelClosedError):  # that it is gone is noticed when all is read that it has sent
            channel.send(Spawned(spawn.core, pid))

    def _become_worker(self, spawn: Spawn, end: int, copies: int) -> None:
        status = 1
        try:
            signal.set_wakeup_fd(-1)
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)
            self._close_all()
            run_worker(spawn, socket.socket(fileno=end), copies)
            status = 0
        except BaseException:
            traceback.print_exc()
        finally:
            sys.stderr.flush()
            os._exit(status)

    def _close_all(self) -> None:
        """In a new worker: none of this is its own."""
        self._forget(list(self._kept))
        self._handover.close()
        if self._channel is not None:
            self._channel.close()

    def _reap(self) -> None:
        while self._cores:
            pid, status = os.waitpid(-1, os.WNOHANG)
            if pid == 0:
                return
            core = self._cores.pop(pid)
            if self._channel is not None:
                with contextlib.suppress(ChannelClosedError):
                    self._channel.send(Exited(core, pid, status))


def main() -> None:
    """Load, give up privileges, serve."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--fd", type=int, required=True)
    parser.add_argument("--handover-fd", type=int, required=True)
    parser.add_argument("--heir-uid", type=int, required=True)
    parser.add_argument("--uid", type=int, required=True)
    parser.add_argument("--gid", type=int, required=True)
    arguments = parser.parse_args()
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # a terminal's Ctrl-C reaches all; the supervisor decides
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        check_cache(CACHE_DIRECTORY, trusted_uids())
    except PreflightError as error:
        sys.exit(f"mcrd: {error}")
    load_compiled_code()
    with contextlib.suppress(PermissionError):
        os.setpriority(os.PRIO_PROCESS, 0, WORKER_NICE)  # inherited by workers
    drop_to(arguments.uid, arguments.gid)
    gc.freeze()
    wakeup, signalled = socket.socketpair()
    signalled.setblocking(False)
    signal.set_wakeup_fd(signalled.fileno())
    signal.signal(signal.SIGCHLD, lambda *_: None)
    channel: Channel[ToTemplate] = Channel(socket.socket(fileno=arguments.fd), ToTemplate)
    handover = socket.socket(fileno=arguments.handover_fd)
    confine_template()
    with contextlib.suppress(ChannelClosedError):  # gone meanwhile: then what it gave to keep waits to be read
        channel.send(TemplateReady())
    Template(channel, handover, arguments.heir_uid).run(wakeup)


if __name__ == "__main__":
    main()
