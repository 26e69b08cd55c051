"""What of `mcrctl top` needs no relay: keys, order, filter, and lines that fit whatever the terminal's size."""

import dataclasses
import re
from datetime import datetime

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console

from relay.cli.top.columns import COLUMNS, age, duration, plain, short
from relay.cli.top.draw import HELP, Screen, layout, lines, plan
from relay.cli.top.keys import Keys
from relay.cli.top.rates import Counts, Past, Rates
from relay.cli.top.rules import from_answer
from relay.cli.top.view import SORT_KEYS, View
from relay.cli.top.watch import Frame, StreamRows, WorkerRow

IDS = ["beta", "alpha", "gamma", "x" * 64]


def frame(ids: list[str] | None = None, workers: int = 1, log: tuple[str, ...] = ()) -> Frame:
    """A frame of rules, the first with the least traffic."""
    ids = IDS if ids is None else ids
    answer = [
        {
            "rule_id": rule_id,
            "input_group": f"239.1.1.{i % 250}",
            "input_port": 5001,
            "source": None,
            "outputs": [{"group": "239.2.2.2", "port": 6001, "interface": "right"}] * (1 + i % 3),
            "state": "active" if i % 5 else "waiting: interface right is down",
            "slot": i,
            "output_slots": [i] * (1 + i % 3),
        }
        for i, rule_id in enumerate(ids)
    ]
    numbers = np.arange(len(ids))
    floats = numbers * 1234.5
    return Frame(
        time_s=1000.0,
        wall=datetime(2026, 11, 25, 12, 0, 0),
        instance="test",
        rules=from_answer(answer),
        counts=Counts(numbers, numbers, numbers, numbers, numbers * 99_999_999, numbers * 10**9),
        rates=Rates(floats, floats, floats * 1e6, floats),
        streams=StreamRows(numbers * 15.0 - 1, numbers * 0.0, numbers * 41_000 - 1),  # the first has none
        past=Past(np.array([900.0, 1000.0]), (np.zeros(len(ids)), floats)),
        workers=tuple(
            WorkerRow(
                *(core, 10 + core, "", 99.9, 1e6, 1e6, 1e10, 7, 95),
                *({"no_match": 12_345_678, "ttl": 3}, 1.0, (9_700, 418_000)),
            )
            for core in range(workers)
        ),
        drops={"no_match": (123_456_789, 5.0), "egress_full": (1, 0.0)},
        log=log,
        condition="mcrd has ended: " + "x" * 100,
    )


def test_sequences_of_a_terminal_are_keys_however_they_are_cut() -> None:
    sent = b"a\x1b[A\x1bOB\x1b[5~/\x7f\r\x1b[6~\x1b[1;5C"
    expected = ["a", "up", "down", "page up", "/", "backspace", "enter", "page down"]
    for size in (1, 2, 3, len(sent)):
        keys = Keys()
        got = [key for at in range(0, len(sent), size) for key in keys.feed(sent[at : at + size])]
        assert got == expected
        assert not keys.is_waiting


def test_an_escape_by_itself_is_a_key_once_nothing_follows() -> None:
    keys = Keys()
    assert keys.feed(b"\x1b") == []
    assert keys.is_waiting
    assert keys.flush() == ["escape"]
    assert keys.feed(b"\x1bq") == ["escape", "q"]


@given(st.binary(max_size=200))
def test_no_input_is_too_strange(received: bytes) -> None:
    keys = Keys()
    view = View()
    for key in [*keys.feed(received), *keys.flush()]:
        view.press(key)
        view.order(frame())
    assert len(view.order(frame())) <= len(IDS)


def test_each_key_sorts_and_turns_round() -> None:
    shown = frame()
    view = View()
    assert view.order(shown).tolist() == [3, 2, 1, 0]
    view.press("n")
    assert [IDS[i] for i in view.order(shown)] == sorted(IDS)
    view.press("n")
    assert [IDS[i] for i in view.order(shown)] == sorted(IDS, reverse=True)
    for key in SORT_KEYS[1:]:
        view.press(key)
        assert (view.sort_key, view.ascending) == (key, key == "n")
    view.press("s")
    assert view.sort_key == SORT_KEYS[0]
    view.press("left")
    assert view.sort_key == SORT_KEYS[-1]


def test_rules_that_look_alike_keep_their_order() -> None:
    shown = frame(["a", "b", "c"])
    shown.rates.sent_bits[:] = [1_000_001.0, 1_000_100.0, 1_000_050.0]
    assert View().order(shown).tolist() == [0, 1, 2]


def test_a_filter_finds_all_of_its_words_anywhere_and_can_be_dropped() -> None:
    shown, view = frame(), View()
    for key in ("/", *"GAMMA 239.1.1.2", "enter"):
        view.press(key)
    assert view.order(shown).tolist() == [2]
    for key in ("/", "kill", *"waiting", "enter"):
        view.press(key)
    assert view.order(shown).tolist() == [0]
    for key in ("/", *"zzz"):
        view.press(key)
    assert not len(view.order(shown))
    view.press("escape")
    assert (view.wanted, view.order(shown).tolist()) == ("waiting", [0])
    view.press("escape")
    assert len(view.order(shown)) == len(IDS)


def test_letters_of_a_filter_are_no_commands() -> None:
    view = View()
    for key in ("/", *"qpq"):
        view.press(key)
    assert (view.wanted, view.quitting, view.paused) == ("qpq", False, False)


