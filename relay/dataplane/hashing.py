"""The hash of the rule table: compiled for the workers, interpreted where tables are made."""


def fold(first: int, second: int) -> int:
    """The 32 bits of an address that are hashed; an IPv4 address (relay/addresses.py) loses none."""
    mixed = first ^ second
    return (mixed ^ (mixed >> 32)) & 0xFFFFFFFF


def hash_key(dst: int, port: int, ring: int, src: int) -> int:
    """A non-negative 32-bit hash of a key, addresses folded; multipliers are those of xxHash32."""
    h = (dst * 0x9E3779B1 + src * 0x85EBCA77) & 0xFFFFFFFF
    h = (h ^ (h >> 15)) + ((port << 4) | ring) * 0xC2B2AE3D
    h &= 0xFFFFFFFF
    h ^= h >> 13
    h = (h * 0x27D4EB2F) & 0xFFFFFFFF
    return h ^ (h >> 16)
