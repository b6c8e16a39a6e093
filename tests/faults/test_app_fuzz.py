"""The app's API under random requests: it tells nothing of itself or its files, and still answers afterwards."""

import json
import socket
from collections import Counter
from collections.abc import Callable
from contextlib import suppress
from typing import Any, NamedTuple

import gradio as gr
import pytest
from fixtures_app import LINES, Stub, _at_full_speed, _page, _source, _version, ask, event  # noqa: F401 (fixtures)
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from tests.waiting import wait_until

PROMPT = "First Citizen:\nBefore we"
NAMES = ["prompt", "max_tokens", "temperature", "top_k", "top_p", "repetition_penalty", "samples", "seed"]
VALUES = [PROMPT, 3, 0, 0, 1.0, 1.0, 1, 0]
SECRET = "root:"  # what every line of /etc/passwd that would be worth reading has

# what is in a body

plain = st.sampled_from(
    [None, True, False, -1, 0, 1, 2, 3, 0.5, 3.7, 10**30, 1e308, float("nan"), float("inf"), "", "1", "9" * 30, "All:",
     PROMPT, "\ud800", "a\x00b", "x" * 10**6, "🙂", "<gradio-sep>", "../../etc/passwd", "<b>", "7", "6", "null"]
) | st.integers(-(2**70), 2**70)  # fmt: skip
nested = st.sampled_from(
    [[], {}, [[]], [1, [2, [3]]], {"": {"a": None}}, {"__type__": "update", "value": 1}, [{"path": "/etc/passwd"}],
     {"path": "/etc/passwd", "meta": {"_type": "gradio.FileData"}}, [["x"] * 99] * 9, {"a" * 9999: "\ud800"}]
)  # fmt: skip
anything = plain | nested
token = st.integers(0, 99).map(lambda number: f"session{number}")


@st.composite
def spoilt(draw: Callable[..., Any], value: dict[str, Any]) -> dict[str, Any]:
    """A right body, one time in three with parts of it replaced, left out or added."""
    value = value.copy()
    for _ in range(draw(st.sampled_from([0, 0, 1, 2]))):
        place = draw(st.sampled_from([*value, "data", "session_hash", "event_id", "more"]))
        value[place] = draw(anything)
        if draw(st.booleans()):
            del value[place]
    return value


@st.composite
def bodies(draw: Callable[..., Any], path: str, inputs: dict[int, int]) -> dict[str, Any]:
    """What belongs to `path`, or something like it; `inputs`: how many values each event of the page takes."""
    number = draw(st.sampled_from([*inputs, 99]))
    of_event = st.lists(plain, min_size=inputs.get(number, 0), max_size=inputs.get(number, 9))
    right = {
        "call/generate": {"data": draw(st.tuples(*(st.just(value) | plain for value in VALUES)))},
        "call/next_token": {"data": draw(st.tuples(st.text(), plain))},
        "call/v2/generate": {"prompt": PROMPT, "max_tokens": 3} | draw(st.dictionaries(st.sampled_from(NAMES), plain)),
        "call/v2/next_token": {"prompt": draw(plain), "most": draw(plain)},
        "queue/join": {"fn_index": number, "data": draw(of_event), "session_hash": draw(token), "trigger_id": number,
                       "event_data": draw(st.none() | st.dictionaries(st.sampled_from(["version", "place"]), plain))},
    }  # fmt: skip
    other = {"data": draw(st.lists(anything)), "session_hash": draw(token), "fn_index": number, "event_id": draw(token)}
    return draw(spoilt(right.get(path.removeprefix(API), other)))


# a request, as bytes

API = "/gradio_api/"
POSTED = (
    "queue/join queue/join queue/join call/generate call/generate call/next_token call/v2/generate call/v2/next_token "
    "cancel reset call/nothing call/v2/nothing run/predict upload"
).split()
READ = (
    "config info openapi.json app_id startup-events theme.css queue/data queue/data?session_hash=abc call/generate/abc "
    "call/v2/next_token/abc heartbeat/abc heartbeat/ file=/etc/passwd proxy=http://127.0.0.1:1/ queue/status"
).split()
PAGES = "/ /config /theme.css /favicon.ico /robots.txt /manifest.json /static/img /assets/ /svelte/x /docs".split()
METHODS = ["GET", "POST", "PUT", "DELETE", "OPTIONS", "HEAD", "PATCH", "TRACE", "BREW"]
HEADERS = {
    "Host": ["localhost:7860", "[::1]", "rebound.example", "", "[::", "127.0.0.1:9e9", "a b"],
    "Origin": ["http://localhost:1", "null", "http://evil.example", "http://[", "\xff"],
    "Content-Type": ["text/plain", "application/json; charset=zz", "", "multipart/form-data", "\xff"],
    "Content-Length": ["0", "1", "-1", "9" * 30, "x", "16777217"],
    "X-Forwarded-Host": ["localhost", "[::", "a,b", "evil.example", "%%%", "\xff"],
    "X-Forwarded-Proto": ["https", "x,y", "\xff", "javascript"],
    "Accept-Language": ["de", "\xff" * 9, ";q=", "a" * 3000],
    "Cookie": ["access-token=x", "\xff=;", "a" * 3000],
    "Range": ["bytes=9-1", "bytes=999999999-", "x"],
    "Upgrade": ["websocket", "h2c", "x"],
    "Access-Control-Request-Method": ["POST", "\xff"],
    "Expect": ["100-continue"],
}
header = st.one_of([st.tuples(st.just(name), st.sampled_from(values)) for name, values in HEADERS.items()])
PIECES = (
    "a / .. %2e%2e %00 %ff %2f ? & = % file= etc/passwd deep_link session_hash view static gradio_api \u00e9 ;".split()
)
escaped = st.lists(st.sampled_from([*PIECES, "a" * 300]), max_size=6).map("".join)


