"""Every kernel layout against the C ABI: a program compiled from the kernel's and libc's headers prints the truth."""

import shutil
import socket
import subprocess
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from relay import bpf, health
from relay.cli.capture import tap
from relay.dataplane import layout, memory, send, uring, uring_params

HEADERS = (
    "stddef.h",
    "stdio.h",
    "poll.h",
    "sys/socket.h",
    "netinet/in.h",
    "linux/filter.h",
    "linux/if_packet.h",
    "linux/virtio_net.h",
    "linux/io_uring.h",
)
BLOCK_FIELDS: dict[str, str | None] = {
    name: f"hdr.bh1.{name}" for name in tap.TPACKET_BLOCK_DESC.names or () if name not in ("version", "offset_to_priv")
}
TPACKET3_FIELDS: dict[str, str | None] = {
    name: f"hv1.{name}" for name in ("tp_rxhash", "tp_vlan_tci", "tp_vlan_tpid")
} | {"tp_padding0": None}
# dtype, C type, and our field names where they differ: kernel unions, and names C has no right to
STRUCTS: list[tuple[str, Any, str, dict[str, str | None]]] = [
    ("TPACKET2_HDR", layout.TPACKET2_HDR, "struct tpacket2_hdr", {}),
    ("TPACKET_REQ3", tap.TPACKET_REQ3, "struct tpacket_req3", {}),
    ("TPACKET_BLOCK_DESC", tap.TPACKET_BLOCK_DESC, "struct tpacket_block_desc", BLOCK_FIELDS),
    ("TPACKET3_HDR", tap.TPACKET3_HDR, "struct tpacket3_hdr", TPACKET3_FIELDS),
    ("SOCKADDR_LL", layout.SOCKADDR_LL, "struct sockaddr_ll", {}),
    ("VIRTIO_NET_HDR", layout.VIRTIO_NET_HDR, "struct virtio_net_hdr", {}),
    ("IOVEC", layout.IOVEC, "struct iovec", {}),
    ("MSGHDR", layout.MSGHDR, "struct msghdr", {"pad0": None, "pad1": None}),
    ("MMSGHDR", layout.MMSGHDR, "struct mmsghdr", {"pad": None}),
    ("SOCKADDR_IN", layout.SOCKADDR_IN, "struct sockaddr_in", {}),
    ("SOCKADDR_IN6", layout.SOCKADDR_IN6, "struct sockaddr_in6", {}),
    ("POLLFD", memory.POLLFD, "struct pollfd", {}),
    ("IO_URING_SQE", layout.IO_URING_SQE, "struct io_uring_sqe", {"pad2": None}),
    ("IO_URING_CQE", layout.IO_URING_CQE, "struct io_uring_cqe", {}),
]
CONSTANTS = {
    "TP_STATUS_USER": layout.TP_STATUS_USER,
    "TP_STATUS_COPY": layout.TP_STATUS_COPY,
    "TP_STATUS_CSUMNOTREADY": layout.TP_STATUS_CSUMNOTREADY,
    "TP_STATUS_VLAN_VALID": layout.TP_STATUS_VLAN_VALID,
    "TP_STATUS_CSUM_VALID": layout.TP_STATUS_CSUM_VALID,
    "PACKET_OTHERHOST": layout.PACKET_OTHERHOST,
    "PACKET_OUTGOING": bpf.PACKET_OUTGOING,
    "TP_STATUS_VLAN_TPID_VALID": tap.TP_STATUS_VLAN_TPID_VALID,
    "TPACKET_V3": tap.TPACKET_V3,
    "TPACKET_ALIGN(sizeof(struct tpacket3_hdr)) + offsetof(struct sockaddr_ll, sll_pkttype)": tap.SLL_PKTTYPE,
    "(unsigned)SKF_AD_OFF + SKF_AD_PKTTYPE": bpf.SKF_AD_PKTTYPE,
    "IORING_SETUP_CQSIZE": uring_params.IORING_SETUP_CQSIZE,
    "IORING_SETUP_SUBMIT_ALL": uring_params.IORING_SETUP_SUBMIT_ALL,
    "IORING_SETUP_SINGLE_ISSUER": uring_params.IORING_SETUP_SINGLE_ISSUER,
    "CMSG_SPACE(2)": layout.CMSG_UDP_SEGMENT_BYTES,
    "CMSG_SPACE(4)": layout.CMSG_TTL_BYTES,
    "CMSG_SPACE(sizeof(struct in_pktinfo))": layout.CMSG_IP_PKTINFO_BYTES,
    "CMSG_SPACE(sizeof(struct in6_pktinfo))": layout.CMSG_IPV6_PKTINFO_BYTES,
    "IPV6_PKTINFO": send.IPV6_PKTINFO,
    "IPV6_HOPLIMIT": send.IPV6_HOPLIMIT,
    "IPPROTO_IPV6": send.IPPROTO_IPV6,
    "AF_INET6": socket.AF_INET6,
}


