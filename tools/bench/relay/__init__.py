"""The relay beside its peers: `python -m tools.bench.relay`, or `make bench ARGS="--quick"`.

    gen ──left── relay ──right── sink       three network namespaces, two cables (topology.py)

    core 1  generator: sends, and in latency runs receives, too       generator.py, load.py, probe.py
    core 0  what is compared: mcrd, or one of its peers               peers.py, one_by_one.py
            sink: an nft hook counts and drops, in the sender's time  sink.py

A part (parts.py) runs every contender in turn, the whole round several times, and puts each figure into Results
(results.py), from which tables, targets, JSON and plots are made (report.py, targets.py, plots.py).

All costs are CPU time (cpu.py): generator and relay share a machine of few cores, so packets per second of wall time
say what this machine can do, packets per second of CPU time what the relay can.
"""
