"""Drawing: a frame as lines for a terminal of some width and height. Pure: makes rich texts, prints nothing.

Only the rows that are visible are looked at, so that ten thousand rules cost no more than ten. No line is wider than
the terminal.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from rich.layout import Layout
from rich.text import Text

from relay.cli.top.columns import ADDRESSES_RANK, BARS_RANK, COLUMNS, Column, duration, plain, short
from relay.cli.top.view import NAME_KEY, View
from relay.cli.top.watch import Frame, WorkerRow
from relay.wording import counted

NAME_CHARS_MIN, NAME_CHARS_MAX = 8, 40
INPUT_CHARS = 21  # 255.255.255.255:65535
OUTPUTS_CHARS_MIN = 24
STATE_CHARS_MIN = INPUT_CHARS + OUTPUTS_CHARS_MIN
BARS_MIN, BARS_MAX = 8, 60  # a bar a second at most
HEADER_LINES = 3
STAMP_CHARS = 27  # 2026-11-25T04:29:31.999531Z
CLOCK = slice(11, 19)
SEVERITY_STYLES = (
    (("[Emergency]", "[Alert]", "[Critical]", "[Error]"), "red"),
    (("[Warning]",), "yellow"),
    (("[Debug]",), "dim"),
)
UNICODE_BARS, ASCII_BARS = " ▁▂▃▄▅▆▇█", " _.-=+*#@"
HELP = """\
 s, left, right   sort by the next or former column      r  turn the order round
 n i o b e d      sort by name, in/s, out/s, bit/s, drop/s, drops
 a l J            sort by last datagram, loss, jitter
 arrows, page up and page down, home, end      move through the rules
 /                show only rules in whose name, addresses or state each word is
                  found; Enter keeps it, Esc drops it
 p                hold the picture; counting goes on          q  quit

 in/s, out/s      datagrams that matched, and that left through all outputs
 bit/s            payload that left          drops  lost by its outputs or limit
 loss, jitter     before the relay: RTP lost and MPEG-TS continuity errors in
                  the last minute; the worst RTP source     lat  in the relay
 last minute      in/s, each rule by its own greatest
 Any key goes back."""


@dataclass(frozen=True)
class Screen:
    """What there is to draw on. `height` None: as much as is needed."""

    width: int
    height: int | None
    bars: str = UNICODE_BARS


@dataclass(frozen=True)
class Plan:
    """The widths of a rule's line; 0 for what is left out."""

    gap: int
    name: int
    input: int
    outputs: int
    columns: tuple[Column, ...]
    bars: int


