"""Both clients against a server that does what a relay should not: late, half and wrong answers, a full queue."""

import asyncio
import contextlib
import errno
import inspect
import json
import re
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

import relay
from relay import api, calls
from relay.async_client import AsyncClient
from relay.client import Client
from relay.errors import ControlError, UnreachableError

PONG = b'{"ok":true,"result":{"version":"9"}}\n'
Serve = Callable[[socket.socket, bytes], None]


def sync_run(path: Path, timeout_s: float, *requests: api.Request) -> list[Any]:
    """What each request of one client came to: an answer's result, or the error."""
    outcomes: list[Any] = []
    with Client(path, timeout_s) as client:
        for request in requests:
            try:
                outcomes.append(client.ask(request).result)
            except (ControlError, UnreachableError) as error:
                outcomes.append(error)
    return outcomes


def async_run(path: Path, timeout_s: float, *requests: api.Request) -> list[Any]:
    async def run() -> list[Any]:
        outcomes: list[Any] = []
        async with AsyncClient(path, timeout_s) as client:
            for request in requests:
                try:
                    outcomes.append((await client.ask(request)).result)
                except (ControlError, UnreachableError) as error:
                    outcomes.append(error)
        return outcomes

    return asyncio.run(run())


both = pytest.mark.parametrize("run", [sync_run, async_run], ids=["Client", "AsyncClient"])
Run = Callable[..., list[Any]]


@contextlib.contextmanager
def server(path: Path, *connections: Serve) -> Iterator[None]:
    """Takes connections one after the other, and gives the lines that come by each to its function."""

    def serve() -> None:
        for answer in connections:
            client, _ = listener.accept()
            with client, contextlib.suppress(OSError):
                for line in client.makefile("rb"):
                    answer(client, line)

    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as listener:
        listener.bind(str(path))
        listener.listen()
        thread = threading.Thread(target=serve, daemon=True)
        thread.start()
        yield
        thread.join(30)
        assert not thread.is_alive()


def answers(client: socket.socket, line: bytes) -> None:
    client.sendall(PONG)


def breaks(client: socket.socket, line: bytes) -> None:
    client.sendall(PONG[:9])
    client.shutdown(socket.SHUT_RDWR)


def stays_silent(client: socket.socket, line: bytes) -> None:
    pass


@both
def test_a_connection_that_breaks_is_opened_again_and_the_request_repeated(tmp_path: Path, run: Run) -> None:
    with server(tmp_path / "s", breaks, breaks, answers):
        assert run(tmp_path / "s", 30, api.Ping()) == [{"version": "9"}]


@both
def test_a_change_is_repeated_under_the_same_id(tmp_path: Path, run: Run) -> None:
    lines: list[bytes] = []

    def notes(client: socket.socket, line: bytes) -> None:
        lines.append(line)
        (breaks if len(lines) == 1 else answers)(client, line)

    with server(tmp_path / "s", notes, notes):
        run(tmp_path / "s", 30, api.RemoveRules(("tv",)))
    assert len(lines) == 2
    assert lines[0] == lines[1]
    assert len(json.loads(lines[0])["change_id"]) == 32


@both
def test_a_restart_is_not_repeated(tmp_path: Path, run: Run) -> None:
    with server(tmp_path / "s", breaks):
        (outcome,) = run(tmp_path / "s", 30, api.Restart())
    assert isinstance(outcome, UnreachableError)


@both
def test_a_late_answer_is_not_taken_for_that_of_the_next_request(tmp_path: Path, run: Run) -> None:
    with server(tmp_path / "s", stays_silent, answers):
        late, next_one = run(tmp_path / "s", 0.2, api.Ping(), api.Ping())
    assert str(late) == (
        f"{tmp_path}/s: no answer within 0.2 s: if its mcrd is gone, start it again with the same options: "
        "workers relay meanwhile, and it takes them over"
    )
    assert next_one == {"version": "9"}


@both
@pytest.mark.parametrize("line", [b"HTTP/1.1 400 Bad Request\n", b"[]\n", b'{"ok":1}\n', b"\xff\n"])
def test_what_is_no_answer_is_told(tmp_path: Path, run: Run, line: bytes) -> None:
    with server(tmp_path / "s", lambda client, _: client.sendall(line)):
        (outcome,) = run(tmp_path / "s", 30, api.Ping())
    assert isinstance(outcome, ControlError)
    assert "give the control socket of mcrd" in str(outcome)


