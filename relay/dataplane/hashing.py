"""The hash of the rule table: one function, compiled for the workers, interpreted where tables are made."""


def hash_key(dst: int, port: int, ring: int, src: int) -> int:
    """A non-negative 32-bit hash of a key; multipliers are those of xxHash32."""
    h = (dst * 0x9E3779B1 + src * 0x85EBCA77) & 0xFFFFFFFF
    h = (h ^ (h >> 15)) + ((port << 4) | ring) * 0xC2B2AE3D
    h &= 0xFFFFFFFF
    h ^= h >> 13
    h = (h * 0x27D4EB2F) & 0xFFFFFFFF
    return h ^ (h >> 16)
