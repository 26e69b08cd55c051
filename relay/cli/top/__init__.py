"""`mcrctl top`: the relay live on a terminal, read from its shared memory. It costs the relay nothing.

    stats segments ─▶ segments.py ─▶ rates.py ─┐
    list-rules ─────▶ rules.py ────────────────┼─▶ Frame ─▶ view.py ─▶ draw.py ─▶ screen.py ─▶ terminal
    log rings ──────▶ log.py ──────────────────┘            ▲                        │
                                                            └──── keys.py ◀──────────┘

`watch.py` makes a Frame, all that is known of one moment; `view.py` holds what the user chose (order, filter, place).
A column of the rules' table is one entry of `columns.COLUMNS`.
"""