class Sent(NamedTuple):
    method: str
    path: str
    headers: dict[str, str]
    body: bytes
    chunked: bool

    def raw(self, host: str) -> bytes:
        headers = {"Host": host, "Connection": "close"} | self.headers
        if "Upgrade" in headers:
            key = "AAAAAAAAAAAAAAAAAAAAAA=="
            headers |= {"Connection": "Upgrade", "Sec-WebSocket-Version": "13", "Sec-WebSocket-Key": key}
        body = self.body
        if self.chunked:
            headers["Transfer-Encoding"] = "chunked"
            body = b"%x\r\n%b\r\n0\r\n\r\n" % (len(body), body) if body else b"0\r\n\r\n"
        elif body or self.method in ("POST", "PUT"):
            headers = {"Content-Length": str(len(body))} | headers
        lines = [f"{self.method} {self.path} HTTP/1.1", *(f"{name}: {value}" for name, value in headers.items())]
        return "\r\n".join(lines).encode("latin-1") + b"\r\n\r\n" + body


@st.composite
def requests(draw: Callable[..., Any], inputs: dict[int, int]) -> Sent:
    posts = draw(st.integers(0, 4)) > 0
    method, body, headers = ("POST" if posts else "GET"), b"", {}
    if posts:
        path = API + draw(st.sampled_from(POSTED))
        body = json.dumps(draw(bodies(path, inputs))).encode()
        body = draw(st.sampled_from([*[body] * 12, body[:-3], b"", b"\xff\xfe" + body, b"[" * 100_000]))
        headers = {"Content-Type": "application/json"}
    else:
        path = draw(st.sampled_from([*PAGES, *(API + name for name in READ)]))
    if draw(st.integers(0, 7)) == 0:
        method = draw(st.sampled_from(METHODS))
    if draw(st.integers(0, 7)) == 0:
        path += draw(escaped)
    if draw(st.integers(0, 3)) == 0:
        headers |= dict(draw(st.lists(header, max_size=2)))
    return Sent(method, path, headers, body, chunked=draw(st.integers(0, 9)) == 0)


def answered(page: gr.Blocks, sent: Sent) -> tuple[int, bytes]:
    """Status, 0 where the connection was closed without one, and what came: of a stream, its beginning."""
    came = b""
    where = ("127.0.0.1", page.server_port)
    with suppress(ConnectionError), socket.create_connection(where, timeout=20) as connection:  # it may hang up on us
        connection.sendall(sent.raw(f"127.0.0.1:{page.server_port}"))
        while (piece := connection.recv(2**16)) and not (b"text/event-stream" in came and b"data:" in came):
            came += piece
    came = came.removeprefix(b"HTTP/1.1 100 Continue\r\n\r\n")
    return int(came.split(b" ", 2)[1]) if came.startswith(b"HTTP/1.1 ") else 0, came


def fuzz(page: gr.Blocks, source: Stub, n: int) -> None:
    """Send `n` requests, and see that the app has taken no harm."""
    statuses: Counter[int] = Counter()
    inputs = {number: len(event.inputs) for number, event in page.fns.items()}

    @given(requests(inputs))
    @settings(max_examples=n, deadline=None, phases=[Phase.generate], suppress_health_check=list(HealthCheck))
    def one(sent: Sent) -> None:
        status, came = answered(page, sent)
        statuses[status] += 1
        assert b"Traceback" not in came, sent
        assert SECRET.encode() not in came, sent

    one()
    print(statuses)
    assert statuses.total() >= n
    assert statuses[200] > n / 10  # else it is a test of the filter alone
    assert wait_until(lambda: source.watched.open == len(page._queue) == 0 and not any(page._queue.active_jobs), 60)
    answer = ask(page, event(page, "generate"), [PROMPT, 3, 0, 0, 1.0, 1.0, 1, 0])
    assert PROMPT + answer["output"]["data"][0]["samples"][0]["text"] in LINES


@pytest.mark.security
def test_a_hundred_requests_of_any_kind_are_answered_or_refused(page, source):  # E8
    fuzz(page, source, 100)


@pytest.mark.slow
@pytest.mark.security
def test_a_thousand_requests_of_any_kind_are_answered_or_refused(page, source):  # E8
    fuzz(page, source, 1000)
