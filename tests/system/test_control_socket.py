"""The control socket: who may do what, what a client can't do to the others, and what a dead control plane costs.

gen ──left── relay ──right── sink
"""

import grp
import json
import os
import pwd
import random
import resource
import selectors
import signal
import socket
import stat
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO

import psutil
import pytest

from relay import api
from relay.client import Client
from relay.controlplane.places import OF_A_USER_MAX
from relay.controlplane.server import CHANGES_MAX
from relay.rules import Output, Rule
from tests.system.conftest import StartRelay
from tests.system.harness import BIN, Relay, assert_perfect, receiving, send, wait_until
from tests.system.test_child_messages import CONTROL_PLANE, child
from tools.netns import Line

STRANGER = pwd.getpwnam("daemon")
GROUP = grp.getgrnam("staff")
FLOODS = 1000
BACK_S_MAX = 1.0  # promised: from the control plane's death to an answer
TOLD = 3  # the descriptor by which a process of another user is heard
CHANGE = b'{"type":"log-level","level":"info"}'
LOOK = b'{"type":"ping"}'


@contextmanager
def process_of(uid: int, gids: tuple[int, ...], path: Path, run: Callable[[], bytes]) -> Iterator[IO[bytes]]:
    """Run something as another user, in the socket's folder; what it returns, or writes to TOLD, can be read."""
    reader, writer = os.pipe()
    pid = os.fork()
    if pid == 0:
        status = 1
        try:
            os.close(reader)
            if writer != TOLD:
                os.dup2(writer, TOLD)
            os.chdir(path.parent)
            os.setgroups(gids)
            os.setresgid(STRANGER.pw_gid, STRANGER.pw_gid, STRANGER.pw_gid)
            os.setresuid(uid, uid, uid)
            os.write(TOLD, run())
            status = 0
        except Exception:
            os.write(2, traceback.format_exc().encode())  # sys.stderr may be a file of the tests that is closed here
        finally:
            os._exit(status)
    os.close(writer)
    try:
        with os.fdopen(reader, "rb") as result:
            yield result
    finally:
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)


def ask_raw(name: str | Path, request: bytes) -> bytes:
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as client:
        try:
            client.connect(str(name))
        except PermissionError:
            return b"not let in"
        client.sendall(request + b"\n")
        return client.makefile("rb").readline()


def answer_to(relay: Relay, request: bytes, uid: int, *gids: int) -> bytes:
    """What another user is answered."""
    relay.socket.parent.chmod(0o711)
    with process_of(uid, gids, relay.socket, lambda: ask_raw(relay.socket.name, request)) as answer:
        return answer.read()


@pytest.fixture
def relay(line: Line, start_relay: StartRelay) -> Relay:
    return start_relay(line.hosts[1], ("left",), 1, "--ring-mib", "64")


# --- who may do what ----------------------------------------------------------------------------------


def test_without_options_everybody_looks_and_only_root_changes(relay: Relay) -> None:
    """`nobody`, as which the relay runs, is not trusted: other services run so, too."""
    assert stat.S_IMODE(relay.socket.stat().st_mode) == 0o666
    for uid in (STRANGER.pw_uid, pwd.getpwnam("nobody").pw_uid):
        assert b'"ok":true' in answer_to(relay, LOOK, uid)
        assert b"may look but not change anything" in answer_to(relay, CHANGE, uid)
    assert b'"ok":true' in answer_to(relay, CHANGE, 0)


def test_members_of_the_group_change_things_and_others_stay_outside(line: Line, start_relay: StartRelay) -> None:
    relay = start_relay(line.hosts[1], ("left",), 1, "--socket-group", GROUP.gr_name)
    status = relay.socket.stat()
    assert (stat.S_IMODE(status.st_mode), status.st_gid) == (0o660, GROUP.gr_gid)
    assert b'"ok":true' in answer_to(relay, CHANGE, STRANGER.pw_uid, GROUP.gr_gid)
    assert answer_to(relay, LOOK, STRANGER.pw_uid) == b"not let in"


