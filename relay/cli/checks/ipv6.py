"""Checks of what IPv6 needs besides: addresses, MLD, who queries. They say nothing where no rule uses IPv6."""

from collections import Counter
from collections.abc import Iterator

from relay.addresses import is_ipv6, is_multicast
from relay.cli.checks.network import LOOPBACK, forced_versions, unheard
from relay.cli.checks.registry import Found, check
from relay.cli.checks.situation import Situation
from relay.sockaddr import is_of_link
from relay.supervisor.interfaces import IPV6_MIN_MTU

MLD_V2 = 2  # the first that asks for sources, RFC 3810


def taken_from(situation: Situation) -> list[str]:
    """The interfaces on which rules take in IPv6, by either leg."""
    inputs = (each for planned in situation.plan.rules for each in planned.inputs)
    return list(dict.fromkeys(name for leg, names in inputs if is_ipv6(leg.group) for name in names))


def sent_to(situation: Situation) -> list[str]:
    """The interfaces through which rules send IPv6."""
    outputs = (planned.output for rule in situation.plan.rules for planned in rule.outputs)
    names = dict.fromkeys(output.interface for output in outputs if is_ipv6(output.group))
    return [name for name in names if name in situation.interfaces]


def sources_wanted(situation: Situation) -> Counter[tuple[str, int]]:
    """How many sources rules ask for, by IPv6 group and ifindex."""
    return Counter(
        (listen.address, listen.ifindex)
        for listen in situation.plan.listens
        if listen.source is not None and is_ipv6(listen.address)
    )


def joins_on(situation: Situation) -> list[str]:
    """The interfaces on which IPv6 groups are wanted."""
    groups = {
        listen.ifindex for listen in situation.plan.listens if is_ipv6(listen.address) and is_multicast(listen.address)
    }
    return [name for name in taken_from(situation) if situation.interfaces[name].index in groups]


@check(why="IPv6 outputs are sent from an address of their interface, and switches are asked for groups from one")
def ipv6_addresses(situation: Situation) -> Iterator[Found]:
    """Whether interfaces have IPv6, and an address that can be sent from."""
    senders = sent_to(situation)
    for name in dict.fromkeys((*taken_from(situation), *senders)):
        addresses = situation.interfaces[name].addresses6
        read = f"/proc/sys/net/ipv6/conf/{name}/disable_ipv6"
        if situation.files.setting(f"net/ipv6/conf/{name}/disable_ipv6"):
            yield Found("problem", f"IPv6 is disabled on {name}", read, f"sysctl net.ipv6.conf.{name}.disable_ipv6=0")
            continue
        mtu_bytes = situation.interfaces[name].mtu_bytes
        if mtu_bytes < IPV6_MIN_MTU:
            text = f"{name} has an MTU of {mtu_bytes} bytes: without {IPV6_MIN_MTU} the kernel has no IPv6 there"
            yield Found("problem", text, f"/sys/class/net/{name}/mtu", f"ip link set {name} mtu {IPV6_MIN_MTU}")
            continue
        read = f"ip -6 addr show dev {name}"
        if not addresses:
            text = f"{name} has no IPv6 address that can be used: none at all, or a tentative or duplicate one"
            yield Found("problem", text, read, f"ip -6 addr add ADDRESS/64 dev {name}; see for `dadfailed` first")
        elif name in senders and is_of_link(addresses[0]):
            text = f"{name} has only a link-local address, {addresses[0]}: no router passes on what is sent from it"
            yield Found("note", text, read, f"ip -6 addr add ADDRESS/64 dev {name}, if receivers are behind a router")
        else:
            yield Found("ok", f"{name} has {addresses[0]}", read)


@check(why="only MLDv2 asks a switch for sources; a version that is forced may not be the querier's")
def mld_version(situation: Situation) -> Iterator[Found]:
    """Whether a version of MLD is forced."""
    return forced_versions(situation, joins_on(situation), "MLD", MLD_V2 if sources_wanted(situation) else 0)


@check(why="the relay asks for a group's sources with as many sockets as it takes; 0 refuses every source")
def mld_sources(situation: Situation) -> Iterator[Found]:
    """mld_max_msf against what rules need."""
    most = situation.files.setting("net/ipv6/mld_max_msf")
    wanted = sources_wanted(situation)
    if most is None or not wanted:
        return
    (group, _), sources = wanted.most_common(1)[0]
    read = "/proc/sys/net/ipv6/mld_max_msf"
    remedy = f"sysctl net.ipv6.mld_max_msf={max(sources, 64)}"
    if most < 1:
        yield Found("problem", f"mld_max_msf is {most}: no source can be asked for", read, remedy)
    elif sources > most:
        text = f"{sources} sources of {group} take {-(-sources // most)} sockets, as mld_max_msf is {most}"
        yield Found("note", text, read, remedy)
    else:
        yield Found("ok", f"mld_max_msf is {most}, {sources} sources of {group} are wanted", read)


@check(why="without a querier a switch that snoops forgets its members after some 260 s, and stops delivering")
def mld_querier(situation: Situation) -> Iterator[Found]:
    """Who asks for members of IPv6 groups. The kernel tells of no query: one has to listen."""
    heard, read = situation.probes.mld_queriers, "MLD queries that came in"
    for name in joins_on(situation):
        if name == LOOPBACK:
            continue
        if heard and name in heard:
            yield Found("ok", f"{heard[name]} queries on {name}", read)
        else:
            yield unheard(situation, name, "MLD", heard is not None, "a Linux bridge that has an IPv6 address")
