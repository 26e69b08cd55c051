"""Socket addresses, compared with what `ipaddress` says and with what the kernel takes."""

import ipaddress
import socket

from hypothesis import given
from hypothesis import strategies as st

from relay.sockaddr import is_of_link, sockaddr, sockaddr_storage

PREFIXES = [0, 0xFE80 << 112, 0xFEBF << 112, 0xFEC0 << 112, 0xFD00 << 112, *(0xFF30 + n << 112 for n in range(16))]
IPV6 = st.tuples(st.sampled_from(PREFIXES), st.integers(0, 2**64)).map(lambda p: ipaddress.IPv6Address(p[0] | p[1]))


@given(IPV6)
def test_what_exists_once_a_link_is_told(address: ipaddress.IPv6Address) -> None:
    is_group_of_link = address.is_multicast and address.packed[1] & 0xF <= 2
    assert is_of_link(str(address)) == (address.is_link_local or is_group_of_link)


@given(st.ip_addresses())
def test_a_storage_holds_what_bind_takes(address: ipaddress.IPv4Address | ipaddress.IPv6Address) -> None:
    raw = sockaddr_storage(str(address), 7)
    assert len(raw) == 128
    assert int.from_bytes(raw[:2], "little") == (socket.AF_INET if address.version == 4 else socket.AF_INET6)
    at = 4 if address.version == 4 else 8
    assert raw[at : at + len(address.packed)] == address.packed
    scope = sockaddr(str(address), 5, 7)[3:]
    assert int.from_bytes(raw[24:28], "little") == (scope[0] if scope else 0)
    assert not is_of_link(str(ipaddress.IPv4Address("169.254.1.1")))
