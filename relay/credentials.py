"""Who is at the other end of a Unix socket, by the kernel's word. man 7 unix, SO_PEERCRED."""

import socket
import struct

UCRED = struct.Struct("@iII")  # struct ucred: pid, uid, gid


def peer_of(end: socket.socket) -> tuple[int, int, int]:
    """Pid, uid and gid of who connected, or for a client of who called listen(2). Raises OSError."""
    pid, uid, gid = UCRED.unpack(end.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, UCRED.size))
    return pid, uid, gid
