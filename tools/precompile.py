"""Fill the cache with the tools' compiled code: `python -m tools.precompile`, run by `make setup`."""

import numpy as np

from relay.dataplane.syscalls import load_liburing
from tools.payload import SEQ
from tools.receiving import make_receiver, receive
from tools.sending import SLOT_BYTES, make_sender, send_until


def main() -> None:
    """Call each compiled entry with nothing to do."""
    load_liburing()
    sender = make_sender([-1], np.array([0]), np.zeros(SLOT_BYTES, np.uint8), 1.0, 1, 0)
    send_until(sender, 0, 0, 1, True, SEQ, 0, 0)
    receive(make_receiver([-1], 0), 0, 0, 0)


if __name__ == "__main__":
    main()