@both
def test_a_refusal_has_the_relays_words(tmp_path: Path, run: Run) -> None:
    with server(tmp_path / "s", lambda client, _: client.sendall(b'{"ok":false,"error":"no: do this"}\n')):
        (outcome,) = run(tmp_path / "s", 30, api.Ping())
    assert isinstance(outcome, ControlError)
    assert str(outcome) == "no: do this"


@both
def test_no_relay_is_told_with_the_remedy(tmp_path: Path, run: Run) -> None:
    with pytest.raises(
        UnreachableError, match=r"No such file or directory: start one with `sudo mcrd --interface …` or `sudo make run"
    ):
        run(tmp_path / "none", 1)


@both
def test_a_path_that_no_socket_can_have_is_told(tmp_path: Path, run: Run) -> None:
    with pytest.raises(UnreachableError, match="AF_UNIX path too long: start one"):
        run(tmp_path / ("s" * 120), 1)


def test_who_may_not_connect_is_told_whom_to_ask_as() -> None:
    error = calls.unreachable(Path("/run/mcr/control.sock"), PermissionError(errno.EACCES, "Permission denied"))
    assert str(error).endswith("Permission denied: ask as root, or as a member of the relay's --socket-group")


@both
def test_a_queue_of_clients_that_stays_full_is_told_after_the_timeout(tmp_path: Path, run: Run) -> None:
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as listener, contextlib.ExitStack() as stack:
        listener.bind(str(tmp_path / "s"))
        listener.listen(0)
        stack.enter_context(socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)).connect(str(tmp_path / "s"))
        with pytest.raises(UnreachableError, match="its queue of clients stayed full"):
            run(tmp_path / "s", 0.2, api.Ping())


def test_a_result_of_another_shape_is_told(tmp_path: Path) -> None:
    path = tmp_path / "s"
    with server(path, lambda client, _: client.sendall(b'{"ok":true,"result":{}}\n')), Client(path) as client:
        with pytest.raises(ControlError, match="use a client of the relay's version"):
            client.ping()
        client.close()


def test_who_waits_long_is_told_once_for_what(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The relay's process lives, and does not answer; it answers the request that follows."""
    monkeypatch.setattr("relay.client.SILENCE_S", 0.05)
    path, told = tmp_path / "socket", list[str]()
    with server(path, stays_silent, answers), Client(path, 0.3, on_silence=told.append) as asking:
        with pytest.raises(UnreachableError, match="no answer within"):
            asking.ask(api.Ping())
        assert asking.ping().version == "9"
    assert told == [f"{path}: mcrd does not answer: is it running? waiting 0 s more"]


def test_a_cancelled_request_costs_the_others_nothing(tmp_path: Path) -> None:
    async def run() -> tuple[str, str]:
        async with AsyncClient(tmp_path / "s", 30) as client:
            first = asyncio.create_task(client.ping())
            second, third = asyncio.create_task(client.ping()), asyncio.create_task(client.ping())
            await came
            first.cancel()
            with pytest.raises(asyncio.CancelledError):
                await first
            return (await second).version, (await third).version

    loop = asyncio.new_event_loop()
    came = loop.create_future()

    def tells(client: socket.socket, line: bytes) -> None:
        loop.call_soon_threadsafe(came.set_result, None)

    with contextlib.closing(loop), server(tmp_path / "s", tells, answers):
        assert loop.run_until_complete(run()) == ("9", "9")


def test_both_clients_have_the_same_methods() -> None:
    def methods(kind: type) -> dict[str, inspect.Signature]:
        found = inspect.getmembers(kind, inspect.isfunction)
        return {name: inspect.signature(method) for name, method in found if not name.startswith("_")}

    assert methods(Client) == methods(AsyncClient)
    assert all(inspect.iscoroutinefunction(getattr(AsyncClient, name)) for name in methods(Client))


def test_importing_the_clients_loads_nothing_of_the_data_path() -> None:
    program = "import sys, relay; print(*sys.modules); from relay import *; print(*sys.modules)"
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    first, second = (set(re.findall(r"\S+", line)) for line in result.stdout.splitlines())
    assert first & {"msgspec", "asyncio", "socket", "relay.client"} == set()
    assert second & {"numpy", "numba", "llvmlite", "click", "rich", "psutil"} == set()
    assert {"relay.client", "relay.async_client"} <= second


def test_every_name_of_the_package_is_there_and_others_are_not() -> None:
    assert all(getattr(relay, name).__name__ == name for name in relay.__all__)
    with pytest.raises(AttributeError, match="has no attribute 'Klient'"):
        _ = relay.Klient