def test_a_mode_lets_others_look_beside_a_group(line: Line, start_relay: StartRelay) -> None:
    relay = start_relay(line.hosts[1], ("left",), 1, "--socket-group", GROUP.gr_name, "--socket-mode", "0666")
    assert stat.S_IMODE(relay.socket.stat().st_mode) == 0o666
    assert b'"ok":true' in answer_to(relay, LOOK, STRANGER.pw_uid)
    assert b"may look but not change anything" in answer_to(relay, CHANGE, STRANGER.pw_uid)


@pytest.mark.parametrize(
    ("options", "exit_code", "message"),
    [
        (
            ("--socket-group", "nobody-at-all"),
            1,
            "no group 'nobody-at-all': choose an existing one with --socket-group",
        ),
        (("--socket-group", "nogroup"), 1, "stands for every group that is not known here"),
        (("--socket-mode", "rw"), 2, "socket_mode: Expected `str` matching regex"),
        (("--socket-mode", "0888"), 2, 'give octal digits such as "0660"'),
    ],
)
def test_wrong_options_of_the_socket_are_refused(
    line: Line, options: tuple[str, ...], exit_code: int, message: str
) -> None:
    command = [str(BIN / "mcrd"), "--interface", "left", "--check", *options]
    result = line.hosts[1].run(command, capture_output=True)
    assert (result.returncode, len(result.stderr.splitlines())) == (exit_code, 1)
    assert message in result.stderr


# --- limits -------------------------------------------------------------------------------------------


def flood(name: str, requests: list[bytes], sockets: int) -> None:
    """Ask on many connections without reading an answer; open another for each that is closed."""
    os.closerange(TOLD + 1, resource.getrlimit(resource.RLIMIT_NOFILE)[0])  # what the tests had open counts, too
    dice, made = random.Random(1), 0
    with selectors.DefaultSelector() as selector:

        def connect() -> None:
            client = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
            client.setblocking(False)
            try:
                client.connect(name)
            except OSError:
                client.close()
                return
            selector.register(client, selectors.EVENT_WRITE)

        while True:
            for _ in range(min(sockets - len(selector.get_map()), 50)):
                connect()
                made += 1
                if made == sockets:
                    os.write(TOLD, b"under way\n")
            for key, _ in selector.select(0.01):
                client = key.fileobj
                assert isinstance(client, socket.socket)
                try:
                    client.send(dice.choice(requests))
                except BlockingIOError:
                    continue
                except OSError:
                    selector.unregister(client)
                    client.close()


def test_a_thousand_floods_keep_nobody_from_an_answer(relay: Relay) -> None:
    """Pings, statistics, refusals, rubbish and halves of requests, of a user who may only look."""
    requests = [
        LOOK + b"\n",
        b'{"type":"get-stats"}\n',
        b'{"type":"list-rules"}\n',
        CHANGE + b"\n",
        b"x" * 5000,
        b'{"t',
    ]
    relay.socket.parent.chmod(0o711)

    def run() -> bytes:
        flood(relay.socket.name, [request * 20 for request in requests[:4]] + requests[4:], FLOODS)
        return b""

    with process_of(STRANGER.pw_uid, (), relay.socket, run) as told:
        assert told.readline() == b"under way\n"
        commands: list[api.Request] = [api.Ping(), api.GetStats(), api.ListRules(), api.LogLevel("info")]
        took_s: dict[str, list[float]] = {}
        for number in range(3):
            for command in commands:
                asked_s = time.monotonic()
                with Client(relay.socket) as client:
                    client.ask(command)
                took_s.setdefault(type(command).__name__, []).append(time.monotonic() - asked_s)
            relay.add(f"r{number}", f"239.1.1.1:{5001 + number}", "239.2.2.2:6001:right")
        assert len(relay.ask("list-rules")) == 3
    print("--- answered after", {kind: [f"{1000 * s:.0f} ms" for s in times] for kind, times in took_s.items()})
    relay.stop()


