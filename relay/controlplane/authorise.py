"""Who may ask what: by the credentials that the kernel attaches to a client's connection.

SO_PEERCRED and SO_PEERGROUPS (man 7 unix) tell user and groups as they were when the client connected.
"""

import socket
import struct
from collections.abc import Collection
from dataclasses import dataclass

from relay.api import Change, LogLevel, Request, Restart
from relay.credentials import peer_of
from relay.errors import ControlError
from relay.privileges import overflow_id

SO_PEERGROUPS = 59  # asm-generic/socket.h
GROUPS_BYTES_MAX = 1024  # of Python's getsockopt; of a user with more groups than 256 only the first one counts
ROOT = 0


@dataclass(frozen=True)
class Peer:
    """Who opened a connection, and whether that one may change things."""

    uid: int
    may_change: bool


def _credentials(client: socket.socket) -> tuple[int, set[int]]:
    """User and groups of who opened the connection."""
    _, uid, gid = peer_of(client)
    try:
        groups = client.getsockopt(socket.SOL_SOCKET, SO_PEERGROUPS, GROUPS_BYTES_MAX)
    except OSError:
        return uid, {gid}
    return uid, {gid, *struct.unpack(f"@{len(groups) // 4}I", groups)}


class Access:
    """Root, the relay's own user and the members of a group may change things; everybody who connects may look.

    Not so `nobody`, as which the relay runs by default: other programs do, too, and users of another user namespace
    appear under that number.
    """

    def __init__(self, own_uid: int, trusted_gid: int | None) -> None:
        self._trusted_uids: Collection[int] = {ROOT, own_uid} - {overflow_id("uid")}
        self._trusted_gid = trusted_gid

    def peer(self, client: socket.socket) -> Peer:
        """Who is at the other end."""
        uid, gids = _credentials(client)
        return Peer(uid, uid in self._trusted_uids or self._trusted_gid in gids)


def changes_something(request: Request) -> bool:
    """Whether a request is more than a look."""
    return isinstance(request, Change | Restart) or (isinstance(request, LogLevel) and request.level is not None)


def authorise(request: Request, peer: Peer) -> None:
    """Raises ControlError when the peer may not ask this."""
    if changes_something(request) and not peer.may_change:
        raise ControlError(f"user id {peer.uid} may look but not change anything: use sudo")
