"""The data plane's log records: number and format of each, one source for writer and reader.

Written by the compiled loop with typed arguments, rendered by whoever reads the ring.
"""

from typing import Final

from logging_shm.layout import pair_key
from relay.dataplane.layout import DropCause

FIRST_PACKET: Final = 1
GSO_REFUSED: Final = 3
SENT: Final = 4
RECEIVED: Final = 5
RING_FILL_ABOVE: Final = 6
RING_FILL_BELOW: Final = 7
DROPS_BY_CAUSE_FIRST: Final = 16  # plus the DropCause
KEY_RULE: Final = pair_key("rule")

FORMATS: Final[dict[int, str]] = {
    FIRST_PACKET: "First packet of rule {rule} from {0:endpoint}",
    GSO_REFUSED: "Segmentation refused with errno {0:d} on output {1:d}, sending singly from now on",
    SENT: "Sent {1:d} datagrams, {2:d} bytes to output {0:d}",
    RECEIVED: "Received {6:d} datagrams, {7:d} bytes from {0:endpoint} to {3:endpoint}",
    RING_FILL_ABOVE: "Ring {0:d} is over {1:d}% full",
    RING_FILL_BELOW: "Ring {0:d} is back under {1:d}%",
    **{
        DROPS_BY_CAUSE_FIRST + cause: f"Dropped {{0:d}} datagrams: {cause.name.lower()} ({{1:d}} since start)"
        for cause in DropCause
        if cause is not DropCause.NONE
    },
}

# Events that a fault can make come in storms: so many a second, so many at once; the rest is counted and told.
LIMITS: Final[dict[int, tuple[float, int]]] = {
    GSO_REFUSED: (10, 100),
    RING_FILL_ABOVE: (1, 10),
    RING_FILL_BELOW: (1, 10),
}
