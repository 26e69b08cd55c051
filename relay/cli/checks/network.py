"""Checks of the network: interfaces, what is joined, who queries, offloads, and what NIC and kernel drop."""

from collections.abc import Iterable, Iterator

from relay.addresses import is_ipv6, is_multicast
from relay.cli import host
from relay.cli.checks.registry import Found, Severity, check
from relay.cli.checks.situation import Situation
from relay.cli.host import IFF_LOOPBACK, IFF_MULTICAST, IFF_UP
from relay.supervisor.egress import IP_UDP_HEADER_BYTES, IPV6_UDP_HEADER_BYTES
from relay.supervisor.membership import IGMP_MAX_MEMBERSHIPS, Listen
from relay.wording import counted

LOOPBACK = "lo"
LOOPBACK_NETWORK, LOOPBACK_IPV6 = "127.", "::1"
RP_FILTER_STRICT = 1  # Documentation/networking/ip-sysctl.rst
IGMP_V3 = 3  # the first that asks for sources, RFC 3376
QUERY_INTERVAL_S = 125  # RFC 3376, 8.2
SHOWN_MAX = 5
RX_COUNTERS = ("rx_missed_errors", "rx_fifo_errors", "rx_dropped")


def shown(names: list[str]) -> str:
    """The first of some names, and how many more there are."""
    more = f" and {len(names) - SHOWN_MAX} more" if len(names) > SHOWN_MAX else ""
    return ", ".join(names[:SHOWN_MAX]) + more


def groups_wanted(situation: Situation) -> set[Listen]:
    """The groups that rules need joined."""
    return {listen for listen in situation.plan.listens if is_multicast(listen.address)}


def ipv4_groups_wanted(situation: Situation) -> set[Listen]:
    """Those of IPv4, which are joined by IGMP."""
    return {listen for listen in groups_wanted(situation) if not is_ipv6(listen.address)}


@check(why="an interface that is down, without carrier or without MULTICAST delivers no multicast")
def interface(situation: Situation) -> Iterator[Found]:
    """Flags and carrier of the interfaces that are relayed from and to."""
    for name in dict.fromkeys((*situation.ingress, *situation.egress)):
        flags = situation.files.interface(name, "flags")
        read = f"/sys/class/net/{name}/flags"
        if flags is None:
            yield Found("problem", f"interface {name} does not exist", read, "make it, or start mcrd with another")
        elif not flags & IFF_UP:
            yield Found("problem", f"interface {name} is down", read, f"ip link set {name} up")
        elif situation.files.interface(name, "carrier") == 0:
            read = f"/sys/class/net/{name}/carrier"
            yield Found("problem", f"interface {name} has no carrier", read, "see to cable, switch port or peer")
        elif not flags & (IFF_MULTICAST | IFF_LOOPBACK):
            yield Found("warning", f"interface {name} has no MULTICAST flag", read, f"ip link set {name} multicast on")
        else:
            yield Found("ok", f"interface {name} is up", read)


@check(
    why="the packet ring sees datagrams whatever their source; other receivers on this host do not get those that fail"
)
def rp_filter(situation: Situation) -> Iterator[Found]:
    """The reverse-path check of ingress interfaces: the stricter of the interface's own and that of all."""
    dropped = host.statistics(situation.files.text("proc/net/netstat") or "", "TcpExt").get("IPReversePathFilter", 0)
    so_far = f" ({dropped} dropped so far, by `nstat -az TcpExtIPReversePathFilter`)" if dropped else ""
    for name in situation.ingress:
        values = {place: situation.files.setting(f"net/ipv4/conf/{place}/rp_filter") for place in ("all", name)}
        known = {place: value for place, value in values.items() if value is not None}
        if not known:
            continue
        strictest = max(known, key=lambda place: known[place])
        read = f"/proc/sys/net/ipv4/conf/{strictest}/rp_filter"
        if max(known.values()) == RP_FILTER_STRICT:
            text = (
                f"rp_filter of {name} is strict: receivers here lose sources that are not routed through {name}{so_far}"
            )
            yield Found("note", text, read, f"sysctl net.ipv4.conf.all.rp_filter=0 net.ipv4.conf.{name}.rp_filter=2")
        else:
            yield Found("ok", f"rp_filter of {name} is {known[strictest]}", read)


