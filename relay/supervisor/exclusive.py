"""Exclusive ingress: keeps the host's own stack from handling a second time what the rules relay.

The packet ring is a tap: each datagram also goes up the host's stack, which finds nobody and drops it late.
With `--exclusive` a set lookup at the interface's ingress hook, behind the tap, drops it early. Local receivers of
a rule's input then get nothing. Fragments are left alone: all but the first have no port.

Owned by the supervisor's thread. The table has the flag `owner`: nobody else changes it, and the kernel removes it
with the netlink socket of this process, however the process ends.
Source: man 3 libnftables, man 8 nft, net/netfilter/nf_tables_api.c (NFT_TABLE_F_OWNER).
"""

import ctypes
from collections.abc import Collection, Iterator, Mapping

from relay.addresses import is_ipv6
from relay.errors import PreflightError, RelayError

LIBRARY = "libnftables.so.1"
UNQUOTABLE = '"\\'

Input = tuple[str, int]  # destination address and port
Interface = tuple[str, int]  # name, ifindex


def _load() -> ctypes.CDLL:
    try:
        library = ctypes.CDLL(LIBRARY)
    except OSError:
        raise PreflightError(
            f"--exclusive needs {LIBRARY}: install nftables (Debian: libnftables1), or start without"
        ) from None
    library.nft_ctx_new.restype = ctypes.c_void_p
    library.nft_ctx_new.argtypes = [ctypes.c_uint32]
    library.nft_ctx_free.argtypes = [ctypes.c_void_p]
    library.nft_ctx_buffer_error.argtypes = [ctypes.c_void_p]
    library.nft_ctx_get_error_buffer.restype = ctypes.c_char_p
    library.nft_ctx_get_error_buffer.argtypes = [ctypes.c_void_p]
    library.nft_run_cmd_from_buffer.argtypes = [ctypes.c_void_p, ctypes.c_char_p]
    return library


class Exclusive:
    """One nftables table of family netdev: for each interface a set of inputs of each IP version, and a chain at the
    ingress hook.

    Interfaces' names must be the kernel's own: libnftables aborts the process over one that is too long.
    """

    def __init__(self, instance: str | None) -> None:
        """Make the table. Raises PreflightError when the library is missing or the kernel refuses."""
        self.table = f"mcr_{instance}" if instance else "mcr"
        self._library = _load()
        self._context = self._library.nft_ctx_new(0)
        self._library.nft_ctx_buffer_error(self._context)
        self._dropped: dict[Interface, set[Input]] = {}
        try:
            self._run([f"add table netdev {self.table} {{ flags owner; }}"])
        except RelayError as error:
            self.close()
            raise PreflightError(f"{error}: start without --exclusive, or as root on Linux 5.12 or newer") from None

    def apply(self, admitted: Mapping[Interface, Collection[Input]]) -> None:
        """Drop exactly `admitted` from now on, in one transaction. Raises RelayError; nothing has changed then."""
        wanted = {interface: set(inputs) for interface, inputs in admitted.items()}
        if wanted.keys() == self._dropped.keys():
            self._run(self._difference(wanted))
        else:
            self._run(self._everything(wanted))
        self._dropped = wanted

    def forget(self) -> None:
        """An interface went and came back, its chain perhaps not, by the kernel: `apply` makes everything anew."""
        self._dropped = {}

    def close(self) -> None:
        """Close the netlink socket, upon which the kernel removes the table."""
        if self._context is not None:
            self._library.nft_ctx_free(self._context)
            self._context = None

    def _difference(self, wanted: Mapping[Interface, set[Input]]) -> list[str]:
        commands: list[str] = []
        for (name, index), inputs in wanted.items():
            former = self._dropped[name, index]
            commands += self._change("delete", index, former - inputs)
            commands += self._change("add", index, inputs - former)
        return commands

    def _everything(self, wanted: Mapping[Interface, set[Input]]) -> list[str]:
        """The table from nothing: chains of interfaces that went have gone with them already, or not."""
        commands = [f"delete table netdev {self.table}", f"add table netdev {self.table} {{ flags owner; }}"]
        for (name, index), inputs in wanted.items():
            if any(character in name for character in UNQUOTABLE):
                raise RelayError(f"interface {name} can't be exclusive: its name has a quote or a backslash")
            commands += [
                f"add set netdev {self.table} inputs_{index} {{ type ipv4_addr . inet_service; }}",
                f"add set netdev {self.table} inputs6_{index} {{ type ipv6_addr . inet_service; }}",
                f"add chain netdev {self.table} ingress_{index} "
                f'{{ type filter hook ingress device "{name}" priority 0; policy accept; }}',
                f"add rule netdev {self.table} ingress_{index} "
                f"ip frag-off & 0x3fff == 0 ip daddr . udp dport @inputs_{index} counter drop",
                f"add rule netdev {self.table} ingress_{index} "
                f"exthdr frag missing ip6 daddr . udp dport @inputs6_{index} counter drop",
            ]
            commands += self._change("add", index, inputs)
        return commands

    def _change(self, verb: str, index: int, inputs: Collection[Input]) -> Iterator[str]:
        """Add or delete elements of an interface's sets."""
        for name, is_of_set in ((f"inputs_{index}", False), (f"inputs6_{index}", True)):
            elements = [(address, port) for address, port in inputs if is_ipv6(address) is is_of_set]
            if elements:
                yield f"{verb} element netdev {self.table} {name} {_elements(elements)}"

    def _run(self, commands: list[str]) -> None:
        if not commands:
            return
        failed = self._library.nft_run_cmd_from_buffer(self._context, "\n".join(commands).encode())
        if failed:
            text = self._library.nft_ctx_get_error_buffer(self._context).decode(errors="replace")
            reason = text.partition("\n")[0].removeprefix("Error: ")
            raise RelayError(f"exclusive ingress, nftables table {self.table}: {reason}")


def _elements(inputs: Collection[Input]) -> str:
    return "{ " + ", ".join(f"{address} . {port}" for address, port in sorted(inputs)) + " }"