def test_a_client_that_reads_nothing_or_never_ends_its_request_is_let_go(relay: Relay) -> None:
    slow = [socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) for _ in range(3)]
    half, deaf, trickling = slow
    for client in slow:
        client.connect(str(relay.socket))
    half.sendall(LOOK)
    deaf.setblocking(False)
    deadline_s = time.monotonic() + 30
    while "an answer was not taken within 5 s" not in relay.text() or "was not complete within" not in relay.text():
        assert time.monotonic() < deadline_s
        with suppress(BlockingIOError, BrokenPipeError):
            deaf.send(b'{"type":"list-workers"}\n' * 100)
        with suppress(BrokenPipeError):
            trickling.send(b" ")
        relay.ask("ping")
    for client in (half, trickling):
        client.settimeout(15)
        assert b"a request was not complete within 5 s" in client.makefile("rb").readline()
    for client in slow:
        client.close()
    relay.stop()


def test_clients_that_leave_large_answers_unread_cost_little_and_delay_nobody(relay: Relay, tmp_path: Path) -> None:
    """Thirty clients ask for megabytes each, again and again, and read nothing."""
    relay.add_many(tmp_path, [(f"r{k}", f"239.1.{k >> 8}.{k & 255}:1", "239.2.2.2:6001:right") for k in range(3000)])
    plane = child(relay, CONTROL_PLANE)
    with Client(relay.socket) as client:
        size = len(str(client.ask(api.GetStats()).result))
        before = plane.memory_info().rss
        deaf = [socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) for _ in range(OF_A_USER_MAX - 2)]
        for other in deaf:
            other.connect(str(relay.socket))
            other.sendall(b'{"type":"get-stats"}\n' * 100)
        highest, took_s = before, []
        for _ in range(10):
            asked_s = time.monotonic()
            assert len(client.ask(api.GetStats()).result["rules"]) == 3000
            took_s.append(time.monotonic() - asked_s)
            highest = max(highest, plane.memory_info().rss)
        assert highest - before < 20 * size, (before, highest, size)
    print(f"--- answers of {size} bytes after at most {max(took_s):.3f} s; {highest - before} bytes more than before")
    for other in deaf:
        other.close()
    relay.stop()


def test_a_user_without_a_place_is_told_and_an_idle_connection_gives_way(relay: Relay) -> None:
    idle = [socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) for _ in range(OF_A_USER_MAX)]
    for client in idle:
        client.connect(str(relay.socket))
        client.sendall(LOOK + b"\n")
        assert b'"ok":true' in client.makefile("rb").readline()
    relay.ask("ping")  # in the place of the first
    assert idle[0].recv(1) == b""
    for client in idle:
        client.close()
    busy = [socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) for _ in range(OF_A_USER_MAX)]
    for client in busy:
        client.connect(str(relay.socket))
        client.sendall(LOOK)  # half a request
    result = wait_until(lambda: (r := relay.control("ping")).returncode == 1 and r, "no place is left")
    assert (
        f"too many connections: user id 0 may open another when one ends ({OF_A_USER_MAX} of a user)" in result.stderr
    )
    for client in busy:
        client.close()
    wait_until(lambda: relay.control("ping").returncode == 0, "places are free again")
    relay.stop()


def test_requests_are_as_long_as_their_sender_may_need(relay: Relay) -> None:
    padding = b" " * api.LOOK_BYTES_MAX
    assert b"request is over 4096 bytes" in answer_to(relay, LOOK + padding, STRANGER.pw_uid)
    assert b'"ok":true' in answer_to(relay, LOOK + padding, 0)
    assert b"request is over 16777216 bytes" in ask_raw(relay.socket, b" " * (api.REQUEST_BYTES_MAX + (1 << 17)))
    assert b"length <= 16384" in ask_raw(
        relay.socket, json.dumps({"type": "remove-rules", "rule_ids": ["r"] * 16385}).encode()
    )
    many = [{"group": "239.2.2.2", "port": port + 1, "interface": "right"} for port in range(1000)]
    rules = [{"input_group": f"239.1.1.{k}", "input_port": 1, "outputs": many} for k in range(33)]
    answer = ask_raw(relay.socket, json.dumps({"type": "add-rules", "rules": rules}).encode())
    assert b"33 rules with 33000 outputs are over the limits" in answer
    assert relay.ask("list-rules") == []
    relay.stop()


