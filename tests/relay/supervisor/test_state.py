"""The state file: whatever is saved comes back, and whatever else lies there is refused or set aside."""

import itertools
import os
import pwd
import re
import signal
import time
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory
from unittest import mock

import pytest
from hypothesis import given
from hypothesis import strategies as st
from msgspec import structs

from relay.errors import PreflightError, RelayError
from relay.rules import Output, Rule
from relay.supervisor.orphans import VERSION as INVENTORY_VERSION
from relay.supervisor.orphans import Inventory, KeptProcess, KeptWorker, inventory_file
from relay.supervisor.state import VERSION, State, StateFile, state_file

RULE = Rule(rule_id="r", input_group="239.1.1.1", input_port=5001, outputs=(Output("239.2.2.2", 6001, "lo"),))
KILLS = 30
STATE = State(VERSION, (RULE,), ("r",))

groups = st.integers(1, 254).map(lambda last: f"239.3.3.{last}")
outputs = st.builds(
    Output, groups, st.integers(1, 65_535), st.just("lo"), st.none() | st.integers(1, 255) | st.just("decrement")
)
rules = st.builds(
    Rule,
    rule_id=st.from_regex(r"[A-Za-z0-9][A-Za-z0-9._-]{0,19}", fullmatch=True),
    input_group=groups.map(lambda group: group.replace("239.3", "239.4")),
    input_port=st.integers(1, 65_535),
    outputs=st.lists(outputs, min_size=1, max_size=3, unique_by=lambda o: (o.group, o.port)).map(tuple),
)
states = st.builds(State, st.just(VERSION), st.lists(rules, max_size=4).map(tuple), st.lists(st.text()).map(tuple))


@pytest.fixture
def file(tmp_path: Path) -> StateFile[State]:
    return state_file(tmp_path / "rules", tmp_path / "socket")


@given(first=states, second=states)
def test_what_was_saved_last_is_loaded(first: State, second: State) -> None:
    with TemporaryDirectory() as folder:
        file = state_file(Path(folder) / "rules", Path(folder) / "socket")
        for state in (first, second):
            file.save(state)
            assert file.load() == (state, [])
        assert [path.name for path in Path(folder).iterdir()] == ["rules"]


@given(content=st.binary(max_size=200))
def test_any_other_content_is_set_aside_whole(content: bytes) -> None:
    with TemporaryDirectory() as folder:
        file = state_file(Path(folder) / "rules", Path(folder) / "socket")
        file.path.write_bytes(content)
        document, (line,) = file.load()
        assert document is None
        assert f"{file.path} is damaged and was set aside as {file.path}.damaged" in line
        assert Path(f"{file.path}.damaged").read_bytes() == content
        assert file.load() == (None, [])


@given(cut=st.integers(0, 400), state=states)
def test_a_file_that_was_cut_is_never_taken_for_whole(cut: int, state: State) -> None:
    with TemporaryDirectory() as folder:
        file = state_file(Path(folder) / "rules", Path(folder) / "socket")
        file.save(state)
        whole = file.path.read_bytes()
        file.path.write_bytes(whole[: min(cut, len(whole) - 1)])
        assert file.load()[0] is None


@pytest.mark.parametrize(
    ("state", "reason"),
    [
        (State(VERSION + 1), "version 2, expected 1"),
        (State(VERSION, (structs.replace(RULE, input_port=0),)), "port"),
        (State(VERSION, (structs.replace(RULE, input_group="nonsense"),)), "nonsense"),
    ],
)
def test_what_this_version_can_not_have_written_is_set_aside(file: StateFile[State], state: State, reason: str) -> None:
    file.save(state)
    document, (line,) = file.load()
    assert document is None
    assert reason in line


def test_without_a_file_there_is_nothing(file: StateFile[State]) -> None:
    assert file.load() == (None, [])


def test_the_file_is_the_owners_alone_whatever_the_umask(file: StateFile[State]) -> None:
    former = os.umask(0)
    try:
        file.save(STATE)
    finally:
        os.umask(former)
    assert file.path.stat().st_mode & 0o777 == 0o600


