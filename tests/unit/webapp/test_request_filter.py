"""The requests that pass the filter in front of Gradio, and those that it refuses."""

import asyncio
import json
from base64 import b64encode

import pytest
from starlette.exceptions import HTTPException

from webapp.request_filter import LOOPBACK, GradioFilter, KeyFilter, NameFilter, check_body

# names and any_address of the filter of names
LOCAL = (LOOPBACK, False)  # python app.py
BOUND = (LOOPBACK | {"10.0.0.5"}, True)  # --host 10.0.0.5
PROXIED = (LOOPBACK | {"https://Page.example:443", "["}, False)  # --allow-host page.example
PUBLISHED = (LOOPBACK | {"0.0.0.0", "*"}, True)  # a Space


def status_of(options, headers, path="/config", method="GET", body=b"", key=None):
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
    app = GradioFilter(page)
    asyncio.run(NameFilter(KeyFilter(app, key) if key else app, *options)(scope, receive, send))
    return sent[0]["status"]


ASKING = {  # host, origin and the host that a proxy names, where there are any
    (LOCAL, 200): "127.0.0.1:7860 | localhost:7860 | [::1]:7860 | localhost http://localhost:1",
    (LOCAL, 403): "rebound.example | 127.0.0.1.example | 10.0.0.5 |  | [:: | localhost https://evil.example | "
    "localhost null | localhost http://localhost.evil.example | localhost http://[::1",
    (BOUND, 200): "10.0.0.5:7860 | 192.168.0.9 | 10.0.0.5 http://10.0.0.5",  # no address can be rebound
    (BOUND, 403): "rebound.example | 10.0.0.5 http://6.6.6.6",
    (PROXIED, 200): "127.0.0.1:7860 https://page.example | Page.Example:443 https://page.example page.example",
    (PROXIED, 403): "127.0.0.1 https://page.example evil.example | 127.0.0.1 https://evil.example | "
    "127.0.0.1 https://page.example page.example,[:: | 127.0.0.1 http://[",
    (PUBLISHED, 200): "you-page.hf.space https://you-page.hf.space",
    (PUBLISHED, 403): "you-page.hf.space https://evil.example | ",
}


@pytest.mark.parametrize(("options", "status"), ASKING)
def test_only_hosts_and_origins_of_the_app_may_ask(options, status):  # E8
    for line in ASKING[options, status].split("|"):
        headers = dict(zip(("host", "origin", "x-forwarded-host"), line.split(), strict=False))
        assert status_of(options, headers) == status, headers


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
        ({"data": [{"path": "/etc/passwd", "meta": {"_type": "gradio.FileData"}}]}, "string or a number"),
        ({"data": [], "event_data": {"place": {"path": "/etc/passwd"}}}, "string or a number"),
        ({"prompt": ["a"]}, "string or a number"),
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


def test_with_an_api_key_every_path_but_health_needs_it():
    key = "s3cret-word"
    for value, status in (
        (f"Bearer {key}", 200),
        (f"bearer {key}", 200),
        (f"Basic {b64encode(f'anybody:{key}'.encode()).decode()}", 200),  # a browser's login
        ("", 401),
        ("Bearer", 401),
        ("Bearer s3cret-wor", 401),
        (f"Bearer {key}x", 401),
        (key, 401),
        (f"Basic {b64encode(key.encode()).decode()}", 401),
        ("Basic %%%", 401),
        ("Bearer \xff", 401),
    ):
        headers = {"host": "localhost", "authorization": value}
        assert status_of(LOCAL, headers, key=key) == status, value
        assert status_of(LOCAL, headers, "/gradio_api/queue/join", "POST", b"{}", key) == status, value
    assert status_of(LOCAL, {"host": "localhost"}, "/health", key=key) == 404  # it reaches the app
    assert status_of(LOCAL, {"host": "evil.example", "authorization": f"Bearer {key}"}, key=key) == 403