def plan(width: int, names: int, outputs: int) -> Plan:
    """Share `width` among the columns; `names` and `outputs` are the lengths of the longest to be shown."""
    gap = 2 if width >= 72 else 1
    name = min(max(names, NAME_CHARS_MIN), NAME_CHARS_MIN if width < 60 else 20)
    chosen = [column for column in COLUMNS if column.rank == 0]
    left = width - name - sum(gap + column.width for column in chosen)

    def take(chars: int) -> int:
        nonlocal left
        if left < gap + chars:
            return 0
        left -= gap + chars
        return chars

    wanted = [column for column in sorted(COLUMNS, key=lambda column: column.rank) if column.rank]
    chosen += [column for column in wanted if column.rank <= BARS_RANK and take(column.width)]
    bars = take(BARS_MIN)
    chosen += [column for column in wanted if BARS_RANK < column.rank <= ADDRESSES_RANK and take(column.width)]
    input_chars = take(INPUT_CHARS) if bars else 0
    outputs_chars = take(OUTPUTS_CHARS_MIN) if input_chars else 0
    if outputs_chars:
        chosen += [column for column in wanted if column.rank > ADDRESSES_RANK and take(column.width)]
    left = max(left, 0)
    more = min(max(names - name, 0), NAME_CHARS_MAX - name, left)
    name, left = name + more, left - more
    if outputs_chars:
        more = min(max(outputs - outputs_chars, 0), left // 2)
        outputs_chars, left = outputs_chars + more, left - more
    if bars:
        bars += min(left, BARS_MAX - bars)
    columns = tuple(column for column in COLUMNS if column in chosen)
    return Plan(gap, name, input_chars, outputs_chars, columns, bars)


def cut(text: str, width: int) -> str:
    """At most `width` characters; what is longer is marked."""
    return text if len(text) <= width else text[: max(width - 1, 0)] + "…"[: max(width, 0)]


def line(*parts: str | tuple[str, str] | Text) -> Text:
    """A line that never wraps."""
    return Text.assemble(*parts, no_wrap=True, overflow="crop", end="")


def rates_of(received: float, sent: float, bits: float) -> str:
    """A sum of traffic."""
    return f"in {short(received)}/s  out {short(sent)}/s  {short(bits)}{'' if bits >= 1000 else ' '}bit/s"


def header(frame: Frame, view: View, screen: Screen) -> list[Text]:
    """Totals, drops by cause, and what is the matter."""
    sums = [sum(values) for values in zip(*((w.received, w.sent, w.sent_bits) for w in frame.workers), strict=True)]
    waiting = frame.rules.waiting()
    title = f"mcr {frame.instance}" if frame.instance else "mcr"
    count = f"  {counted(len(frame.rules.ids), 'rule')}" + (f", {waiting} waiting" if waiting else "")
    count += ", changing" if frame.are_rules_old else ""
    traffic = f"  {rates_of(*(sums or (0, 0, 0)))}"
    clock = f"{frame.wall:%H:%M:%S}"
    room = screen.width - len(clock) - 1
    title = cut(title, max(room - len(count) - len(traffic), 3))
    text = line((title, "bold"), (count, "yellow" if waiting or frame.are_rules_old else ""), traffic)
    text.truncate(room)
    text.pad_right(max(room - text.cell_len, 0))
    return [line(text, f" {clock}"), _drops_line(frame, screen.width), _status(frame, view, screen.width)]


def _drops_line(frame: Frame, width: int) -> Text:
    causes = sorted((cause for cause, (total, _) in frame.drops.items() if total), key=lambda c: -frame.drops[c][1])
    if not causes:
        return line(("dropped: nothing", "dim"))
    parts: list[tuple[str, str]] = [("dropped:", "")]
    for cause in causes:
        total, rate = frame.drops[cause]
        parts.append((f"  {cause} {plain(total)}" + (f" ({short(rate)}/s)" if rate else ""), "red" if rate else ""))
    text = line(*parts)
    text.truncate(width, overflow="ellipsis")
    return text


def _status(frame: Frame, view: View, width: int) -> Text:
    parts = [("PAUSED ", "reverse")] if view.paused else []
    if frame.condition:
        parts.append((frame.condition, "bold red"))
    elif frame.event:
        parts.append((frame.event, "yellow"))
    text = line(*parts)
    text.truncate(width, overflow="ellipsis")
    return text


def workers(frame: Frame, room: int, width: int) -> list[Text]:
    """A line for each worker, the busiest first when they are too many; 0 `room`: none."""
    if room < 2:
        return []
    shown = list(frame.workers)
    if len(shown) > room - 1:
        shown = sorted(shown, key=lambda w: (not w.state, -w.received))[: room - 1]
    more = len(frame.workers) - len(shown)
    wide = width >= 100
    title = f"{'core':>4} {'pid':>7}  {'CPU':>5}  {'in/s':>6}  {'out/s':>6}  {'bit/s':>6}  {'ring':>5} {'max':>3}"
    title += f"  {'drops':>6}  {'lat p50':>7} {'p99':>6}"
    title += f" {more} more" if more else ("  dropped by cause" if wide else "")
    return [_title(title, width), *(_worker(worker, width) for worker in shown)]


def _title(text: str, width: int) -> Text:
    return line((cut(text, width).ljust(width), "reverse"))


def _worker(worker: WorkerRow, width: int) -> Text:
    cpu = "" if worker.cpu_percent is None else f"{worker.cpu_percent:.0f} %"
    now, full = worker.ring_fill_percent, worker.ring_fill_percent_max
    total = sum(worker.drops.values())
    p50, p99 = map(duration, worker.latency_ns) if worker.latency_ns else ("", "")
    causes = ", ".join(f"{cause} {plain(n)}" for cause, n in worker.drops.items() if n)
    text = line(
        f"{worker.core:>4} {worker.pid:>7}  ",
        (f"{cpu:>5}", "yellow" if (worker.cpu_percent or 0) > 90 else ""),
        f"  {short(worker.received):>6}  {short(worker.sent):>6}  {short(worker.sent_bits):>6}  ",
        (f"{f'{now} %':>5} ", "red" if now >= 95 else "yellow" if now >= 50 else ""),
        (f"{f'≥{full}' if full else '<50':>3}", "red" if full >= 95 else "yellow" if full else ""),
        "  ",
        (f"{plain(total):>6}", "bold red" if worker.drop_rate else "yellow" if total else "dim"),
        (f"  {worker.state}", "bold red") if worker.state else f"  {p50:>7} {p99:>6}",
        ("" if worker.state else f"  {causes}", "dim"),
    )
    text.truncate(width, overflow="ellipsis")
    return text


def rules(frame: Frame, view: View, screen: Screen, room: int | None) -> list[Text]:
    """The table's head, and the rows that there is room for."""
    order = view.order(frame)
    view.rows = max(len(order) if room is None else room - 1, 1)
    first = view.scrolled(len(order))
    visible = order[first : first + view.rows]
    ids, outputs = frame.rules.ids, frame.rules.outputs
    # By all rules, so that scrolling and sorting shift no column. Ten thousand lengths take half a millisecond.
    widths = plan(screen.width, max(map(len, ids), default=0), max(map(len, outputs), default=0))
    lines = [_rules_title(view, widths, screen)]
    heights = _heights(frame, visible, widths.bars)
    lines += [_rule(frame, rule, widths, heights[i], screen) for i, rule in enumerate(visible.tolist())]
    if not len(order):
        lines.append(line((" no rule has that in it" if view.wanted else " no rules", "dim")))
    return lines


def _heights(frame: Frame, visible: Any, bars: int) -> Any:
    """The height of each bar, from 0 for nothing to 8 for the rule's greatest: i8[rows, bars]."""
    if not bars:
        return np.zeros((len(visible), 0), np.int64)
    rates = frame.past.bars(visible, frame.time_s, bars)
    greatest = np.maximum(rates.max(axis=1, keepdims=True), 1e-9)
    return np.where(rates > 1e-9, np.clip(np.ceil(rates / greatest * 8), 1, 8), 0).astype(np.int64)


def _rules_title(view: View, widths: Plan, screen: Screen) -> Text:
    arrow = ("▲" if view.ascending else "▼") if screen.bars == UNICODE_BARS else ("^" if view.ascending else "v")
    gap = " " * widths.gap
    cells: list[tuple[str, str]] = []

    def cell(text: str, key: str) -> None:
        is_sorted = key == view.sort_key
        cells.append((text, "reverse bold" if is_sorted else "reverse"))

    name = f"rule{arrow}" if view.sort_key == NAME_KEY else "rule"
    cell(name.ljust(widths.name), NAME_KEY)
    for title, width in (("input", widths.input), ("outputs", widths.outputs)):
        if width:
            cell(gap + title.ljust(width), "")
    for column in widths.columns:
        title = column.title + (arrow if column.key == view.sort_key else "")
        cell(gap + title.rjust(column.width), column.key)
    if widths.bars:
        cell(gap + cut("last minute", widths.bars).ljust(widths.bars), "")
    return line(*cells)


def _rule(frame: Frame, rule: int, widths: Plan, heights: Any, screen: Screen) -> Text:
    state = frame.rules.states[rule]
    is_waiting = state != "active"
    gap = " " * widths.gap
    quiet = "" if frame.rates.received[rule] else "dim"
    parts = [(cut(frame.rules.ids[rule], widths.name).ljust(widths.name), "yellow" if is_waiting else "")]
    place = widths.input + widths.outputs + (widths.gap if widths.outputs else 0)
    if is_waiting and place >= STATE_CHARS_MIN:
        parts.append((gap + cut(state, place).ljust(place), "yellow"))
    else:
        parts += [
            (gap + cut(text, width).ljust(width), "dim")
            for text, width in ((frame.rules.inputs[rule], widths.input), (frame.rules.outputs[rule], widths.outputs))
            if width
        ]
    columns, bars = list(widths.columns), widths.bars
    is_state_last = is_waiting and place < STATE_CHARS_MIN and bars > 0
    while is_state_last and not columns[-1].text(frame, rule):
        bars += widths.gap + columns.pop().width
    for column in columns:
        parts.append(
            (gap + cut(column.text(frame, rule), column.width).rjust(column.width), column.style(frame, rule) or quiet)
        )
    if is_state_last:
        parts.append((gap + cut(state, bars), "yellow"))
    elif bars:
        parts.append((gap + "".join(screen.bars[height] for height in heights.tolist()), "cyan"))
    return line(*parts)


def log(frame: Frame, room: int, width: int) -> list[Text]:
    """The last lines of the log under a rule."""
    if room < 2:
        return []
    lines = [line((cut("─ log ".ljust(width, "─"), width), "dim"))]
    for text in frame.log[1 - room :]:
        is_stamped = len(text) > STAMP_CHARS and text[STAMP_CHARS - 1] == "Z"
        words = f"{text[CLOCK]}Z{text[STAMP_CHARS:]}" if is_stamped else text
        style = next((style for marks, style in SEVERITY_STYLES if any(mark in words[:24] for mark in marks)), "")
        shown = line((words, style))
        shown.truncate(width, overflow="ellipsis")
        lines.append(shown)
    return lines


def footer(frame: Frame, view: View, width: int) -> Text:
    """What is being typed, or the keys; and which rows are shown."""
    total = len(view.order(frame))
    last = min(view.first + view.rows, total)
    place = f" {view.first + 1 if total else 0}-{last} of {total}"
    if view.typing:
        left = line("/", (view.wanted, "bold"), ("▏ Enter keeps, Esc drops", "dim"))
    elif view.wanted:
        left = line("filter: ", (view.wanted, "bold"), ("  Esc drops it", "dim"))
    else:
        left = line(("q quit  s sort  r reverse  / filter  p pause  ? help", "dim"))
    room = max(width - len(place), 0)
    left.truncate(room, overflow="ellipsis")
    left.pad_right(max(room - left.cell_len, 0))
    return line(left, place)


def _paragraph(lines: Iterable[Text]) -> Text:
    text = Text("\n", no_wrap=True, overflow="crop", end="").join(lines)
    text.no_wrap, text.overflow = True, "crop"
    return text


def _regions(frame: Frame, view: View, screen: Screen) -> Sequence[tuple[str, list[Text]]]:
    height = screen.height
    if height is None:
        room_for_workers, room_for_log, room = len(frame.workers) + 1, 11, None
    else:
        room_for_workers = min(len(frame.workers), max(height // 6, 1)) + 1 if height >= 10 else 0
        room_for_log = 1 + height // 7 if height >= 14 else 0
        room = max(height - HEADER_LINES - room_for_workers - room_for_log - 1, 2)
    width = screen.width
    middle = [line(cut(text, width)) for text in HELP.splitlines()] if view.help else rules(frame, view, screen, room)
    regions = (
        ("header", header(frame, view, screen)),
        ("workers", workers(frame, room_for_workers, width)),
        ("rules", middle if room is None else [*middle, *[line("")] * (room - len(middle))][:room]),
        ("log", log(frame, room_for_log, width)),
        ("footer", [footer(frame, view, width)] if height is not None else []),
    )
    for _, region in regions:
        for text in region:
            text.truncate(width)
    return regions


def lines(frame: Frame, view: View, screen: Screen) -> list[Text]:
    """The whole frame, line by line, for a screen of no certain height."""
    return [text for _, region in _regions(frame, view, screen) for text in region]


def layout(frame: Frame, view: View, screen: Screen) -> Layout:
    """The frame as it fills a terminal."""
    regions = [(name, region) for name, region in _regions(frame, view, screen) if region]
    whole = Layout()
    whole.split_column(*(Layout(_paragraph(region), name=name, size=len(region)) for name, region in regions))
    return whole
