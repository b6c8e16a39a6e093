"""Tests and the processes that they start reach no other machine."""

import os
import socket
import subprocess
import sys
import urllib.request

import pytest
from fixtures_network import NOBODY
from pytest_socket import SocketConnectBlockedError

OPEN = "import sys, urllib.request; urllib.request.urlopen(sys.argv[1], timeout=20)"


def test_a_test_can_connect_to_this_machine_only():
    with pytest.raises(SocketConnectBlockedError):
        socket.create_connection(("192.0.2.1", 80), timeout=20)  # an address for documentation (RFC 5737)
    with socket.create_server(("127.0.0.1", 0)) as server:
        socket.create_connection(server.getsockname(), timeout=20).close()
    assert urllib.request.getproxies()["no"] == os.environ["no_proxy"]


@pytest.mark.parametrize(
    ("command", "words"),
    [
        ([sys.executable, "-c", OPEN, "http://example.com/"], "Connection refused"),
        ([sys.executable, "-c", OPEN, "https://example.com/"], "Connection refused"),
        (["git", "ls-remote", "https://example.com/x.git"], NOBODY.removeprefix("http://").replace(":", " port ")),
    ],
)
def test_a_child_process_finds_a_proxy_that_does_not_answer(command, words):
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert done.returncode != 0
    assert words in done.stderr
