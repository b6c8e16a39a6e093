"""The app under random requests, in a hostile environment, and after hundreds of requests."""

import json
import os
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from random import Random

import httpx
import psutil
import pytest
from fixtures_app import LINES, PROMPT, _page, _source, _version, ask, event  # noqa: F401 (fixtures)
from fixtures_registry import serving

from tests.waiting import wait_until

ROOT = Path(__file__).parents[2]
N_REQUESTS = 300
NUMBERS = {"max_tokens": 3, "temperature": 0, "top_k": 0, "top_p": 1, "repetition_penalty": 1, "samples": 1, "seed": 0}
SECRET = b"root:"  # in /etc/passwd

PLAIN = [
    None, True, False, -1, 0, 1, 2, 3, 0.5, 3.7, 2**70, 1e308, float("nan"), float("inf"), "", "1", "9" * 30, "All:",
    PROMPT, "\ud800", "a\x00b", "x" * 10**6, "🙂", "<gradio-sep>", "../../etc/passwd", "<b>", "7", "6", "null",
]  # fmt: skip
NESTED = [
    [], {}, [[]], [1, [2, [3]]], {"": {"a": None}}, {"__type__": "update", "value": 1}, [{"path": "/etc/passwd"}],
    {"path": "/etc/passwd", "meta": {"_type": "gradio.FileData"}}, [["x"] * 99] * 9, {"a" * 9999: "\ud800"},
]  # fmt: skip
POSTED = (
    "queue/join queue/join queue/join call/generate call/generate call/next_token call/v2/generate call/v2/next_token "
    "cancel reset call/nothing call/v2/nothing run/predict upload"
).split()
READ = [
    *"/ /config /theme.css /favicon.ico /robots.txt /manifest.json /static/img /assets/ /svelte/x /docs".split(),
    *(f"/gradio_api/{name}" for name in (
        "config info openapi.json app_id startup-events theme.css queue/data queue/data?session_hash=abc heartbeat/ "
        "call/generate/abc call/v2/next_token/abc heartbeat/abc file=/etc/passwd proxy=http://127.0.0.1:1/ queue/status"
    ).split()),
]  # fmt: skip
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
PIECES = "a / .. %2e%2e %00 %ff %2f ? & = % file= etc/passwd deep_link session_hash static gradio_api \u00e9 ;".split()


def a_request(chance: Random, n_inputs: dict[int, int]) -> tuple[str, str, dict[str, str], bytes]:
    """Method, path, headers and body, seldom valid; `n_inputs`: the number of values that each event takes."""
    pick, seldom = chance.choice, lambda: chance.random() < 1 / 8
    method, path, headers, raw = "GET", pick(READ), {"Content-Type": "application/json"}, b""
    if chance.random() < 0.8:
        number = pick([*n_inputs, 99])
        method, path = "POST", f"/gradio_api/{(name := pick(POSTED))}"
        numbers = {key: pick([value, pick(PLAIN)]) for key, value in NUMBERS.items()}
        body = {
            "call/generate": {"data": [PROMPT, *numbers.values()]},
            "call/next_token": {"data": [pick(PLAIN), pick(PLAIN)]},
            "call/v2/generate": {"prompt": PROMPT} | numbers,
            "call/v2/next_token": {"prompt": pick(PLAIN), "most": pick(PLAIN)},
        }.get(name) or {
            "fn_index": number,
            "data": [pick(PLAIN) for _ in range(n_inputs.get(number, 9))],
            "session_hash": f"session{chance.randrange(100)}",
            "event_data": pick([None, {key: pick(PLAIN) for key in ("version", "place", "length", "token")}]),
        }
        for _ in range(pick([0, 0, 1, 2])):
            body[pick([*body, "data", "session_hash", "event_id", "more"])] = pick(PLAIN + NESTED)
        raw = json.dumps(body).encode()
        raw = pick([raw[:-3], b"", b"\xff\xfe" + raw, b"[" * 100_000]) if seldom() else raw
    if seldom():
        headers |= {name: pick(values) for name, values in HEADERS.items() if seldom()}
    path += "".join(chance.choices(PIECES, k=6)) if seldom() else ""
    return pick(METHODS) if seldom() else method, path, headers, raw


def test_any_requests_are_answered_or_refused_and_reveal_nothing(page, source, chance):  # E8
    statuses: Counter[int] = Counter()
    n_inputs = {number: len(event.inputs) for number, event in page.fns.items()}
    with httpx.Client(base_url=page.local_url, timeout=20) as http:
        for _ in range(N_REQUESTS):
            method, path, headers, body = sent = a_request(chance, n_inputs)
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
    print(statuses)
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
    with serving([str(ROOT / "app.py"), "--folder", str(version)], "/config", folder, plain | OPENING) as (url, pid):
        yield url, psutil.Process(pid), folder / "log"


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
    assert output.read_text() == f"parrot version 7: {url} (API: /v1, /docs)\n"


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
