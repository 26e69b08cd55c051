"""Receive one datagram, send one datagram: io_uring as plainly as can be, the baseline that coalescing is held against.

    recv ─▶ io_uring_enter ─▶ send     one system call takes the last datagram's SEND and the next one's RECV

Everything that the relay does beyond this (matching, counters, logs) is missing here, and so are batches, rings shared
with the kernel, and segmentation: what is compared is the way of moving packets.
"""

import signal
import socket
import sys
from typing import Any, Final

import numpy as np
from numba import njit

from logging_shm.atomics import int64, load_acquire_u32, store_release_u32
from relay.dataplane.syscalls import io_uring_enter
from relay.dataplane.uring import Uring
from tools.bench.relay.generator import GROUP, PORT

OUTPUT: Final = ("239.2.0.1", 6001)
INPUT_ADDRESS: Final = "10.1.0.2"
OUTPUT_ADDRESS: Final = "10.2.0.1"
IORING_OP_SEND: Final = 26
IORING_OP_RECV: Final = 27
IORING_ENTER_GETEVENTS: Final = 1
SO_RCVBUFFORCE: Final = 33
SOCKET_BUFFER_BYTES: Final = 64 << 20
BUFFERS: Final = 2  # one is sent while the other is received into
BUFFER_BYTES: Final = 65_536
RECEIVED: Final = 0  # user_data
ROUNDS: Final = 100_000  # then a look at signals


@njit(cache=True, nogil=True)
def prepare(sqes: Any, index: int, opcode: int, fd: int, address: int, length: int, user_data: int) -> None:
    """Fill one SQE."""
    sqe = sqes[index]
    sqe.opcode = opcode
    sqe.flags = 0
    sqe.fd = fd
    sqe.addr = address
    sqe.len = length
    sqe.msg_flags = 0
    sqe.user_data = user_data


@njit(cache=True, nogil=True)
def relay(ring: Any, sqes: Any, cqes: Any, buffers: Any, receive_fd: int, send_fd: int, rounds: int) -> int:
    """Relay `rounds` datagrams. `ring` is i8[6]: fd, sq tail address, sq mask, cq head and tail addresses, cq mask.

    Returns the number of sends that failed.
    """
    failed = int64(0)
    tail = int64(load_acquire_u32(ring[1]))
    sending = int64(0)  # bytes received in the last round
    for number in range(rounds):
        current = number % BUFFERS
        submitted = int64(1)
        if sending:
            address = buffers[1 - current].ctypes.data
            prepare(sqes, tail & ring[2], IORING_OP_SEND, send_fd, address, sending, 1)
            tail += 1
            submitted += 1
        prepare(sqes, tail & ring[2], IORING_OP_RECV, receive_fd, buffers[current].ctypes.data, BUFFER_BYTES, RECEIVED)
        tail += 1
        store_release_u32(ring[1], tail & 0xFFFFFFFF)
        outstanding = submitted
        while outstanding > 0:
            io_uring_enter(ring[0], submitted, outstanding, IORING_ENTER_GETEVENTS, 0)
            submitted = 0
            head = int64(load_acquire_u32(ring[3]))
            end = int64(load_acquire_u32(ring[4]))
            while head != end:
                cqe = cqes[head & ring[5]]
                if cqe.user_data == RECEIVED:
                    sending = max(int64(cqe.res), 0)
                elif cqe.res < 0:
                    failed += 1
                outstanding -= 1
                head = (head + 1) & 0xFFFFFFFF
            store_release_u32(ring[3], head)
    return failed


def open_input() -> socket.socket:
    """Joined to the generator's group."""
    sock = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
    sock.setsockopt(socket.SOL_SOCKET, SO_RCVBUFFORCE, SOCKET_BUFFER_BYTES)
    sock.bind((GROUP, PORT))
    membership = socket.inet_aton(GROUP) + socket.inet_aton(INPUT_ADDRESS)
    sock.setsockopt(socket.IPPROTO_IP, socket.IP_ADD_MEMBERSHIP, membership)
    return sock


def open_output() -> socket.socket:
    """Connected to the output's group."""
    sock = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
    sock.setsockopt(socket.IPPROTO_IP, socket.IP_MULTICAST_IF, socket.inet_aton(OUTPUT_ADDRESS))
    sock.connect(OUTPUT)
    return sock


def main() -> None:
    """Relay until SIGTERM."""
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    buffers = np.zeros((BUFFERS, BUFFER_BYTES), np.uint8)
    with Uring(4, (IORING_OP_SEND, IORING_OP_RECV)) as uring, open_input() as source, open_output() as target:
        ring = np.array(
            [uring.fd, uring.sq_tail_ptr, uring.sq_mask, uring.cq_head_ptr, uring.cq_tail_ptr, uring.cq_mask], np.int64
        )
        while True:
            if failed := relay(ring, uring.sqes, uring.cqes, buffers, source.fileno(), target.fileno(), ROUNDS):
                print(f"{failed} datagrams could not be sent", file=sys.stderr)


if __name__ == "__main__":
    main()
