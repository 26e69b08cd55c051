"""When a restart is agreed to. The program that is checked is a real process: this Python, with other arguments."""

import sys
import time
from collections.abc import Callable, Iterator

import pytest

from relay.supervisor import restart
from relay.supervisor.restart import Restarter
from relay.supervisor.timers import Timers

DEADLINE_S = 60.0
REFUSED = "not restarted, the relay goes on as it is: "


class Asked:
    """A restarter, what stands in the way of a restart, and what was answered."""

    def __init__(self) -> None:
        self.timers = Timers()
        self.obstacles: Iterator[str | None] = iter(())
        self.answers: list[str] = []
        self.restarter = Restarter(self.timers, lambda: next(self.obstacles))

    def ask(self) -> None:
        self.restarter.begin(lambda: self.answers.append("agreed"), self.answers.append)

    def run_until(self, condition: Callable[[], bool]) -> None:
        end_s = time.monotonic() + DEADLINE_S
        while not condition():
            assert time.monotonic() < end_s
            time.sleep(max(min(self.timers.next_s(), end_s) - time.monotonic(), 0))
            self.timers.run_due()


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> Asked:
    monkeypatch.setattr(sys, "orig_argv", [sys.executable, "-c", "pass"])
    return Asked()


def test_a_restart_is_agreed_to_when_nothing_stands_in_its_way_any_more(asked: Asked) -> None:
    asked.obstacles = iter(("the template starts", "it still does", None))
    asked.ask()
    asked.run_until(lambda: bool(asked.answers))
    assert asked.answers == ["agreed"]
    assert next(asked.obstacles, "none left") == "none left"


def test_what_stands_in_the_way_for_too_long_is_told_and_another_may_be_asked_for(
    asked: Asked, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(restart, "KEPT_S_MAX", 2 * restart.POLL_S)
    asked.obstacles = iter(["the template starts"] * 3 + [None])
    asked.ask()
    asked.ask()
    assert asked.answers == ["a restart is under way"]
    asked.run_until(lambda: len(asked.answers) == 2)
    assert asked.answers[1] == f"{REFUSED}the template starts after 0 s: try again"
    asked.ask()
    asked.run_until(lambda: len(asked.answers) == 3)
    assert asked.answers[2] == "agreed"


def test_a_program_that_can_not_start_is_told_before_anything_is_waited_for(
    asked: Asked, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "orig_argv", [sys.executable, "-c", "import sys; sys.exit('no such option')"])
    asked.ask()
    asked.run_until(lambda: bool(asked.answers))
    assert asked.answers == [f"{REFUSED}no such option"]
