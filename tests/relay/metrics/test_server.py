"""The HTTP server by itself, in front of a relay that is not there."""

import contextlib
import http.client
import socket
import stat
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from relay.errors import ConfigError, UsageError
from relay.metrics import server as server_module
from relay.metrics.collector import RelayCollector
from relay.metrics.server import Address, parse_listen, serving


@contextlib.contextmanager
def served(address: Address, folder: Path) -> Iterator[tuple[str, list[str]]]:
    """Where the metrics are, and what was reported."""
    lines: list[str] = []
    with serving(address, RelayCollector(folder / "none.sock", lines.append)) as (where, forever):
        server = forever.__self__  # type: ignore[attr-defined]
        thread = threading.Thread(target=server.serve_forever, args=(0.02,))
        thread.start()
        try:
            yield where, lines
        finally:
            server.shutdown()
            thread.join()


def get(where: str) -> tuple[int, str]:
    """GET /metrics of `http://host:port/metrics`."""
    connection = http.client.HTTPConnection(where.split("/")[2], timeout=30)
    with contextlib.closing(connection):
        connection.request("GET", "/metrics")
        response = connection.getresponse()
        return response.status, response.read().decode()


@pytest.mark.parametrize(
    ("text", "address"),
    [
        ("127.0.0.1:9464", ("127.0.0.1", 9464)),
        ("[::1]:0", ("::1", 0)),
        ("unix:/run/mcr/metrics.sock", Path("/run/mcr/metrics.sock")),
    ],
)
def test_addresses(text: str, address: Address) -> None:
    assert parse_listen(text) == address


@pytest.mark.parametrize("text", ["9464", ":9464", "localhost:1", "127.0.0.1:", "127.0.0.1:65536", "1.2.3.4:²", "::1"])
def test_an_address_that_is_none_is_refused_with_an_example(text: str) -> None:
    with pytest.raises(UsageError, match=r"such as 127\.0\.0\.1:9464"):
        parse_listen(text)
    with pytest.raises(UsageError, match="absolute path"):
        parse_listen("unix:metrics.sock")


def test_without_a_relay_metrics_say_so_and_the_log_once(tmp_path: Path) -> None:
    with served(("127.0.0.1", 0), tmp_path) as (where, lines):
        for _ in range(3):
            status, text = get(where)
            assert status == 200
            assert "\nmcr_up 0.0\n" in text
            assert "mcr_rule" not in text
    assert len(lines) == 1
    assert "no relay answers on" in lines[0]


def test_clients_that_stall_take_their_places_for_a_while_only(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(server_module, "CONNECTION_S_MAX", 0.2)
    with contextlib.ExitStack() as stack, served(("127.0.0.1", 0), tmp_path) as (where, _):
        host, port = where.split("/")[2].split(":")
        stalled = [
            stack.enter_context(socket.create_connection((host, int(port)), timeout=30))
            for _ in range(server_module.CONNECTIONS_MAX)
        ]
        for client in stalled:
            client.sendall(b"GET /metrics HTTP/1.1\r\nHost:")
        assert [client.recv(1) for client in stalled] == [b""] * len(stalled)  # let go of
        assert get(where)[0] == 200


def test_a_client_that_finds_no_place_is_closed_and_the_others_are_served(tmp_path: Path) -> None:
    with contextlib.ExitStack() as stack, served(("127.0.0.1", 0), tmp_path) as (where, _):
        host, port = where.split("/")[2].split(":")
        clients = [
            stack.enter_context(socket.create_connection((host, int(port)), timeout=30))
            for _ in range(server_module.CONNECTIONS_MAX + 1)
        ]
        assert clients[-1].recv(1) == b""
        clients[0].sendall(b"GET /metrics HTTP/1.0\r\n\r\n")
        assert clients[0].makefile("rb").read().endswith(b"mcr_up 0.0\n")


def test_a_unix_socket_is_everybodys_and_goes_at_the_end(tmp_path: Path) -> None:
    path = tmp_path / "metrics.sock"
    with served(path, tmp_path) as (where, _):
        assert where == f"unix:{path}"
        assert stat.S_IMODE(path.stat().st_mode) == 0o666
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as client:
            client.connect(str(path))
            client.sendall(b"GET /metrics HTTP/1.0\r\nAccept: application/openmetrics-text\r\n\r\n")
            answer = client.makefile("rb").read()
        assert b"application/openmetrics-text" in answer
        assert answer.endswith(b"# EOF\n")
        with pytest.raises(ConfigError, match="a process listens there already"), served(path, tmp_path):
            pass
        assert path.exists()
    assert not path.exists()


def test_a_killed_servers_socket_is_replaced_and_anything_else_kept(tmp_path: Path) -> None:
    path = tmp_path / "metrics.sock"
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as dead:
        dead.bind(str(path))
    with served(path, tmp_path):
        pass
    path.write_text("kept")
    with pytest.raises(ConfigError, match="something else has this name"), served(path, tmp_path):
        pass
    assert path.read_text() == "kept"


def test_a_path_that_no_socket_can_have_is_told(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="AF_UNIX path too long"), served(tmp_path / ("s" * 120), tmp_path):
        pass


def test_an_address_in_use_is_told(tmp_path: Path) -> None:
    with served(("127.0.0.1", 0), tmp_path) as (where, _):
        port = int(where.split("/")[2].split(":")[1])
        with pytest.raises(ConfigError, match=r"Address already in use"), served(("127.0.0.1", port), tmp_path):
            pass
