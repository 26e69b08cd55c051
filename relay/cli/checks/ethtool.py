"""The offloads of an interface by name, as `ethtool -k` shows them: asked by ioctl, which everybody may.

Source: linux/ethtool.h (struct ethtool_sset_info, ethtool_gstrings, ethtool_gfeatures), linux/sockios.h.
"""

import ctypes
import socket
import struct

SIOCETHTOOL = 0x8946
ETHTOOL_GSTRINGS = 0x1B
ETHTOOL_GSSET_INFO = 0x37
ETHTOOL_GFEATURES = 0x3A
ETH_SS_FEATURES = 4
ETH_GSTRING_LEN = 32
IFNAMSIZ = 16
IFREQ_BYTES = 40
SSET_INFO = struct.Struct("@IIQI4x")  # cmd, reserved, sset_mask, data[1]
GSTRINGS = struct.Struct("@III")  # cmd, string_set, len
GFEATURES = struct.Struct("@II")  # cmd, size
FEATURE_BLOCK = struct.Struct("@IIII")  # available, requested, active, never_changed: of 32 features


def _ask(sock: socket.socket, name: str, request: bytes) -> bytes:
    """The answer to one command, in the place of the request. Raises OSError."""
    buffer = ctypes.create_string_buffer(request, len(request))
    ifreq = name.encode().ljust(IFNAMSIZ, b"\0") + struct.pack("@P", ctypes.addressof(buffer))
    block = ctypes.create_string_buffer(ifreq, IFREQ_BYTES)
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.ioctl(sock.fileno(), ctypes.c_ulong(SIOCETHTOOL), block):
        raise OSError(ctypes.get_errno(), "SIOCETHTOOL")
    return buffer.raw


def offloads(name: str) -> dict[str, bool]:
    """Whether each feature of the interface is on, {} where the kernel does not tell."""
    try:
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
            known = SSET_INFO.unpack(_ask(sock, name, SSET_INFO.pack(ETHTOOL_GSSET_INFO, 0, 1 << ETH_SS_FEATURES, 0)))
            count = known[3]
            head = GSTRINGS.pack(ETHTOOL_GSTRINGS, ETH_SS_FEATURES, count)
            texts = _ask(sock, name, head + bytes(count * ETH_GSTRING_LEN))[GSTRINGS.size :]
            blocks = -(-count // 32)
            request = GFEATURES.pack(ETHTOOL_GFEATURES, blocks) + bytes(blocks * FEATURE_BLOCK.size)
            answer = _ask(sock, name, request)[GFEATURES.size :]
    except OSError:
        return {}
    active = [FEATURE_BLOCK.unpack_from(answer, at)[2] for at in range(0, len(answer), FEATURE_BLOCK.size)]
    features = {}
    for number in range(count):
        text = texts[number * ETH_GSTRING_LEN :][:ETH_GSTRING_LEN].partition(b"\0")[0].decode(errors="replace")
        features[text] = bool(active[number // 32] >> number % 32 & 1)
    return features