def test_large_changes_are_made_one_by_one_and_memory_stays(relay: Relay) -> None:
    """Four clients at once replace eight thousand outputs each, twice."""
    outputs = tuple(Output("239.2.2.2", port + 1, "right") for port in range(1000))
    rules = tuple(Rule(rule_id=f"r{k}", input_group=f"239.1.1.{k}", input_port=1, outputs=outputs) for k in range(8))
    errors: list[BaseException] = []

    def change(dscp: int) -> None:
        try:
            with Client(relay.socket, 120) as client:
                for turn in range(2):
                    priority = dscp + 8 * turn
                    changed = tuple(Output(o.group, o.port, o.interface, None, priority) for o in outputs)
                    client.ask(api.AddRules(tuple(_with(rule, changed) for rule in rules), replace=True))
        except BaseException as error:
            errors.append(error)

    change(48)
    plane = child(relay, CONTROL_PLANE)
    before = [process.memory_info().rss for process in (psutil.Process(relay.pid), plane)]
    threads = [threading.Thread(target=change, args=(dscp,)) for dscp in range(4)]
    for thread in threads:
        thread.start()
    relay.ask("ping")
    for thread in threads:
        thread.join()
    assert errors == []
    after = [process.memory_info().rss for process in (psutil.Process(relay.pid), plane)]
    assert all(now - then < 100 << 20 for then, now in zip(before, after, strict=True)), (before, after)
    assert len(relay.ask("list-rules")) == 8
    relay.stop()


def test_changes_that_can_not_wait_are_refused(relay: Relay) -> None:
    clients = [socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) for _ in range(CHANGES_MAX + 4)]
    os.kill(relay.pid, signal.SIGSTOP)  # so that none is made
    try:
        for number, client in enumerate(clients):
            client.connect(str(relay.socket))
            rule = {"rule_id": f"r{number}", "input_group": "239.1.1.1", "input_port": number + 1}
            rule["outputs"] = [{"group": "239.2.2.2", "port": 1, "interface": "right"}]
            client.sendall(json.dumps({"type": "add-rules", "rules": [rule]}).encode() + b"\n")
        with selectors.DefaultSelector() as selector:
            for client in clients:
                selector.register(client, selectors.EVENT_READ)
            wait_until(lambda: len(selector.select(0)) == 4, "four are refused")
            for key, _ in selector.select(0):
                assert isinstance(key.fileobj, socket.socket)
                assert f"{CHANGES_MAX} changes wait for their turn: try again".encode() in key.fileobj.recv(4096)
    finally:
        os.kill(relay.pid, signal.SIGCONT)
    wait_until(lambda: len(relay.ask("list-rules")) == CHANGES_MAX, "the others are made")
    for client in clients:
        client.close()
    relay.stop()


def _with(rule: Rule, outputs: tuple[Output, ...]) -> Rule:
    return Rule(rule_id=rule.rule_id, input_group=rule.input_group, input_port=rule.input_port, outputs=outputs)


# --- the control plane dies ---------------------------------------------------------------------------


def test_a_killed_control_plane_is_back_within_a_second_and_traffic_never_notices(
    line: Line, relay: Relay, tmp_path: Path
) -> None:
    gen, _, sink = line.hosts
    relay.add("r1", "239.1.1.1:5001", "239.2.2.2:6001:right")
    count = 150_000
    with (
        receiving(sink, tmp_path, "--interface", "left") as summary,
        Client(relay.socket) as old,
    ):
        old.ask(api.Ping())
        sending = threading.Thread(
            target=send, args=(gen, "--interface", "right", "--rate", "50000", "--count", str(count))
        )
        sending.start()
        wait_until(lambda: relay.stats()["packets_relayed"], "traffic flows")
        took_s = []
        for _ in range(3):
            victim = child(relay, CONTROL_PLANE)
            killed_s = time.monotonic()
            victim.kill()
            old.ask(api.Ping())  # on a connection that breaks: the client opens another
            took_s.append(time.monotonic() - killed_s)
        print(f"--- back after {', '.join(f'{1000 * s:.0f}' for s in took_s)} ms")
        assert [rule["rule_id"] for rule in old.ask(api.ListRules()).result] == ["r1"]
        sending.join()
        assert_perfect(summary(count), count)
    assert sorted(took_s)[1] < BACK_S_MAX
    relay.assert_accounted()
    relay.stop()


