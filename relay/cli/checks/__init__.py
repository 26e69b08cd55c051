"""What `mcrctl doctor` checks: one small function each, in a registry (registry.py), grouped by what they look at.

host.py     kernel, limits, buffers, clock, shared memory
network.py  interfaces, memberships, queriers, offloads, drops of NIC and kernel
cores.py    where workers and interrupts run
relay.py    rules, workers, drops and log of the running relay

A check sees a Situation (situation.py) alone: files below a root folder, and values that system calls gave (probes.py).
"""
