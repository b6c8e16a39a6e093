"""The guard of the suite: whoever runs in a test, or is started by one, reaches no other machine."""

import asyncio
import os
import socket
import subprocess
import sys
import threading
import urllib.request
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import httpx
import pytest
from fixtures_network import NOBODY, ROOT
from offline.sitecustomize import ForeignHostError, is_here

from pipeline.config.params import load_params
from pipeline.config.sections import CorpusConfig
from pipeline.data.corpus import fetch
from pipeline.data.tokenizer import BPE_SHA256, BPE_SOURCES

pytestmark = pytest.mark.security
ADDRESS, NAME = "192.0.2.1", "example.com"  # kept for documentation, by RFC 5737 and RFC 2606
WITHOUT_PROXY = "import sys, urllib.request as u; u.build_opener(u.ProxyHandler({})).open(sys.argv[1], timeout=20)"


def by_socket(host: str) -> None:
    socket.create_connection((host, 80), timeout=20)


def by_connect(host: str) -> None:
    with socket.socket() as connection:
        connection.connect((host, 80))


def by_connect_ex(host: str) -> None:
    with socket.socket() as connection:
        connection.connect_ex((host, 80))


def by_datagram(host: str) -> None:
    with socket.socket(type=socket.SOCK_DGRAM) as connection:
        connection.sendto(b"", (host, 80))


def by_message(host: str) -> None:
    with socket.socket(type=socket.SOCK_DGRAM) as connection:
        connection.sendmsg([b""], [], 0, (host, 80))


def by_urllib(host: str) -> None:
    urllib.request.urlopen(f"http://{host}/", timeout=20)


def by_httpx(host: str) -> None:
    async def get() -> None:
        async with httpx.AsyncClient() as client:
            await client.get(f"https://{host}/")

    asyncio.run(get())


def by_asyncio(host: str) -> None:
    async def connect() -> None:
        await asyncio.open_connection(host, 80)

    asyncio.run(connect())


def by_event_loop(host: str) -> None:
    async def connect() -> None:
        with socket.socket() as connection:
            connection.setblocking(False)
            await asyncio.get_running_loop().sock_connect(connection, (host, 80))

    asyncio.run(connect())


WAYS = [
    *((way, ADDRESS) for way in (by_connect, by_connect_ex, by_datagram, by_message, by_event_loop)),
    *((way, host) for way in (by_socket, by_urllib, by_httpx, by_asyncio) for host in (ADDRESS, NAME)),
]


@pytest.mark.parametrize(("way", "host"), WAYS)
def test_no_connection_leaves_this_machine_and_the_test_that_wanted_one_is_named(way, host):
    with pytest.raises((ForeignHostError, ExceptionGroup)) as told:
        way(host)
    refusal = told.value.exceptions[0] if isinstance(told.value, ExceptionGroup) else told.value  # httpx' tries
    test = os.environ["PYTEST_CURRENT_TEST"]
    assert isinstance(refusal, ForeignHostError)
    assert str(refusal) == f"{test} wants to reach {host}: tests reach nothing but this machine"
    assert "that_wanted_one_is_named" in test


@pytest.mark.parametrize("look_up", [socket.gethostbyname, socket.gethostbyname_ex, socket.gethostbyaddr])
def test_no_name_is_asked_for_elsewhere(look_up):
    with pytest.raises(ForeignHostError, match=r"wants to reach example\.com:"):
        look_up("example.com")


def test_a_refusal_is_not_taken_for_a_bad_line():
    assert not issubclass(ForeignHostError, OSError)  # which many libraries pass over


@pytest.mark.parametrize(
    ("host", "known"),
    [
        ("127.0.0.1", True), ("127.8.9.10", True), ("::1", True), ("localhost", True), ("0.0.0.0", True), ("", True),
        ("192.168.1.1", False), ("10.0.0.1", False), ("8.8.8.8", False), ("::ffff:8.8.8.8", False), ("fe80::1", False),
        ("127.0.0.1.example.com", False), ("localhost.example.com", False), ("127.example.com", False),
    ],
)  # fmt: skip
def test_only_loopback_is_this_machine(host, known):
    assert is_here(host) == known


class Handler(BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        self.send_response(200)
        self.end_headers()
        self.wfile.write(b"here")

    def log_message(self, *words: object) -> None:
        pass


@pytest.fixture(scope="module")
def address() -> Iterator[str]:
    """Of a server on this machine."""
    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever).start()
        yield f"127.0.0.1:{server.server_port}"
        server.shutdown()


@pytest.mark.parametrize("name", ["127.0.0.1", "localhost"])
def test_this_machine_is_reached(address, name):
    url = f"http://{name}:{address.partition(':')[2]}/"

    async def get() -> str:
        async with httpx.AsyncClient() as client:
            return (await client.get(url)).text

    assert urllib.request.urlopen(url, timeout=20).read() == b"here"
    assert httpx.get(url).text == asyncio.run(get()) == "here"