def test_a_change_whose_answer_is_lost_is_made_once(relay: Relay) -> None:
    """The control plane is killed with the change on its way; the client asks again, other clients see one rule."""
    for number in range(5):
        victim = child(relay, CONTROL_PLANE)
        rule = Rule(
            rule_id=f"r{number}",
            input_group="239.1.1.1",
            input_port=number + 1,
            outputs=(Output("239.2.2.2", 1, "right"),),
        )
        with Client(relay.socket) as client:
            client.ask(api.Ping())
            victim.suspend()
            killing = threading.Timer(0.05, victim.kill)
            killing.start()
            assert client.ask(api.AddRules((rule,))).result["rule_ids"] == [rule.rule_id]
            killing.join()
            again = api.RemoveRules((rule.rule_id,), change_id=f"remove-{number}")
            client.ask(again)
            child(relay, CONTROL_PLANE).kill()
            assert client.ask(again).result["rule_ids"] == [rule.rule_id]  # its first time was told to the next one
            with pytest.raises(Exception, match=f"no rule r{number}"):
                client.ask(api.RemoveRules((rule.rule_id,)))
    assert relay.text().count("added:") == relay.text().count("removed") == 5
    relay.stop()


# --- rubbish ------------------------------------------------------------------------------------------

REQUESTS = [
    LOOK,
    b'{"type":"list-workers"}',
    b'{"type":"log-level","facility":"Ingress","core":0}',
    b'{"type":"remove-rules","rule_ids":["none"]}',
    b'{"type":"add-rules","rules":[{"rule_id":"r","input_group":"239.1.1.1","input_port":1,"outputs":'
    b'[{"group":"239.2.2.2","port":1,"interface":"nowhere","ttl":"decrement"}],"source":null}]}',
]


def mutated(dice: random.Random) -> bytes:
    """A request with some of its bytes changed, cut out or put in, or bytes of chance; always a line."""
    if dice.random() < 0.1:
        return dice.randbytes(dice.randrange(200)).replace(b"\n", b"")
    line = bytearray(dice.choice(REQUESTS))
    for _ in range(dice.randrange(4)):
        at = dice.randrange(len(line))
        line[at : at + dice.randrange(4)] = dice.randbytes(dice.randrange(4)).replace(b"\n", b"")
        if not line:
            break
    if dice.random() < 0.01:
        line = bytearray(b"[" * dice.randrange(5000))
    return bytes(line)


def converse(relay: Relay, dice: random.Random, messages: int) -> None:
    """Send that many lines over connections of up to 500 each, and read an answer to each."""
    left = messages
    while left:
        batch = min(left, dice.randrange(1, 500))
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as client:
            client.settimeout(60)
            client.connect(str(relay.socket))
            answers = client.makefile("rb")
            for at in range(0, batch, 50):
                lines = [mutated(dice) for _ in range(min(50, batch - at))]
                client.sendall(b"\n".join(lines) + b"\n")
                for line in lines:
                    assert answers.readline().startswith(b'{"ok":'), line
            if dice.random() < 0.2:
                client.sendall(mutated(dice))  # and leave in the middle
        left -= batch


def resident(process: psutil.Process) -> int:
    return int(process.memory_full_info().pss)


def test_rubbish_is_answered_and_leaves_nothing_in_memory(relay: Relay) -> None:
    messages = int(os.environ.get("MCR_FUZZ_MESSAGES", "20000"))
    dice = random.Random(messages)
    plane, supervisor = child(relay, CONTROL_PLANE), psutil.Process(relay.pid)
    converse(relay, dice, 5000)
    before = [resident(process) for process in (plane, supervisor)]
    converse(relay, dice, messages)
    after = [resident(process) for process in (plane, supervisor)]
    print(f"--- {messages} messages; PSS of control plane and supervisor before {before}, after {after}")
    assert all(now - then < 8 << 20 for then, now in zip(before, after, strict=True)), (before, after)
    assert child(relay, CONTROL_PLANE).pid == plane.pid
    relay.ask("ping")
    relay.stop()
