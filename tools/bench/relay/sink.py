"""The sink: an nft hook at the last cable's end counts datagrams and drops them, for some 50 ns each.

It runs in the sender's softirq, so no process of the sink's competes for a core. A super-frame counts once there and
brings one pair of headers, so datagrams follow from packets and bytes together.
"""

import json
import time
from dataclasses import dataclass
from typing import Any, NamedTuple

from tools.netns import Host

INTERFACE = "left"
PORTS = (5001, 6001)  # the generator's, where a contender rewrites nothing; the rules' output
HEADER_BYTES = 28  # IPv4 and UDP
SETTLE_S = 0.03
SETTLE_ROUNDS_MAX = 100
RULESET = f"""
table netdev bench {{
    counter relayed {{ }}
    chain ingress {{
        type filter hook ingress device "{INTERFACE}" priority 0; policy accept;
    }}
}}
"""
COUNT_RULE = f"udp dport {{ {', '.join(map(str, PORTS))} }} counter name relayed"


class Counted(NamedTuple):
    """The counter: frames, and their bytes from the IP header on."""

    packets: int
    bytes: int

    def datagrams(self, before: "Counted", size: int) -> int:
        """How many datagrams of `size` came since."""
        payload_bytes = self.bytes - before.bytes - HEADER_BYTES * (self.packets - before.packets)
        return round(payload_bytes / size)


@dataclass
class Sink:
    """The counter in a host."""

    host: Host

    def __post_init__(self) -> None:
        self._nft("-f", "-", ruleset=RULESET)
        self.count()

    def _nft(self, *arguments: str, ruleset: str | None = None) -> str:
        result = self.host.run(["nft", *arguments], input=ruleset, capture_output=True)
        if result.returncode:
            raise RuntimeError(f"nft {' '.join(arguments)}: {result.stderr.strip()}")
        return str(result.stdout)

    def count(self) -> None:
        """Count and drop."""
        self._nft("flush", "chain", "netdev", "bench", "ingress")
        self._nft("add", "rule", "netdev", "bench", "ingress", *COUNT_RULE.split(), "drop")

    def deliver(self) -> None:
        """Let datagrams through to sockets."""
        self._nft("flush", "chain", "netdev", "bench", "ingress")

    def read(self) -> Counted:
        """The counter now."""
        answer: Any = json.loads(self._nft("-j", "list", "counter", "netdev", "bench", "relayed"))
        counter = next(entry["counter"] for entry in answer["nftables"] if "counter" in entry)
        return Counted(counter["packets"], counter["bytes"])

    def settled(self) -> Counted:
        """The counter when nothing more arrives."""
        last = self.read()
        for _ in range(SETTLE_ROUNDS_MAX):
            time.sleep(SETTLE_S)
            now = self.read()
            if now == last:
                break
            last = now
        return last