def test_scrolling_stays_inside() -> None:
    shown, view = frame([f"r{i:03}" for i in range(100)]), View(sort_key="n", ascending=True)

    def top(*keys: str) -> str:
        for key in keys:
            view.press(key)
        drawn = [text.plain for text in lines(shown, view, Screen(80, 24))]
        head = next(i for i, text in enumerate(drawn) if text.startswith("rule"))
        return drawn[head + 1].split()[0]

    assert top("up", "page up") == "r000"
    assert top("down", "down") == "r002"
    last = top("end", "down", "page down")
    assert int(last[1:]) == 100 - view.rows
    assert top("home") == "r000"


@given(st.integers(1, 250), st.integers(1, 80), st.sampled_from([0, 1, 4, 300]), st.integers(0, 9), st.booleans())
def test_no_line_is_wider_and_no_frame_higher_than_the_terminal(
    width: int, height: int, rules: int, workers: int, helping: bool
) -> None:
    log = ("2026-11-25T04:29:31.999531Z [Warning] [Ingress] " + "界" * 200, "no stamp")
    shown = frame([f"rule-{i}-" + "y" * (i % 50) for i in range(rules)], workers, log)
    view = View(help=helping, paused=True)
    drawn = lines(shown, view, Screen(width, height))
    assert max(text.cell_len for text in drawn) <= width
    console = Console(width=width, height=height, force_terminal=True, color_system=None)
    assert len(console.render_lines(layout(shown, view, Screen(width, height)), pad=False)) == height


def test_eighty_columns_show_what_matters_and_two_hundred_show_all() -> None:
    shown = frame(["tv", "radio"])
    narrow, wide = ("\n".join(t.plain for t in lines(shown, View(), Screen(w, 24))) for w in (80, 200))
    for title in ("rule", "in/s", "out/s", "bit/s▼", "drops", "last", "loss", "jitter", "last minute", "lat p50"):
        assert title in narrow
        assert title in wide
    assert "239.2.2.2:6001:right +1" in wide
    assert "waiting: interface right is down" in wide
    assert "waiting: interface right" in narrow  # where loss and jitter would be, as tv has none
    for text in (narrow, wide):
        assert re.search(r"^radio .* 14 +41 µs ", text, re.MULTILINE)
        assert re.search(r"^ +0 .* 9.7 µs 418 µs", text, re.MULTILINE)


@given(st.integers(1, 250), st.integers(1, 64))
def test_on_narrow_screens_jitter_gives_way_first_then_bars_then_the_age_and_last_the_loss(
    width: int, names: int
) -> None:
    chosen = plan(width, names, 24)
    titles = {column.title for column in chosen.columns}
    assert "loss" in titles or "last" not in titles
    assert "last" in titles or not chosen.bars
    assert "jitter" in titles or not chosen.input
    if width >= 80:
        assert {"loss", "last"} <= titles
    if width >= 80 and names <= 12:
        assert "jitter" in titles
        assert chosen.bars >= 8


def test_the_help_fits_into_a_small_terminal() -> None:
    drawn = [text.plain.rstrip() for text in lines(frame(), View(help=True), Screen(80, 24))]
    assert " Any key goes back." in drawn
    helped = drawn[drawn.index(HELP.splitlines()[0]) :]
    assert helped[: len(HELP.splitlines())] == HELP.splitlines()
    for column in COLUMNS:
        assert re.search(rf"^ [a-zA-Z ]*\b{column.key}\b.* sort by .*{column.title}", HELP, re.MULTILINE)


def test_a_rule_without_rtp_and_mpeg_ts_has_no_loss_and_sorts_behind_one_with_none_lost() -> None:
    shown, view = frame(["plain", "well", "ill"]), View()
    shown.streams.losses[:] = [-1, 0, 1]
    shown.streams.losses_now[2] = 1
    view.press("l")
    assert view.order(shown).tolist() == [2, 1, 0]
    drawn = [text for text in lines(shown, view, Screen(200, 24)) if text.plain.startswith(("plain", "well", "ill"))]
    styles = [
        [str(span.style) for span in text.spans if text.plain[span.start : span.end].strip() == "1"] for text in drawn
    ]
    assert [text.plain.split()[0] for text in drawn] == ["ill", "well", "plain"]
    assert "bold red" in styles[0]


def test_a_worker_that_does_not_run_has_its_state_where_latency_was() -> None:
    shown = frame()
    ill = dataclasses.replace(shown.workers[0], state="silent for 100 s", latency_ns=None)
    drawn = [text.plain for text in lines(dataclasses.replace(shown, workers=(ill,)), View(), Screen(80, 24))]
    assert sum("silent for 100 s" in text for text in drawn) == 1


@pytest.mark.parametrize(
    ("value", "text"),
    [
        *((0, "0"), (0.04, "0.0"), (9.94, "9.9"), (9.96, "10"), (999, "999"), (999.6, "1.00 k"), (12_345, "12.3 k")),
        *((999_600, "1.00 M"), (5.5e9, "5.50 G"), (1 << 53, "9007 T")),
    ],
)
def test_numbers_have_three_digits(value: float, text: str) -> None:
    assert short(value) == text
    assert len(text) <= 6


@pytest.mark.parametrize(
    ("ns", "text"),
    [(0, "0.0 µs"), (9_940, "9.9 µs"), (9_960, "10 µs"), (999_400, "999 µs"), (999_600, "1.0 ms"), (12.4e9, "12 s")],
)
def test_durations_have_one_unit(ns: float, text: str) -> None:
    assert duration(ns) == text
    assert len(text) <= 6


def test_counts_are_exact_while_they_are_short() -> None:
    assert (plain(99_999), plain(100_000)) == ("99999", "100 k")


@pytest.mark.parametrize(
    ("since_s", "text"), [(-5, "<1 s"), (1.2, "1 s"), (119, "119 s"), (600, "10 min"), (7200, "2 h"), (1e9, "11574 d")]
)
def test_ages_have_one_unit(since_s: float, text: str) -> None:
    assert age(since_s) == text
