"""Keys: what a terminal sends, as names of keys. Pure: bytes in, names out.

Source: man 4 console_codes, ECMA-48; xterm's ctlseqs for application mode.
"""

ESCAPE = 0x1B
SEQUENCES = {
    b"[A": "up",
    b"[B": "down",
    b"[C": "right",
    b"[D": "left",
    b"OA": "up",
    b"OB": "down",
    b"OC": "right",
    b"OD": "left",
    b"[5~": "page up",
    b"[6~": "page down",
    b"[H": "home",
    b"[F": "end",
    b"OH": "home",
    b"OF": "end",
    b"[1~": "home",
    b"[4~": "end",
    b"[7~": "home",
    b"[8~": "end",
}
CONTROLS = {
    0x0A: "enter",
    0x0D: "enter",
    0x08: "backspace",
    0x7F: "backspace",
    0x15: "kill",
    0x06: "page down",
    0x02: "page up",
}
SEQUENCE_BYTES_MAX = 16


def _is_whole(sequence: bytes) -> bool:
    """Whether the final byte of a sequence that begins with `[` or `O` has come."""
    return len(sequence) > 1 and (sequence[:1] == b"O" or 0x40 <= sequence[-1] <= 0x7E)


class Keys:
    """Decodes keys; what of a sequence has not come yet is waited for."""

    def __init__(self) -> None:
        self._pending = b""

    @property
    def is_waiting(self) -> bool:
        """Whether an escape has come that may begin a sequence, or be the key itself."""
        return bool(self._pending)

    def feed(self, received: bytes) -> list[str]:
        """The keys that are complete."""
        keys = []
        for byte in received:
            if self._pending:
                keys += self._go_on(byte)
            elif byte == ESCAPE:
                self._pending = bytes([byte])
            elif byte in CONTROLS:
                keys.append(CONTROLS[byte])
            elif 0x20 <= byte < 0x7F:
                keys.append(chr(byte))
        return keys

    def _go_on(self, byte: int) -> list[str]:
        if byte == ESCAPE:
            self._pending = bytes([byte])
            return ["escape"]
        if len(self._pending) == 1 and byte not in b"[O":  # the key itself, and another behind it
            self._pending = b""
            return ["escape", *self.feed(bytes([byte]))]
        self._pending += bytes([byte])
        sequence = self._pending[1:]
        if not _is_whole(sequence) and len(sequence) < SEQUENCE_BYTES_MAX:
            return []
        self._pending = b""
        key = SEQUENCES.get(sequence)
        return [key] if key else []

    def flush(self) -> list[str]:
        """Nothing more came: an escape by itself was the key."""
        alone, self._pending = self._pending == bytes([ESCAPE]), b""
        return ["escape"] if alone else []
