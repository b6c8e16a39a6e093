"""The requests that pass the filter in front of Gradio, and those that it refuses."""

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


@pytest.mark.parametrize(
    ("options", "host", "status"),
    [
        *((LOCAL, host, 200) for host in ("127.0.0.1:7860", "localhost:7860", "[::1]:7860")),
        *((LOCAL, host, 403) for host in ("rebound.example", "127.0.0.1.example", "10.0.0.5", "", "[::", None)),
        *((BOUND, host, 200) for host in ("10.0.0.5:7860", "192.168.0.9")),  # no address can be rebound
        (BOUND, "rebound.example", 403),
        (PROXIED, "Page.Example:443", 200),
        (PUBLISHED, "you-page.hf.space", 200),
        (PUBLISHED, None, 403),
    ],
)
def test_only_hosts_of_the_app_may_be_asked(options, host, status):  # E8
    assert status_of(options, {} if host is None else {"host": host}) == status


@pytest.mark.parametrize(
    ("options", "headers", "status"),
    [
        (LOCAL, {"origin": "http://localhost:1"}, 200),
        (LOCAL, {"origin": "https://evil.example"}, 403),
        (LOCAL, {"origin": "null"}, 403),
        (LOCAL, {"origin": "http://localhost.evil.example"}, 403),
        (LOCAL, {"origin": "http://[::1"}, 403),
        (BOUND, {"host": "10.0.0.5", "origin": "http://10.0.0.5"}, 200),
        (BOUND, {"host": "10.0.0.5", "origin": "http://6.6.6.6"}, 403),
        (PROXIED, {"origin": "https://page.example"}, 200),
        (PROXIED, {"x-forwarded-host": "page.example", "origin": "https://page.example"}, 200),
        (PROXIED, {"x-forwarded-host": "evil.example"}, 403),
        (PROXIED, {"x-forwarded-host": "page.example, [::"}, 403),
        (PROXIED, {"origin": "https://evil.example"}, 403),
        (PROXIED, {"origin": "http://["}, 403),
        (PUBLISHED, {"host": "you-page.hf.space", "origin": "https://you-page.hf.space"}, 200),
        (PUBLISHED, {"host": "you-page.hf.space", "origin": "https://evil.example"}, 403),
    ],
)
def test_only_origins_of_the_app_may_ask(options, headers, status):  # E8
    assert status_of(options, {"host": "localhost"} | headers) == status


CLOSED = """
    /gradio_api/file=/etc/passwd /gradio_api/file/etc/passwd /file=/etc/passwd /gradio_api/upload /docs /pwa_icon
    /gradio_api/file=http://127.0.0.1:1/ /gradio_api/proxy=http://127.0.0.1:1/x /gradio_api/upload_progress /login
    /gradio_api/component_server /gradio_api/vibe-code/ /gradio_api/run-history/records /gradio_api/runs /monitoring
    /monitoring/summary /gradio_api/deep_link /gradio_api/token /static/../%2e/etc/passwd /gradio_api/run/generate
    /gradio_api/api/generate /gradio_api/custom_component/1/client/component/index.js
    /gradio_api/stream/a/b/1/playlist.m3u8
""".split()


def test_files_proxy_uploads_and_all_else_that_gradio_offers_are_closed():  # E8
    for path in CLOSED:
        for method in ("GET", "POST", "HEAD"):
            assert status_of(LOCAL, {"host": "localhost"}, path, method, b"{}") == 404, (method, path)


def test_a_post_that_a_foreign_page_could_send_is_refused():  # E8
    for kind in ("", "text/plain", "application/x-www-form-urlencoded", "multipart/form-data"):
        headers = {"host": "localhost", "content-type": kind}
        assert status_of(LOCAL, headers, "/gradio_api/call/generate", "POST", b"{}") == 415, kind


def test_only_a_checked_body_reaches_gradio():
    for body, status in ((b'{"prompt": "All:"}', 200), (b'{"prompt": []}', 400)):
        assert status_of(LOCAL, {"host": "localhost"}, "/gradio_api/queue/join", "POST", body) == status


@pytest.mark.parametrize(
    ("body", "error"),
    [
        ({"data": ["All:", 1, None], "session_hash": "abc", "event_data": {"place": 1}, "trigger_id": None}, None),
        ({"event_id": "0af"}, None),
        ({"data": [{"path": "/etc/passwd", "meta": {"_type": "gradio.FileData"}}]}, "text or a number"),
        ({"data": [], "event_data": {"place": {"path": "/etc/passwd"}}}, "text or a number"),
        ({"prompt": ["a"]}, "text or a number"),
        ({"data": "All:"}, "must be a list"),
        ({"event_data": [1]}, "must be a list"),
        ([1], "not a JSON object"),
        (None, "not a JSON object"),
        *((raw, "not JSON") for raw in (b"", b"{", b"\xff", b"[" * 100_000)),
        *(({"session_hash": name}, "up to 64 letters")  # E6: such a name would disable Stop for others
          for name in ("\ud800", "a<gradio-sep>b<gradio-sep>", "", "a" * 65, 7.5, ["a"])),
    ],
    ids=lambda value: None if value is None else repr(value)[:40],
)  # fmt: skip
def test_a_body_holds_plain_values_only(body, error):
    raw = body if isinstance(body, bytes) else json.dumps(body).encode()
    if error is None:
        return check_body(raw)
    with pytest.raises(HTTPException, match=error):
        check_body(raw)