@pytest.fixture(scope="module")
def c_values(tmp_path_factory: pytest.TempPathFactory) -> dict[str, int]:
    """Sizes, offsets and constants as the C compiler sees them."""
    lines = ["#define _GNU_SOURCE", *(f"#include <{header}>" for header in HEADERS), "int main(void) {"]
    questions = list(CONSTANTS)
    for _, dtype, c_type, renamed in STRUCTS:
        questions.append(f"sizeof({c_type})")
        fields = [renamed.get(field, field) for field in dtype.names]
        questions += [f"offsetof({c_type}, {field})" for field in fields if field]
    lines += [f'printf("%s=%ld\\n", "{question}", (long)({question}));' for question in questions]
    folder = tmp_path_factory.mktemp("abi")
    (folder / "abi.c").write_text("\n".join([*lines, "return 0; }"]))
    compiler = shutil.which("cc")
    assert compiler is not None, "`make test` installs gcc"
    subprocess.run([compiler, "-w", "-o", str(folder / "abi"), str(folder / "abi.c")], check=True)
    output = subprocess.run([str(folder / "abi")], check=True, capture_output=True, text=True).stdout
    return {name: int(value) for name, _, value in (line.rpartition("=") for line in output.splitlines())}


@pytest.mark.parametrize(("name", "dtype", "c_type", "renamed"), STRUCTS, ids=[name for name, *_ in STRUCTS])
def test_kernel_structures_have_the_offsets_of_the_c_abi(
    c_values: dict[str, int], name: str, dtype: Any, c_type: str, renamed: dict[str, str | None]
) -> None:
    assert dtype.itemsize == c_values[f"sizeof({c_type})"]
    for field in dtype.names:
        c_name = renamed.get(field, field)
        if c_name:
            assert layout.offset_of(dtype, field) == c_values[f"offsetof({c_type}, {c_name})"], (name, field)


@pytest.mark.parametrize("name", CONSTANTS)
def test_constants_have_the_kernels_values(c_values: dict[str, int], name: str) -> None:
    assert CONSTANTS[name] == c_values[name]


def test_liburings_structures_agree_with_a_live_ring() -> None:
    """The mask and entries that liburing wrote are where our structures say."""
    with uring.Uring(64) as ring:
        assert ring.sq_mask == 63
        assert ring.cq_mask == 127
        assert len(ring.sqes) == 64
        assert len(ring.cqes) == 128
        assert Path(f"/proc/self/fd/{ring.fd}").readlink().name.endswith("[io_uring]")


SUPERVISORS_FIELDS = ("doorbell", "ring_full", "release")


def test_counters_of_the_worker_and_the_supervisor_share_no_cache_line() -> None:
    supervisors = {layout.offset_of(layout.STATS_HEADER, name) // 64 for name in SUPERVISORS_FIELDS}
    workers = {
        layout.offset_of(layout.STATS_HEADER, name) // 64
        for name in layout.STATS_HEADER.names or ()
        if name not in SUPERVISORS_FIELDS
    }
    assert not supervisors & workers


OWN = (
    *(layout.STATS_HEADER, layout.RULE_STATS, layout.OUTPUT_STATS, layout.TABLE_HEADER),
    *(layout.HEALTH, layout.STREAM, layout.PID),
)


@pytest.mark.parametrize("dtype", OWN)
def test_fields_of_own_layouts_do_not_overlap(dtype: Any) -> None:
    taken = np.zeros(dtype.itemsize, np.int64)
    for name in dtype.names:
        offset = layout.offset_of(dtype, name)
        taken[offset : offset + dtype.fields[name][0].itemsize] += 1
    assert taken.max() == 1


@pytest.mark.parametrize("dtype", [layout.HEALTH, layout.STREAM, layout.PID])
def test_what_is_read_while_it_is_written_is_never_torn(dtype: Any) -> None:
    for offset in (layout.STATS_HEALTH_OFFSET, layout.STATS_STREAMS_OFFSET, layout.STATS_PIDS_OFFSET, dtype.itemsize):
        assert offset % 8 == 0
    for name in dtype.names:
        element = dtype.fields[name][0].base
        assert layout.offset_of(dtype, name) % element.itemsize == 0, name


def test_what_every_datagram_of_a_stream_touches_is_in_two_cache_lines() -> None:
    assert layout.STREAM.itemsize % 64 == layout.STATS_STREAMS_OFFSET % 64 == 0
    assert layout.offset_of(layout.STREAM, "received_ns") + 8 == 64
    assert layout.offset_of(layout.STREAM, "missing_high") + 8 == 128


def test_payloads_are_named_as_their_flags_combine() -> None:
    assert health.PAYLOADS[layout.Payload.UDP] == "udp"
    assert health.PAYLOADS[layout.Payload.RTP] == "rtp"
    assert health.PAYLOADS[layout.Payload.MPEG_TS] == "mpeg-ts"
    assert health.PAYLOADS[layout.Payload.RTP | layout.Payload.MPEG_TS] == "rtp mpeg-ts"