def forced_versions(situation: Situation, names: Iterable[str], protocol: str, least: int) -> Iterator[Found]:
    """Whether a version of IGMP or MLD is forced on interfaces; rules need `least`."""
    family = {"IGMP": "ipv4", "MLD": "ipv6"}[protocol]
    setting = f"force_{protocol.lower()}_version"
    for name in names:
        for place in ("all", name):
            forced = situation.files.setting(f"net/{family}/conf/{place}/{setting}")
            if not forced:
                continue
            severity: Severity = "warning" if forced < least else "note"
            text = f"{protocol}v{forced} is forced on {name}"
            text += ", though rules ask for sources: the relay picks them from all" if severity == "warning" else ""
            read = f"/proc/sys/net/{family}/conf/{place}/{setting}"
            yield Found(severity, text, read, f"sysctl net.{family}.conf.{place}.{setting}=0")
            break
        else:
            yield Found("ok", f"no {protocol} version is forced on {name}", f"/proc/sys/net/{family}/conf/{name}")


@check(why="only IGMPv3 asks a switch for sources; a version that is forced may not be the querier's")
def igmp_version(situation: Situation) -> Iterator[Found]:
    """Whether a version of IGMP is forced."""
    wants_sources = any(listen.source for listen in ipv4_groups_wanted(situation))
    return forced_versions(situation, situation.ingress, "IGMP", IGMP_V3 if wants_sources else 0)


@check(why="the relay joins with as many sockets as it takes, each of which is an open file; 0 refuses every join")
def memberships(situation: Situation) -> Iterator[Found]:
    """igmp_max_memberships against what rules need."""
    most = situation.files.setting("net/ipv4/igmp_max_memberships")
    if most is None:
        return
    joins = len(ipv4_groups_wanted(situation))
    read = "/proc/sys/net/ipv4/igmp_max_memberships"
    remedy = f"sysctl net.ipv4.igmp_max_memberships={max(joins, IGMP_MAX_MEMBERSHIPS)}"
    if most < 1:
        yield Found("problem", f"igmp_max_memberships is {most}: no group can be joined", read, remedy)
    elif joins > most:
        text = f"{joins} joins take {-(-joins // most)} sockets, as igmp_max_memberships is {most}"
        severity: Severity = "warning" if most < IGMP_MAX_MEMBERSHIPS else "note"
        yield Found(severity, text, read, remedy)
    else:
        yield Found("ok", f"igmp_max_memberships is {most}, {counted(joins, 'group')} wanted", read)


@check(why="what is not joined is delivered neither by a switch that snoops nor by the NIC's filter")
def joined(situation: Situation) -> Iterator[Found]:
    """Whether every group that a rule wants is joined."""
    text = situation.files.text("proc/net/igmp")
    wanted = groups_wanted(situation)
    if text is None or not wanted:
        return
    read = "/proc/net/igmp" + (", igmp6" if any(is_ipv6(listen.address) for listen in wanted) else "")
    listed = host.joined(text, situation.files.text("proc/net/igmp6") or "")
    there = {(found.ifindex, group) for found in listed.values() for group in found.groups}
    names = {present.index: present.name for present in situation.interfaces.values()}
    missing = sorted(
        f"{listen.address} on {names.get(listen.ifindex, listen.ifindex)}"
        for listen in wanted
        if (listen.ifindex, listen.address) not in there
    )
    if missing:
        remedy = "`mcrlog tail --facility Supervisor` says why; then remove the rule and add it again"
        yield Found("problem", f"not joined: {shown(missing)}", read, remedy)
    else:
        yield Found("ok", f"{counted(len(wanted), 'group')} joined", read)


@check(why="what is sent to an address that no host has, or another, comes here only where this host is its router")
def unicast_inputs(situation: Situation) -> Iterator[Found]:
    """Whether the unicast addresses that rules take in are this host's: some interface has it, or a socket is bound."""
    own = {
        address
        for interface in situation.interfaces.values()
        for address in (*interface.addresses, *interface.addresses6, LOOPBACK_IPV6)
    }
    own |= {
        udp.local[0]
        for table in ("proc/net/udp", "proc/net/udp6")
        for udp in host.udp_sockets(situation.files.text(table) or "")
    }
    wanted = sorted({listen.address for listen in situation.plan.listens if not is_multicast(listen.address)})
    foreign = [address for address in wanted if address not in own and not address.startswith(LOOPBACK_NETWORK)]
    if foreign:
        text = f"no address of this host: {shown(foreign)}: rules take in what is routed through this host alone"
        yield Found("warning", text, "ip addr", "ip addr add ADDRESS/PREFIX dev INTERFACE, or give the rule another")
    elif wanted:
        yield Found("ok", f"{counted(len(wanted), 'unicast input')} of this host's own", "ip addr")


