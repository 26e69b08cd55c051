"""The keeper: what must outlive this supervisor - descriptors at the template, and the inventory in a file.

Owned by the supervisor's thread. Whenever something changed, `publish` sends the template what is new and writes the
inventory. A supervisor that is killed, or that starts anew for an upgrade, leaves rings, memberships and the control
socket open there, and the workers relaying; the next one takes them over (orphans.py).
"""

import contextlib
import os
import socket
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

from relay.descriptors import DESCRIPTORS_MAX, Channel, ChannelClosedError
from relay.errors import PreflightError
from relay.messages import Forget, Keep
from relay.supervisor.listener import refuse_foreign
from relay.supervisor.orphans import Inventory, handover_path, inventory_file

SOCKET_MODE = 0o600
BACKLOG = 8  # those that were killed while they waited for a template to load stay in the queue


class Descriptor(Protocol):
    """Something that has a descriptor: a socket, a stats segment."""

    def fileno(self) -> int:
        """Its number."""


class Keeper:
    """The hand-over socket, the inventory's file, and what the template holds."""

    def __init__(self, control_socket: Path) -> None:
        """Bind the hand-over socket. Raises PreflightError."""
        self._path = handover_path(control_socket)
        self._bound = self._path.with_suffix(".handover-next")  # until a former template is no more needed
        self._file = inventory_file(control_socket)
        self._sent: dict[str, Descriptor] = {}
        self._inventory: Inventory | None = None
        self._channel: Channel[Any] | None = None
        for path in (self._path, self._bound):
            refuse_foreign(path, f"hand-over socket {path}")
        self.listener = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        try:
            self._bound.unlink(missing_ok=True)
            os.fchmod(self.listener.fileno(), SOCKET_MODE)  # which bind(2) gives the file, less the umask
            self.listener.bind(str(self._bound))
            self.listener.listen(BACKLOG)
        except OSError as error:
            self.listener.close()
            raise PreflightError(
                f"hand-over socket {self._path}: {error.strerror}: give --socket another place"
            ) from error

    def attach(self, channel: Channel[Any] | None) -> None:
        """Go over to a new template, which holds nothing yet."""
        self._channel = channel
        self._sent = {}

    def publish(self, wanted: Mapping[str, Descriptor], inventory: Inventory) -> None:
        """Have exactly `wanted` kept, and `inventory` written. Raises RelayError when the file can't be written.

        From the first time on that all is kept it is this template that the next supervisor meets, and this inventory
        that it reads. What a busy template does not take now is sent with the next call.
        """
        if self._channel is not None:
            with contextlib.suppress(BlockingIOError, ChannelClosedError):
                self._synchronize(self._channel, wanted)
        if self._inventory is None and not self.is_complete(wanted):
            return
        if self._bound.exists():
            self._bound.replace(self._path)
        if inventory != self._inventory:
            self._file.save(inventory)
            self._inventory = inventory

    def is_complete(self, wanted: Mapping[str, Descriptor]) -> bool:
        """Whether the template holds exactly these."""
        return self._sent.keys() == wanted.keys() and all(self._sent[name] is wanted[name] for name in wanted)

    def _synchronize(self, channel: Channel[Any], wanted: Mapping[str, Descriptor]) -> None:
        gone = [name for name, sent in self._sent.items() if wanted.get(name) is not sent]
        for at in range(0, len(gone), DESCRIPTORS_MAX):
            some = gone[at : at + DESCRIPTORS_MAX]
            channel.send(Forget(tuple(some)))
            for name in some:
                del self._sent[name]
        new = [name for name in wanted if name not in self._sent]
        for at in range(0, len(new), DESCRIPTORS_MAX):
            some = new[at : at + DESCRIPTORS_MAX]
            channel.send(Keep(tuple(some)), [wanted[name].fileno() for name in some])
            self._sent |= {name: wanted[name] for name in some}

    def close(self, former_stays: bool = False) -> None:
        """Leave nothing for anybody; what a former supervisor left stays where its take-over has failed."""
        self.listener.close()
        with contextlib.suppress(OSError):
            self._bound.unlink(missing_ok=True)
            if not former_stays:
                self._path.unlink(missing_ok=True)
                self._file.remove()
