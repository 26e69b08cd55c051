"""Who writes a record and how grave it is: the one source of these words for code, logs and command lines."""

from enum import IntEnum


class Severity(IntEnum):
    """RFC 5424, section 6.2.1."""

    Emergency = 0
    Alert = 1
    Critical = 2
    Error = 3
    Warning = 4
    Notice = 5
    Info = 6
    Debug = 7


class Facility(IntEnum):
    """The part of the system that a ring belongs to."""

    Supervisor = 0
    ControlPlane = 1
    DataPlane = 2
    Ingress = 3
    Egress = 4
    BufferPool = 5
    Test = 6


# The words of command lines, configurations and URLs.
SEVERITIES = {severity.name.lower(): severity for severity in Severity}
FACILITIES = {facility.name.lower(): facility for facility in Facility}

# Records of each ring: what a facility writes in its busiest second, at 256 bytes a record.
RING_CAPACITY = {
    Facility.Supervisor: 1024,
    Facility.ControlPlane: 1024,
    Facility.DataPlane: 2048,
    Facility.Ingress: 16_384,
    Facility.Egress: 4096,
    Facility.BufferPool: 2048,
    Facility.Test: 1024,
}
WORKER_FACILITIES = (Facility.DataPlane, Facility.Ingress, Facility.Egress, Facility.BufferPool)


def segment_name(facility: Facility, core: int | None = None, instance: str | None = None) -> str:
    """The shm name of a ring, as `ls /dev/shm` shows it."""
    prefix = f"mcr_{instance}_" if instance else "mcr_"
    if core is None:
        return f"{prefix}{facility.name.lower()}"
    return f"{prefix}dp_c{core}_{facility.name.lower()}"