def unheard(situation: Situation, name: str, protocol: str, has_listened: bool, bridge_kind: str) -> Found:
    """What it means that no query of IGMP or MLD came in on an interface: nothing, if it was not for long."""
    read = f"{protocol} queries that came in"
    if has_listened and situation.interval_s > QUERY_INTERVAL_S:
        text = f"no {protocol} query came in on {name} in {situation.interval_s:.0f} s"
        command = "`ip link set BRIDGE type bridge mcast_querier 1`"
        return Found("warning", text, read, f"make a switch or router the querier; {bridge_kind}: {command}")
    text = f"it is not known whether anybody queries on {name}: {situation.interval_s:.0f} s are too short to tell"
    return Found("note", text, read, f"sudo mcrctl doctor --seconds {QUERY_INTERVAL_S + 5}")


@check(why="without a querier a switch that snoops forgets its members after some 260 s, and stops delivering")
def querier(situation: Situation) -> Iterator[Found]:
    """Who asks for members. The kernel tells of queries of IGMPv1 and v2 only; for v3 one has to listen."""
    versions = {
        found.name: found.querier for found in host.joined(situation.files.text("proc/net/igmp") or "").values()
    }
    heard = situation.probes.queriers
    for name in situation.ingress:
        if name == LOOPBACK:
            continue
        if heard and name in heard:
            yield Found("ok", f"{heard[name]} queries on {name}", "IGMP queries that came in")
        elif versions.get(name, "V3") != "V3":
            yield Found("ok", f"a querier of IGMP{versions[name].lower()} was heard on {name}", "/proc/net/igmp")
        else:
            yield unheard(situation, name, "IGMP", heard is not None, "a Linux bridge")


@check(why="a bridge that snoops while nobody queries floods, and its neighbours that snoop stop delivering")
def bridge(situation: Situation) -> Iterator[Found]:
    """Snooping and querier of this host's bridges; those that are relayed through weigh more."""
    used = {*situation.ingress, *situation.egress}
    for path in situation.files.find("sys/class/net/*/bridge"):
        name = path.split("/")[3]
        snoops = situation.files.number(f"{path}/multicast_snooping")
        queries = situation.files.number(f"{path}/multicast_querier")
        ports = set(situation.files.names(f"sys/class/net/{name}/brif"))
        read = f"/{path}/multicast_querier"
        if snoops and not queries:
            severity: Severity = "warning" if used & {name, *ports} else "note"
            text = f"bridge {name} snoops and is no querier"
            remedy = f"ip link set {name} type bridge mcast_querier 1, unless a router queries"
            yield Found(severity, text, read, remedy)
        else:
            how = "snoops and queries" if snoops else "floods multicast, it does not snoop"
            yield Found("ok", f"bridge {name} {how}", read)


@check(why="super-frames and checksums that the NIC deals with cost the relay less")
def offloads(situation: Situation) -> Iterator[Found]:
    """GRO, LRO, UDP GRO forwarding and receive checksums of ingress interfaces."""
    for name in situation.ingress:
        features = situation.probes.offloads.get(name)
        if not features or name == LOOPBACK:
            continue
        read = f"ethtool -k {name}"
        on = [feature for feature in ("rx-gro", "rx-udp-gro-forwarding", "rx-gro-list") if features.get(feature)]
        if features.get("rx-lro"):
            text = f"{name} has LRO on: the host's forwarding is spoilt by it; UDP, and so the relay, is not concerned"
            yield Found("note", text, read, f"ethtool -K {name} lro off")
        if features.get("rx-checksum") is False:
            text = f"{name} verifies no checksums: the relay does, which costs it CPU time"
            yield Found("note", text, read, f"ethtool -K {name} rx on")
        if features.get("rx-gro") is False:
            text = f"{name} has GRO off: datagrams come one by one, super-frames would cost the relay a third"
            yield Found("note", text, read, f"ethtool -K {name} gro on rx-udp-gro-forwarding on")
        else:
            yield Found("ok", f"offloads of {name}: {', '.join(on) or 'none that matters'}", read)


