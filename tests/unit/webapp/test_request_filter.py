"""Which requests pass the filter in front of Gradio."""

import asyncio
import json

import pytest
from starlette.exceptions import HTTPException

from webapp.http.request_filter import LOOPBACK, RequestFilter, check_body

LOCAL = {"names": LOOPBACK, "any_address": False}  # python app.py
BOUND = {"names": {*LOOPBACK, "10.0.0.5"}, "any_address": True}  # --host 10.0.0.5
PROXIED = {"names": {*LOOPBACK, "https://Page.example:443", "["}, "any_address": False}  # --allow-host page.example
PUBLISHED = {"names": {*LOOPBACK, "0.0.0.0", "*"}, "any_address": True}  # a Space


def status_of(options, headers, path="/config", method="GET", body=b""):
    sent = []

    async def page(scope, receive, send):
        assert (await receive())["body"] == body
        await send({"type": "http.response.start", "status": 200, "headers": []})

    async def send(message):
        sent.append(message)

    async def receive():
        return {"type": "http.request", "body": body}

    headers = {"content-type": "application/json"} | headers
    lines = [(name.encode(), value.encode()) for name, value in headers.items()]
    scope = {"type": "http", "method": method, "path": path, "headers": lines, "query_string": b""}
    asyncio.run(RequestFilter(page, **options)(scope, receive, send))
    return sent[0]["status"]


@pytest.mark.security
@pytest.mark.parametrize(
    ("options", "headers", "status"),
    [
        (LOCAL, {"host": "127.0.0.1:7860"}, 200),
        (LOCAL, {"host": "localhost:7860"}, 200),
        (LOCAL, {"host": "[::1]:7860"}, 200),
        (LOCAL, {"host": "rebound.example"}, 403),
        (LOCAL, {"host": "127.0.0.1.example"}, 403),
        (LOCAL, {"host": "10.0.0.5"}, 403),
        (LOCAL, {"host": ""}, 403),
        (LOCAL, {"host": "[::"}, 403),
        (LOCAL, {}, 403),
        (LOCAL, {"host": "localhost", "origin": "http://localhost:1"}, 200),
        (LOCAL, {"host": "localhost", "origin": "https://evil.example"}, 403),
        (LOCAL, {"host": "localhost", "origin": "null"}, 403),
        (LOCAL, {"host": "localhost", "origin": "http://localhost.evil.example"}, 403),
        (LOCAL, {"host": "localhost", "origin": "http://[::1"}, 403),
        (BOUND, {"host": "10.0.0.5:7860"}, 200),
        (BOUND, {"host": "192.168.0.9"}, 200),  # another address of this machine: nobody can rebind it
        (BOUND, {"host": "rebound.example"}, 403),
        (BOUND, {"host": "10.0.0.5", "origin": "http://10.0.0.5"}, 200),
        (BOUND, {"host": "10.0.0.5", "origin": "http://6.6.6.6"}, 403),
        (PROXIED, {"host": "127.0.0.1:7860", "origin": "https://page.example"}, 200),
        (
            PROXIED,
            {"host": "Page.Example:443", "x-forwarded-host": "page.example", "origin": "https://page.example"},
            200,
        ),
        (PROXIED, {"host": "127.0.0.1", "x-forwarded-host": "evil.example"}, 403),
        (PROXIED, {"host": "127.0.0.1", "x-forwarded-host": "page.example, [::"}, 403),
        (PROXIED, {"host": "127.0.0.1", "origin": "https://evil.example"}, 403),
        (PUBLISHED, {"host": "you-page.hf.space", "origin": "https://you-page.hf.space"}, 200),
        (PUBLISHED, {"host": "you-page.hf.space", "origin": "https://evil.example"}, 403),
        (PUBLISHED, {}, 403),
    ],
)
def test_only_known_hosts_and_origins_may_ask(options, headers, status):  # E8
    assert status_of(options, headers) == status


@pytest.mark.security
@pytest.mark.parametrize(
    "path",
    [
        "/gradio_api/file=/etc/passwd", "/gradio_api/file/etc/passwd", "/file=/etc/passwd", "/gradio_api/upload",
        "/gradio_api/file=http://127.0.0.1:1/", "/gradio_api/proxy=http://127.0.0.1:1/x", "/gradio_api/upload_progress",
        "/gradio_api/component_server", "/gradio_api/vibe-code/", "/gradio_api/run-history/records", "/gradio_api/runs",
        "/monitoring", "/monitoring/summary", "/gradio_api/deep_link", "/gradio_api/token", "/login", "/docs",
        "/static/../%2e/etc/passwd", "/gradio_api/run/generate", "/gradio_api/api/generate", "/pwa_icon",
        "/gradio_api/custom_component/1/client/component/index.js", "/gradio_api/stream/a/b/1/playlist.m3u8",
    ],
)  # fmt: skip
def test_files_proxy_uploads_and_all_else_that_gradio_offers_are_closed(path):  # E8
    for method in ("GET", "POST", "HEAD"):
        assert status_of(LOCAL, {"host": "localhost"}, path, method, b"{}") == 404, method


@pytest.mark.security
@pytest.mark.parametrize("session", ["\ud800", "a<gradio-sep>b<gradio-sep>", "", "a" * 65, 7.5, ["a"]])
def test_a_session_name_that_would_break_stop_for_others_is_refused(session):  # E6
    body = json.dumps({"fn_index": 0, "data": ["All:"], "session_hash": session}).encode()
    assert status_of(LOCAL, {"host": "localhost"}, "/gradio_api/queue/join", "POST", body) == 400


@pytest.mark.security
@pytest.mark.parametrize("kind", ["", "text/plain", "application/x-www-form-urlencoded", "multipart/form-data"])
def test_a_post_that_a_foreign_page_could_send_is_refused(kind):  # E8
    headers = {"host": "localhost", "content-type": kind}
    assert status_of(LOCAL, headers, "/gradio_api/call/generate", "POST", b"{}") == 415


@pytest.mark.parametrize(
    ("body", "words"),
    [
        ({"data": ["All:", 1, None], "session_hash": "abc", "event_data": {"place": 1}, "trigger_id": None}, None),
        ({"prompt": "All:", "max_tokens": 3}, None),
        ({"event_id": "0af"}, None),
        ({"data": [{"path": "/etc/passwd", "meta": {"_type": "gradio.FileData"}}]}, "text or a number"),
        ({"data": [], "event_data": {"place": {"path": "/etc/passwd"}}}, "text or a number"),
        ({"prompt": ["a"]}, "text or a number"),
        ({"data": "All:"}, "must be a list"),
        ({"event_data": [1]}, "must be a list"),
        ([1], "not a JSON object"),
        (None, "not a JSON object"),
    ],
)
def test_a_body_holds_plain_values_only(body, words):
    raw = json.dumps(body).encode()
    if words is None:
        return check_body(raw)
    with pytest.raises(HTTPException, match=words):
        check_body(raw)


@pytest.mark.parametrize("raw", [b"", b"{", b"\xff"])
def test_a_body_that_is_not_json_is_refused(raw):
    with pytest.raises(HTTPException, match="the body is not JSON"):
        check_body(raw)
