"""The supervisor's children: starting the control plane and the template, and knowing when they end.

Each is a new Python process with one end of a socket pair; it ends when the supervisor's end closes.
"""

import os
import signal
import socket
import subprocess
import sys
from collections.abc import Sequence

from relay.descriptors import Channel, channel_pair
from relay.errors import RelayError
from relay.messages import FromTemplate


class MisbehaviourError(Exception):
    """A child sent what it must not; the text says what."""


def _start(module: str, arguments: Sequence[str], descriptors: Sequence[int]) -> subprocess.Popen[bytes]:
    """Run a module in a process group of its own: a terminal's Ctrl-C is the supervisor's affair.

    Raises RelayError.
    """
    try:
        return subprocess.Popen(
            [sys.executable, "-m", module, *arguments],
            pass_fds=descriptors,
            stdin=subprocess.DEVNULL,
            process_group=0,
        )
    except OSError as error:
        raise RelayError(f"{module} can't be started with {sys.executable}: {error.strerror}") from error


def start_template(
    uid: int, gid: int, handover: socket.socket
) -> tuple[subprocess.Popen[bytes], Channel[FromTemplate]]:
    """Start the process that workers are forked from, and that the next supervisor meets at `handover`."""
    channel: Channel[FromTemplate]
    channel, far = channel_pair(FromTemplate)
    with far:
        arguments = ["--fd", str(far.fileno()), "--uid", str(uid), "--gid", str(gid)]
        arguments += ["--handover-fd", str(handover.fileno()), "--heir-uid", str(os.geteuid())]
        return _start("relay.dataplane.template", arguments, [far.fileno(), handover.fileno()]), channel


def start_control_plane(
    listener: socket.socket, uid: int, gid: int, instance: str | None, trusted_gid: int | None
) -> tuple[subprocess.Popen[bytes], socket.socket]:
    """Start the control plane, which serves `listener`; return our end of the stream to it.

    Members of `trusted_gid` may change things.
    """
    near, far = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
    near.setblocking(False)
    with far:
        arguments = ["--supervisor-fd", str(far.fileno()), "--listener-fd", str(listener.fileno())]
        arguments += ["--uid", str(uid), "--gid", str(gid)]
        arguments += ["--instance", instance] if instance else []
        arguments += ["--trusted-gid", str(trusted_gid)] if trusted_gid is not None else []
        return _start("relay.controlplane", arguments, [far.fileno(), listener.fileno()]), near


def describe_status(code: int) -> str:
    """How a process ended, from an exit code that is negative for a signal (os.waitstatus_to_exitcode)."""
    if code >= 0:
        return f"exit status {code}"
    try:
        name = f"signal {signal.Signals(-code).name}"
    except ValueError:  # most real-time signals have no name
        return f"signal {-code}"
    return f"{name}: a system call that its seccomp filter does not allow" if -code == signal.SIGSYS else name
