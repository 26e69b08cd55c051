"""Start of the control plane: `python -m relay.controlplane`, by the supervisor alone."""

import argparse
import asyncio
import os
import signal
import socket

from logging_shm import ControlPlaneLogging, Facility
from relay.controlplane.authorise import Access
from relay.controlplane.server import ControlPlane
from relay.privileges import drop_to


def main() -> None:
    """Give up privileges, then serve."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--supervisor-fd", type=int, required=True)
    parser.add_argument("--listener-fd", type=int, required=True)
    parser.add_argument("--uid", type=int, required=True)
    parser.add_argument("--gid", type=int, required=True)
    parser.add_argument("--instance")
    parser.add_argument("--trusted-gid", type=int)
    arguments = parser.parse_args()
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    drop_to(arguments.uid, arguments.gid)
    with ControlPlaneLogging.attach(arguments.instance) as logging:
        plane = ControlPlane(
            logging.logger(Facility.ControlPlane),
            socket.socket(fileno=arguments.supervisor_fd),
            socket.socket(fileno=arguments.listener_fd),
            Access(os.getuid(), arguments.trusted_gid),
        )
        asyncio.run(plane.run())


if __name__ == "__main__":
    main()
