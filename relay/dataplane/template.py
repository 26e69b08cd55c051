"""The template: a process that has the compiled code loaded, and of which every worker is a fork.

So a worker starts in milliseconds. It starts privileged, to read the code wherever it lies, and gives up
privileges before it forks. It obeys the supervisor (Spawn) and tells it of exits; it ends with the
supervisor's stream. Run as `python -m relay.dataplane.template --fd N --uid U --gid G`.
"""

import argparse
import gc
import os
import select
import signal
import socket
import sys
import traceback

import numpy as np

from relay.dataplane import layout, loop, memory
from relay.dataplane.ring import find_cursor
from relay.dataplane.syscalls import load_liburing
from relay.dataplane.table import compile_table, view_table
from relay.dataplane.worker import main as run_worker
from relay.descriptors import Channel, ChannelClosedError
from relay.messages import Exited, Spawn, Spawned, TemplateReady, ToTemplate
from relay.privileges import drop_to

LOG_BYTES = 16_384  # of the log segment that warming up writes into: a header is all it needs


def load_compiled_code() -> None:
    """Compile the loop, or load it from the cache: run it once, with empty rings and nothing to do."""
    load_liburing()
    log = np.zeros(LOG_BYTES, np.uint8)
    worker_memory = memory.Memory(
        np.zeros(memory.SQ_ENTRIES, layout.IO_URING_SQE),
        np.zeros(2 * memory.SQ_ENTRIES, layout.IO_URING_CQE),
        np.zeros(layout.STATS_BYTES, np.uint8),
        (log, log, log, log),
    )
    worker_memory.worker["draining"] = 1
    worker_memory.worker["control_fd"] = -1
    table = view_table(compile_table((), (), 0))
    reason = loop.run(worker_memory.worker, table.view)
    assert reason == loop.DRAINED
    frame = np.zeros(layout.TPACKET2_HDR.itemsize, np.uint8)
    find_cursor(memory.address_of(frame), 1, len(frame), 0)


class Template:
    """Forks workers and reaps them."""

    def __init__(self, channel: Channel[ToTemplate]) -> None:
        self._channel = channel
        self._cores: dict[int, int] = {}  # by pid

    def run(self, wakeup: socket.socket) -> None:
        """Serve until the supervisor's stream ends, then wait for the workers, whose streams end with it."""
        while True:
            readable, _, _ = select.select([self._channel.fileno(), wakeup.fileno()], [], [])
            if wakeup.fileno() in readable:
                wakeup.recv(4096)
                self._reap()
            if self._channel.fileno() in readable:
                try:
                    message, descriptors = self._channel.receive()
                except ChannelClosedError:
                    return
                self._spawn(message, descriptors[0])

    def _spawn(self, spawn: Spawn, descriptor: int) -> None:
        pid = os.fork()
        if pid == 0:
            self._become_worker(spawn, descriptor)
        os.close(descriptor)
        self._cores[pid] = spawn.core
        self._channel.send(Spawned(spawn.core, pid))

    def _become_worker(self, spawn: Spawn, descriptor: int) -> None:
        status = 1
        try:
            signal.set_wakeup_fd(-1)
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)
            self._channel.close()
            run_worker(spawn.core, spawn.instance, spawn.idle, socket.socket(fileno=descriptor))
            status = 0
        except BaseException:
            traceback.print_exc()
        finally:
            sys.stderr.flush()
            os._exit(status)

    def _reap(self) -> None:
        while self._cores:
            pid, status = os.waitpid(-1, os.WNOHANG)
            if pid == 0:
                return
            self._channel.send(Exited(self._cores.pop(pid), pid, status))


def main() -> None:
    """Load, give up privileges, serve."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--fd", type=int, required=True)
    parser.add_argument("--uid", type=int, required=True)
    parser.add_argument("--gid", type=int, required=True)
    arguments = parser.parse_args()
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # a terminal's Ctrl-C reaches all; the supervisor decides
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    load_compiled_code()
    drop_to(arguments.uid, arguments.gid)
    gc.freeze()
    wakeup, signalled = socket.socketpair()
    signalled.setblocking(False)
    signal.set_wakeup_fd(signalled.fileno())
    signal.signal(signal.SIGCHLD, lambda *_: None)
    channel: Channel[ToTemplate] = Channel(socket.socket(fileno=arguments.fd), ToTemplate)
    channel.send(TemplateReady())
    try:
        Template(channel).run(wakeup)
    except ChannelClosedError:
        return


if __name__ == "__main__":
    main()