@check(why="a datagram larger than the way out leaves as fragments, of which one that is lost loses it whole")
def mtu(situation: Situation) -> Iterator[Found]:
    """Rules that take in from a larger MTU than they send to."""
    narrowed: dict[tuple[str, str, int], list[str]] = {}
    for planned in situation.plan.rules:
        for name in planned.interfaces:
            for output in planned.outputs:
                out = situation.interfaces.get(output.output.interface)
                if name != LOOPBACK and out is not None and out.mtu_bytes < situation.interfaces[name].mtu_bytes:
                    headers = IPV6_UDP_HEADER_BYTES if is_ipv6(output.output.group) else IP_UDP_HEADER_BYTES
                    narrowed.setdefault((name, out.name, headers), []).append(planned.rule.rule_id)
    for (name, out_name, headers), rule_ids in narrowed.items():
        mtu_in, mtu_out = (situation.interfaces[each].mtu_bytes for each in (name, out_name))
        text = f"MTU {mtu_in} of {name} is over {mtu_out} of {out_name}: payloads over {mtu_out - headers} "
        text += f"bytes leave as fragments (rules {shown(list(dict.fromkeys(rule_ids)))})"
        yield Found("warning", text, f"/sys/class/net/{out_name}/mtu", f"ip link set {out_name} mtu {mtu_in}")
    if situation.plan.rules and not narrowed:
        yield Found("ok", "no rule sends to a smaller MTU than it takes in from", "/sys/class/net/*/mtu")


@check(why="what the NIC or its driver drops never reaches the relay, which cannot count it")
def nic_drops(situation: Situation) -> Iterator[Found]:
    """Drops that an ingress interface counts."""
    for name in situation.ingress:
        folder = f"sys/class/net/{name}/statistics"
        for counter in RX_COUNTERS:
            value, grown = situation.grown(f"{folder}/{counter}")
            # rx_dropped also counts what has no receiver, which is no loss of the relay's
            grave: Severity = "warning" if counter == "rx_dropped" else "problem"
            if grown:
                text = f"{counter} of {name} grew by {grown} in {situation.interval_s:.0f} s, to {value}"
                remedy = f"ethtool -G {name} rx MAX (`ethtool -g {name}` shows it); interrupts on more cores"
                yield Found(grave, text, f"/{folder}/{counter}", remedy)
            elif value:
                text = f"{counter} of {name} is {value}, and did not grow in {situation.interval_s:.0f} s"
                yield Found(
                    "note", text, f"/{folder}/{counter}", "look again under traffic: mcrctl doctor --seconds 10"
                )
        if not any(situation.grown(f"{folder}/{counter}")[0] for counter in RX_COUNTERS):
            yield Found("ok", f"{name} has dropped nothing", f"/{folder}")


@check(why="the kernel drops before the packet ring when a core's backlog is full")
def softnet_drops(situation: Situation) -> Iterator[Found]:
    """Drops of the kernel's backlog, by core."""
    read = "/proc/net/softnet_stat"
    counts = host.softnet(situation.files.text("proc/net/softnet_stat") or "")
    before = host.softnet(situation.earlier.get("proc/net/softnet_stat", ""))
    total = sum(dropped for dropped, _ in counts.values())
    grown = {cpu: dropped - before[cpu][0] for cpu, (dropped, _) in counts.items() if cpu in before}
    remedy = "sysctl net.core.netdev_max_backlog=10000"
    if any(more > 0 for more in grown.values()):
        cores = ", ".join(f"{more} on core {cpu}" for cpu, more in grown.items() if more > 0)
        yield Found("problem", f"the kernel dropped frames in {situation.interval_s:.0f} s: {cores}", read, remedy)
    elif total:
        text = f"the kernel has dropped {total} frames since it started, none in {situation.interval_s:.0f} s"
        yield Found("note", text, read, remedy)
    elif counts:
        yield Found("ok", "the kernel's backlog has dropped nothing", read)


@check(why="programs on this host do not receive what an exclusive relay takes in")
def exclusive(situation: Situation) -> Iterator[Found]:
    """Interfaces on which relayed inputs are kept from the host's own stack."""
    for name, table in situation.probes.exclusive.items():
        text = f"what rules take in on {name} is kept from other programs on this host: the relay is exclusive"
        yield Found("note", text, f"nft list table netdev {table}", "start mcrd without --exclusive where they need it")
