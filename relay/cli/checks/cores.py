"""Checks of the cores: who shares them with the workers."""

from collections.abc import Iterator

from relay.cli import host
from relay.cli.checks.registry import Found, check
from relay.cli.checks.situation import Situation
from relay.cli.host import Files

SLOW_GOVERNORS = ("powersave", "ondemand", "conservative", "schedutil")


def cores_of(situation: Situation) -> set[int]:
    """The cores that workers are pinned to."""
    return {worker["core"] for worker in situation.relay.stats["workers"]} if situation.relay is not None else set()


def interrupts_of(files: Files, name: str) -> list[int]:
    """The interrupts of an interface's device that have come at least once; virtio has its vectors a folder above."""
    numbers = files.names(f"sys/class/net/{name}/device/msi_irqs")
    numbers = numbers or files.names(f"sys/class/net/{name}/device/../msi_irqs")
    seen = set()
    for line in (files.text("proc/interrupts") or "").splitlines():
        number, _, counts = line.partition(":")
        if any(word != "0" for word in counts.split() if word.isdecimal()):
            seen.add(number.strip())
    return [int(number) for number in numbers if number in seen]


@check(why="at 20 000/s half of the latency is from interrupts on a worker's own core: docs/performance.md")
def interrupts(situation: Situation) -> Iterator[Found]:
    """Whether the NIC's interrupts come on workers' cores."""
    workers = cores_of(situation)
    for name in situation.ingress if workers else ():
        for number in interrupts_of(situation.files, name):
            path = f"proc/irq/{number}/effective_affinity_list"
            text = situation.files.text(path) or situation.files.text(path.replace("effective", "smp")) or ""
            shared = host.cpu_list(text) & workers
            if shared:
                cores = ", ".join(map(str, sorted(shared)))
                remedy = f"echo CORE > /proc/irq/{number}/smp_affinity_list, with irqbalance stopped; or --cores"
                yield Found(
                    "note", f"interrupt {number} of {name} comes on core {cores}, a worker's", f"/{path}", remedy
                )
            else:
                yield Found("ok", f"interrupt {number} of {name} comes on core {text}, no worker's", f"/{path}")


@check(why="another process on a worker's core delays datagrams by as long as it runs")
def isolated_cores(situation: Situation) -> Iterator[Found]:
    """Whether workers' cores are kept free of others."""
    path = "sys/devices/system/cpu/isolated"
    workers = cores_of(situation)
    shared = workers - host.cpu_list(situation.files.text(path) or "")
    if shared:
        cores = ",".join(map(str, sorted(shared)))
        remedy = f"boot with isolcpus={cores}, or give other services another AllowedCPUs="
        yield Found("note", f"other processes may run on the workers' cores {cores}", f"/{path}", remedy)
    elif workers:
        yield Found("ok", "workers' cores are isolated", f"/{path}")


@check(why="a core that clocks down between bursts is late for each of them")
def governor(situation: Situation) -> Iterator[Found]:
    """The frequency governor of workers' cores."""
    for core in sorted(cores_of(situation)):
        path = f"sys/devices/system/cpu/cpu{core}/cpufreq/scaling_governor"
        name = situation.files.text(path)
        if name in SLOW_GOVERNORS:
            yield Found("note", f"core {core} has the governor {name}", f"/{path}", f"echo performance > /{path}")
        elif name is not None:
            yield Found("ok", f"core {core} has the governor {name}", f"/{path}")
