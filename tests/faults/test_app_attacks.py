"""The app under random requests, in a hostile environment, and after hundreds of requests."""

import json
import os
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest
from fixtures_app import LINES, PROMPT, _page, _source, _version, ask, event  # noqa: F401 (fixtures)
from fixtures_registry import serving
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from tests.waiting import wait_until

ROOT = Path(__file__).parents[2]
N_REQUESTS = 300
NUMBERS = {"max_tokens": 3, "temperature": 0, "top_k": 0, "top_p": 1, "repetition_penalty": 1, "samples": 1, "seed": 0}
SECRET = b"root:"  # in /etc/passwd

# bodies

plain = st.sampled_from(
    [None, True, False, -1, 0, 1, 2, 3, 0.5, 3.7, 10**30, 1e308, float("nan"), float("inf"), "", "1", "9" * 30, "All:",
     PROMPT, "\ud800", "a\x00b", "x" * 10**6, "🙂", "<gradio-sep>", "../../etc/passwd", "<b>", "7", "6", "null"]
) | st.integers(-(2**70), 2**70)  # fmt: skip
nested = st.sampled_from(
    [[], {}, [[]], [1, [2, [3]]], {"": {"a": None}}, {"__type__": "update", "value": 1}, [{"path": "/etc/passwd"}],
     {"path": "/etc/passwd", "meta": {"_type": "gradio.FileData"}}, [["x"] * 99] * 9, {"a" * 9999: "\ud800"}]
)  # fmt: skip
session = st.integers(0, 99).map(lambda number: f"session{number}")


@st.composite
def bodies(draw: Callable[..., Any], path: str, n_inputs: dict[int, int]) -> bytes:
    """A body for `path`, often altered; `n_inputs`: the number of values that each event of the page takes."""
    number = draw(st.sampled_from([*n_inputs, 99]))
    values = st.lists(plain, min_size=n_inputs.get(number, 0), max_size=n_inputs.get(number, 9))
    sent = st.none() | st.dictionaries(st.sampled_from(["version", "place", "length", "token"]), plain)
    body = {
        "call/generate": {"data": [PROMPT, *draw(st.tuples(*(st.just(n) | plain for n in NUMBERS.values())))]},
        "call/next_token": {"data": [draw(st.text()), draw(plain)]},
        "call/v2/generate": {"prompt": PROMPT} | draw(st.dictionaries(st.sampled_from([*NUMBERS]), plain)),
        "call/v2/next_token": {"prompt": draw(plain), "most": draw(plain)},
    }.get(path, {"fn_index": number, "data": draw(values), "session_hash": draw(session), "event_data": draw(sent)})
    for _ in range(draw(st.sampled_from([0, 0, 1, 2]))):
        body[draw(st.sampled_from([*body, "data", "session_hash", "event_id", "more"]))] = draw(plain | nested)
    raw = json.dumps(body).encode()
    return draw(st.sampled_from([*[raw] * 12, raw[:-3], b"", b"\xff\xfe" + raw, b"[" * 100_000]))


# requests

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
    "X-Forwarded-Host": ["localhost", "[::", "a,b", "evil.example", "%%%", "\xff"],
    "X-Forwarded-Proto": ["https", "x,y", "\xff", "javascript"],
    "Accept-Language": ["de", "\xff" * 9, ";q=", "a" * 3000],
    "Cookie": ["access-token=x", "\xff=;", "a" * 3000],
    "Range": ["bytes=9-1", "bytes=999999999-", "x"],
    "Upgrade": ["websocket", "h2c", "x"],
}
headers = st.fixed_dictionaries({}, optional={name: st.sampled_from(values) for name, values in HEADERS.items()})
PIECES = "a / .. %2e%2e %00 %ff %2f ? & = % file= etc/passwd deep_link session_hash static gradio_api \u00e9 ;".split()
suffix = st.lists(st.sampled_from([*PIECES, "a" * 300]), max_size=6).map("".join)


@st.composite
def requests(draw: Callable[..., Any], n_inputs: dict[int, int]) -> tuple[str, str, dict[str, str], bytes]:
    """Method, path, headers and body."""

    def seldom(strategy: st.SearchStrategy[Any], otherwise: Any) -> Any:
        return draw(strategy) if draw(st.integers(0, 7)) == 0 else otherwise

    if draw(st.integers(0, 4)) > 0:
        method, name = "POST", draw(st.sampled_from(POSTED))
        path, body = f"/gradio_api/{name}", draw(bodies(name, n_inputs))
    else:
        method, path, body = "GET", draw(st.sampled_from([*PAGES, *(f"/gradio_api/{name}" for name in READ)])), b""
    kind = {"Content-Type": "application/json"}
    return seldom(st.sampled_from(METHODS), method), path + seldom(suffix, ""), kind | seldom(headers, {}), body


