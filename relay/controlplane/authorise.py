"""Who may ask what: by the credentials that the kernel attaches to a client's connection (SO_PEERCRED, man 7 unix)."""

import socket
import struct
from collections.abc import Collection

from relay.api import AddRules, LogLevel, RemoveRules, Request, Restart
from relay.errors import ControlError

UCRED = struct.Struct("@iII")  # struct ucred: pid, uid, gid


def peer_uid(client: socket.socket) -> int:
    """The user that opened the connection."""
    _, uid, _ = UCRED.unpack(client.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, UCRED.size))
    return int(uid)


def changes_something(request: Request) -> bool:
    """Whether a request is more than a look."""
    return isinstance(request, AddRules | RemoveRules | Restart) or (
        isinstance(request, LogLevel) and request.level is not None
    )


def authorise(request: Request, uid: int, trusted_uids: Collection[int]) -> None:
    """Let everybody look, and only root and the relay's own user change. Raises ControlError."""
    if changes_something(request) and uid not in trusted_uids:
        raise ControlError(f"user id {uid} may look but not change anything: use sudo")
