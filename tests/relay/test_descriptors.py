"""Channels: what arrives with a message belongs to its receiver alone."""

import os
import socket

from relay.descriptors import Channel
from relay.messages import Keep, ToTemplate


def test_descriptors_that_arrive_are_closed_when_another_program_is_executed() -> None:
    """Else each restart would leave the rings and memberships of the last one open for ever."""
    end, far = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    near: Channel[ToTemplate] = Channel(end, ToTemplate)
    sent = socket.socket(socket.AF_UNIX)
    with far, sent:
        Channel(far, ToTemplate).send(Keep(("name",)), [sent.fileno()])
        message, (received,) = near.receive()
    assert message == Keep(("name",))
    assert not os.get_inheritable(received)
    os.close(received)
    near.close()
