"""`mcrctl capture`: both sides of one rule into a pcapng file, with packet sockets of its own, beside the relay.

    rule ─▶ sides.py ─▶ tap.py ─▶ offload.py ─▶ session.py ─▶ pcapng.py ─▶ file
            what,       ring of   what a wire   in order
            where       a tap     would carry   of time

A tap is in front of what `--exclusive` drops, and of everything else that the host does with a packet.
"""
