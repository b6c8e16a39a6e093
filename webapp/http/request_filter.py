"""Refuse every request that the page and its API do not need, before Gradio reads it.

Gradio also offers uploads, files, a proxy and monitoring. Host and Origin must be names of this app, or any page in the
user's browser could use it: by rebinding its own name to 127.0.0.1, or by posting without reading the answer.
"""

import json
import re
from collections.abc import Iterable
from ipaddress import ip_address
from itertools import chain
from urllib.parse import urlsplit

from starlette.datastructures import MutableHeaders
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

LOOPBACK = frozenset({"localhost", "127.0.0.1", "::1"})
ANY = "*"
MAX_BODY = 2**20  # bytes; the longest prompt takes 120,000 with every character escaped
NAME = re.compile(r"[A-Za-z0-9_-]{1,64}")  # of a session or an event
READ = re.compile(
    r"/(config|info|theme\.css|favicon\.ico|robots\.txt|manifest\.json)?/?"
    r"|/(assets|static|svelte)/[\w./@+~-]{1,200}"
    r"|/gradio_api/(config|info|openapi\.json|app_id|startup-events|theme\.css|queue/data)/?"
    rf"|/gradio_api/(heartbeat|call/(v2/)?\w{{1,64}})/{NAME.pattern}/?",
    re.ASCII,
)
POSTED = re.compile(r"/gradio_api/(cancel|reset|queue/join|call/(v2/)?\w{1,64})/?", re.ASCII)
HEADERS = {
    "content-security-policy": (  # Gradio's own scripts need inline and eval; nothing is loaded from another host
        "default-src 'self'; script-src 'self' 'unsafe-inline' 'unsafe-eval'; style-src 'self' 'unsafe-inline'; "
        "img-src 'self' data: blob:; font-src 'self' data:; object-src 'none'; base-uri 'self'; form-action 'self'"
    ),
    "x-content-type-options": "nosniff",
    "referrer-policy": "no-referrer",
}


class RequestFilter:
    """ASGI middleware. `names`: hosts of this app, ANY for all; `any_address`: an IP address is one too.

    Nobody can rebind an address. Starlette's TrustedHostMiddleware knows neither this nor Origin.
    """

    def __init__(self, app: ASGIApp, names: Iterable[str], any_address: bool) -> None:
        self._app, self._names, self._any_address = app, frozenset(names), any_address

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            return await self._app(scope, receive, send)
        if scope["type"] == "websocket":
            return await send({"type": "websocket.close"})
        request = Request(scope, receive)
        status, reason = self._judge(request)
        if not reason and request.method == "POST":
            try:
                body = await request.body()
            except ClientDisconnect:
                return None
            status, reason = 400, body_error(body)
            receive = _replayed(body, receive)
        if reason:
            return await JSONResponse({"detail": reason}, status)(scope, receive, send)

        async def send_with_headers(message: Message) -> None:
            if message["type"] == "http.response.start":
                MutableHeaders(scope=message).update(HEADERS)
            await send(message)

        return await self._app(scope, receive, send_with_headers)

    def _judge(self, request: Request) -> tuple[int, str | None]:
        """Status and reason of a refusal; no reason where the request is allowed."""
        headers, path = request.headers, request.scope["path"]
        forwarded = ",".join(headers.getlist("x-forwarded-host")).split(",")
        named = [*(headers.getlist("host") or [""]), *filter(None, forwarded)]
        hosts = {_hostname(f"//{host.strip()}") for host in named}
        if not all(map(self._is_known, hosts)):
            return 403, "the Host is not a name of this app: --allow-host gives it one"
        if any(_hostname(origin) not in {*self._names, *hosts} for origin in headers.getlist("origin")):
            return 403, "the Origin is not this app: --allow-host gives it another name"
        if not (POSTED if request.method == "POST" else READ).fullmatch(path):
            return 404, "not found"
        if request.method == "POST" and not _is_json(headers.get("content-type", "")):
            return 415, "send application/json"  # which a foreign page cannot do without asking first
        return 200, None

    def _is_known(self, host: str) -> bool:
        return bool(host) and (bool(self._names & {host, ANY}) or (self._any_address and is_address(host)))


def body_error(raw: bytes) -> str | None:
    """What is wrong with a posted body: Gradio looks for files in nested values, and a name of a session that holds
    its separator ends Stop for all users."""
    try:
        body = json.loads(raw)
    except (ValueError, RecursionError):
        return "the body is not JSON"
    if not isinstance(body, dict):
        return "the body is not a JSON object"
    if any(key in body and not NAME.fullmatch(str(body[key])) for key in ("session_hash", "event_id")):
        return "session_hash and event_id may have up to 64 letters, digits, _ and -"
    data, event = body.pop("data", []), body.pop("event_data", None) or {}
    if not isinstance(data, list) or not isinstance(event, dict):
        return 'data must be a list: send an object such as {"data": ["All:", 10]}'
    if any(isinstance(value, list | dict) for value in chain(data, event.values(), body.values())):
        return "a value must be a text or a number"
    return None


def _is_json(content_type: str) -> bool:
    return content_type.partition(";")[0].strip().lower() == "application/json"


def is_address(name: str) -> bool:
    try:
        return bool(ip_address(name))
    except ValueError:
        return False


def _hostname(url: str) -> str:
    """The host in a URL, in lower case; "" where there is none."""
    try:
        return urlsplit(url).hostname or ""
    except ValueError:
        return ""


def _replayed(body: bytes, receive: Receive) -> Receive:
    """The body that was read already, then whatever else comes."""
    bodies = [body]

    async def received() -> Message:
        return {"type": "http.request", "body": bodies.pop()} if bodies else await receive()

    return received
