"""Metrics of a relay for Prometheus: a process of its own, which asks the relay as any client does.

    Prometheus ──HTTP──▶ server.py ─▶ collector.py ──control socket──▶ relay
                                          │
                                      families.py: what each metric means, and where it comes from

It needs no privilege and is trusted with none: looks are for everybody who may connect to the control socket. When it
ends, hangs or is overrun, the relay does not notice; when the relay ends, it says `mcr_up 0` until one answers.
"""
