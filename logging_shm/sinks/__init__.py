"""Sinks: where drained records go. Each has a thread, a bounded backlog, a level and a choice of facilities of its own.

A sink is described by a URL, so that a command line and a configuration name it in the same way:

    stdout:?level=warning&format=json
    file:/var/log/mcr.log?rotate_bytes=100M&rotate_s=86400&keep=7&facility=Ingress,Egress
    syslog+udp://10.0.0.1:514      syslog+tcp://10.0.0.1:601      syslog+unix:/dev/log
    journald:
"""