def test_any_requests_are_answered_or_refused_and_reveal_nothing(page, source):  # E8
    statuses: Counter[int] = Counter()
    n_inputs = {number: len(event.inputs) for number, event in page.fns.items()}
    with httpx.Client(base_url=page.local_url, timeout=20) as http:

        @given(requests(n_inputs))
        @settings(
            max_examples=N_REQUESTS, deadline=None, phases=[Phase.generate], suppress_health_check=list(HealthCheck)
        )
        def one(sent: tuple[str, str, dict[str, str], bytes]) -> None:
            method, path, headers, body = sent
            lines = {name: value.encode("latin-1") for name, value in headers.items()}
            answer = b""
            with http.stream(method, page.local_url.rstrip("/") + path, headers=lines, content=body) as response:
                for piece in response.iter_bytes():
                    answer += piece
                    if b"data:" in answer:  # the beginning of a stream is enough
                        break
            statuses[response.status_code] += 1
            assert response.status_code != 500, sent
            assert b"Traceback" not in answer, sent
            assert SECRET not in answer, sent

        one()
    print(statuses)
    assert statuses.total() >= N_REQUESTS
    assert statuses[200] > N_REQUESTS / 10  # otherwise only the filter is tested
    assert wait_until(lambda: source.watched.open == len(page._queue) == 0 and not any(page._queue.active_jobs), 60)
    answer = ask(page, event(page, "generate"), [PROMPT, *NUMBERS.values()])
    assert PROMPT + answer["output"]["data"][0]["samples"][0]["text"] in LINES


OPENING = {
    "GRADIO_SHARE": "True", "GRADIO_SERVER_NAME": "0.0.0.0", "GRADIO_ALLOWED_PATHS": "/", "GRADIO_MCP_SERVER": "True",
    "GRADIO_ROOT_PATH": "http://evil.example", "GRADIO_SSR_MODE": "True", "GRADIO_LOCAL_DEV_MODE": "1",
    "GRADIO_WATCH_DIRS": "/", "GRADIO_VIBE_MODE": "1", "GRADIO_DEBUG": "1", "GRADIO_NUM_WORKERS": "2",
    "GRADIO_RUN_HISTORY": "True", "GRADIO_PROFILING": "1", "GRADIO_ANALYTICS_ENABLED": "True", "SPACE_ID": "you/page",
    "GRADIO_SERVER_PORT": "7777", "GRADIO_DEFAULT_CONCURRENCY_LIMIT": "none",
}  # fmt: skip


@pytest.fixture(scope="module")
def app(version: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[str, psutil.Process, Path]]:
    """app.py as a process whose environment tells Gradio to open up: its address, the process, its output."""
    folder = tmp_path_factory.mktemp("app")
    plain = {key: os.environ[key] for key in ("PATH", "HOME") if key in os.environ}
    with serving([str(ROOT / "app.py"), "--folder", str(version)], "/config", folder, plain | OPENING) as url:
        (process,) = (child for child in psutil.Process().children() if str(ROOT / "app.py") in child.cmdline())
        yield url, process, folder / "log"


def test_nothing_in_the_environment_opens_the_app(app):  # E8
    url, process, output = app
    connections = [c for one in (process, *process.children(recursive=True)) for c in one.net_connections("tcp")]
    assert [f"http://{c.laddr.ip}:{c.laddr.port}" for c in connections if c.status == "LISTEN"] == [url]
    config = httpx.get(f"{url}/config").json()
    assert (config["dev_mode"], config["vibe_mode"], config["root"]) == (False, False, url)
    for path in ("file=/etc/passwd", "mcp/", "vibe-code/", "profiling/summary", "runs"):
        assert httpx.get(f"{url}/gradio_api/{path}").status_code == 404, path
    assert httpx.get(url, headers={"origin": "null"}).status_code == 403
    assert "access-control-allow-origin" not in httpx.get(url).headers
    assert output.read_text() == f"parrot version 7: {url}\n"


def test_two_hundred_requests_leave_memory_flat(app):  # E5
    """A session state that Gradio keeps takes 75 KB, 15 MB for 200 requests."""
    url, process, _ = app

    def used(n_requests: int) -> int:
        with httpx.Client(base_url=f"{url}/gradio_api/", timeout=60) as http:
            for n in range(n_requests):
                call = http.post("call/generate", json={"data": ["All:", 5, 0.8, 0, 1.0, 1.0, 1, n]})
                assert "event: complete" in http.get(f"call/generate/{call.json()['event_id']}").text
        return int(process.memory_info().rss)

    before, after = used(100), used(200)  # the first hundred fill the caches
    print(f"{before / 1e6:.1f} MB, then {after / 1e6:.1f}")
    assert after - before < 7e6