@pytest.mark.parametrize("call", ["write", "fsync", "replace"])
def test_a_save_that_fails_leaves_the_former_file(file: StateFile[State], call: str) -> None:
    file.save(STATE)
    target = {"write": "os.fdopen", "fsync": "os.fsync", "replace": "pathlib.Path.replace"}[call]
    with mock.patch(target, side_effect=OSError(28, "No space left on device")), pytest.raises(RelayError) as raised:
        file.save(State(VERSION))
    assert str(raised.value) == f"state file {file.path} not written: No space left on device: the former one stands"
    assert file.load() == (STATE, [])
    file.save(State(VERSION))
    assert file.load() == (State(VERSION), [])


def save_for_ever(file: StateFile[State]) -> None:
    for number in itertools.count():
        file.save(State(VERSION, (RULE,) * (number % 50)))


def test_a_file_whose_writer_is_killed_is_always_whole(file: StateFile[State]) -> None:
    for kill in range(KILLS):
        pid = os.fork()
        if pid == 0:
            save_for_ever(file)
        time.sleep(0.02 + 0.0013 * kill)  # at any moment
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
        document, lines = file.load()
        assert lines == []
        assert document is not None or kill == 0
        file.prepare()


def test_what_a_killed_supervisor_left_unfinished_is_removed_and_said(file: StateFile[State], tmp_path: Path) -> None:
    unfinished = tmp_path / "rules.unfinished"
    unfinished.write_text('{"ver')
    assert file.prepare() == [f"Removed the half-written {unfinished} of a killed supervisor"]
    assert file.prepare() == []
    assert list(tmp_path.iterdir()) == []


def test_a_link_where_the_file_is_written_is_not_followed(file: StateFile[State], tmp_path: Path) -> None:
    victim = tmp_path / "victim"
    victim.write_text("precious")
    (tmp_path / "rules.unfinished").symlink_to(victim)
    file.save(STATE)
    (tmp_path / "rules.unfinished").symlink_to(victim)
    file.prepare()
    assert victim.read_text() == "precious"
    assert not file.path.is_symlink()


def make_link(path: Path) -> None:
    path.with_name("elsewhere").write_text("{}")
    path.symlink_to(path.with_name("elsewhere"))


def make_writable(path: Path) -> None:
    path.write_text("{}")
    path.chmod(0o666)


def make_foreign(path: Path) -> None:
    path.write_text("{}")
    os.chown(path, pwd.getpwnam("daemon").pw_uid, -1)


@pytest.mark.parametrize("make", [make_link, make_writable, make_foreign, Path.mkdir, os.mkfifo])
def test_what_others_could_have_written_is_not_believed(file: StateFile[State], make: Callable[[Path], None]) -> None:
    if make is make_foreign and os.geteuid() != 0:
        pytest.skip("another user's file needs root")
    make(file.path)
    with pytest.raises(PreflightError, match=rf"^state file {re.escape(str(file.path))}: .*: .*remove it"):
        file.load()


def test_a_missing_folder_is_refused_with_the_remedy(tmp_path: Path) -> None:
    file = state_file(tmp_path / "no" / "rules", tmp_path / "socket")
    with pytest.raises(PreflightError, match="No such file or directory: give --state a file in an existing directory"):
        file.prepare()


def test_without_an_option_it_lies_beside_the_socket(tmp_path: Path) -> None:
    assert state_file(None, tmp_path / "control.sock").path == tmp_path / "control.state"


def test_removing_takes_the_unfinished_file_too(file: StateFile[State], tmp_path: Path) -> None:
    file.save(STATE)
    (tmp_path / "rules.unfinished").write_text("{")
    file.remove()
    file.remove()
    assert list(tmp_path.iterdir()) == []


def test_an_inventory_comes_back_as_it_was_written(tmp_path: Path) -> None:
    inventory = Inventory(
        INVENTORY_VERSION, "boot", 10, KeptProcess(11, 100), 1 << 24, 0, (0, 1), (KeptWorker(12, 101, 0),)
    )
    file = inventory_file(tmp_path / "control.sock")
    file.save(inventory)
    assert file.load() == (inventory, [])
    assert (tmp_path / "control.inventory").exists()