def test_sockets_that_are_files_and_the_own_name_are_no_network(tmp_path):
    with socket.socket(socket.AF_UNIX) as server, socket.socket(socket.AF_UNIX) as client:
        server.bind(path := str(tmp_path / "s"))
        server.listen()
        client.connect(path)
    assert socket.getfqdn()  # asked for by torchrun


# What tests start


def child(*command: str | Path, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60)


@pytest.mark.parametrize("host", [ADDRESS, NAME])
def test_a_child_is_refused_whatever_its_environment(host, tmp_path):
    told = child(sys.executable, "-c", WITHOUT_PROXY, f"http://{host}/", PYTHONPATH=str(tmp_path))
    assert told.stderr.endswith(f"a test wants to reach {host}: tests reach nothing but this machine\n")
    told = child(sys.executable, "-c", WITHOUT_PROXY, f"http://{host}/", **os.environ)
    assert f"ForeignHostError: {os.environ['PYTEST_CURRENT_TEST']} wants to reach {host}: " in told.stderr


def test_a_child_of_a_child_is_refused():
    program = (
        f"import subprocess, sys; subprocess.run([sys.executable, '-c', {WITHOUT_PROXY!r}, 'http://example.com/'])"
    )
    assert "wants to reach example.com" in child("sh", "-c", '"$0" -c "$1"', sys.executable, program).stderr


@pytest.mark.parametrize("scheme", ["http", "https"])
def test_a_child_without_the_guard_finds_a_proxy_that_is_none(scheme):
    program = "import sys, urllib.request; urllib.request.urlopen(sys.argv[1], timeout=20)"
    told = child(sys.executable, "-I", "-c", program, f"{scheme}://example.com/")  # -I: without PYTHONPATH
    assert "Connection refused" in told.stderr


def test_git_finds_a_proxy_that_is_none():
    told = child("git", "ls-remote", "https://example.com/x.git", PATH=os.environ["PATH"])
    assert told.returncode != 0
    assert NOBODY.removeprefix("http://").replace(":", " port ") in told.stderr


def test_children_reach_this_machine(address):
    program = "import sys, urllib.request; print(urllib.request.urlopen(sys.argv[1], timeout=20).read())"
    for options in ([], ["-I"]):
        assert child(sys.executable, *options, "-c", program, f"http://{address}/").stdout == "b'here'\n"


def test_a_child_keeps_its_own_environment(tmp_path):
    (tmp_path / "mine.py").write_text("import os; print(os.environ['MINE'])")
    assert child(sys.executable, "-c", "import mine", PYTHONPATH=str(tmp_path), MINE="kept").stdout == "kept\n"


def test_pip_finds_the_text_and_the_bpe_without_an_index(wheels, tmp_path):
    config = load_params(ROOT / "params.yaml").section(CorpusConfig)
    assert fetch(config.mirrors, tmp_path / "text", config.sha256) in config.mirrors
    for name, sha256 in BPE_SHA256.items():
        fetch([f"{BPE_SOURCES[-1]}{name}"], tmp_path / name, sha256)


def test_pip_asks_no_index(tmp_path):
    told = child(sys.executable, "-m", "pip", "download", "--no-deps", "--dest", tmp_path, "plays==1.0", **os.environ)
    assert "No matching distribution found for plays==1.0" in told.stderr
    assert "Retrying" not in told.stderr  # as it says where an index does not answer


CONFTEST = f"""if True:
    import sys
    sys.path[:0] = [{str(ROOT)!r}, {str(ROOT / "tests")!r}]
    import pytest
    from fixtures_network import _only_this_machine

    def knock():
        sys.audit("socket.getaddrinfo", "example.com", 80, 0, 0, 0)  # as a look-up does, but there is none

    @pytest.fixture(scope="session")
    def bpe():
        knock()
        return knock

    @pytest.fixture(scope="session")
    def shakespeare():
        raise AssertionError("no test asked for it")
    """
USER = """
import pytest
from offline.sitecustomize import ForeignHostError

def test_a_user_of_the_bpe(bpe):
    with pytest.raises(ForeignHostError):
        bpe()
"""


def test_only_what_the_chosen_tests_need_is_fetched_and_that_before_the_guard_closes(tmp_path):
    (tmp_path / "conftest.py").write_text(CONFTEST)
    (tmp_path / "test_user.py").write_text(USER)
    told = child(
        sys.executable, "-I", "-m", "pytest", "-q", "--rootdir", tmp_path, tmp_path, PYTEST_DISABLE_PLUGIN_AUTOLOAD="1"
    )
    assert told.returncode == 0, told.stdout
