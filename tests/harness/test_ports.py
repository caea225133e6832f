"""Ports for ranks."""

import socket

import pytest

from tests.harness import ports


def test_what_is_taken_is_not_given(monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        port = taken.getsockname()[1]
        monkeypatch.setattr(ports, "_FIRST", port)
        monkeypatch.setattr(ports, "_LAST", port + 1)
        with pytest.raises(OSError, match="no free port found"):
            ports.free_port()
        monkeypatch.setattr(ports, "_FIRST", port - 20)
        found = {ports.free_port() for _ in range(40)}
    assert port not in found and len(found) > 1


def test_it_is_none_that_the_kernel_gives_to_connections() -> None:
    assert 1024 < ports._FIRST <= ports.free_port() < ports._LAST <= 32_768
