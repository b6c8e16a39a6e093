"""Refuse every request that the page and its API do not need, before Gradio reads it.

Gradio also offers uploads, files, a proxy and monitoring. Host and Origin must be names of this app. Otherwise any web
site in the user's browser could use it, through DNS rebinding or a cross-site POST.
"""

import json
import re
from collections.abc import Iterable
from ipaddress import ip_address
from itertools import chain
from urllib.parse import urlsplit

from starlette.datastructures import Headers, MutableHeaders
from starlette.exceptions import HTTPException
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
    """ASGI middleware. `names`: host names of this app, ANY for all; `any_address`: allow every IP address too.

    DNS rebinding needs a name, so an address is safe. Starlette's TrustedHostMiddleware checks neither addresses nor
    Origin.
    """

    def __init__(self, app: ASGIApp, names: Iterable[str], any_address: bool) -> None:
        self._app, self._names, self._any_address = app, {*map(hostname, names)} - {""}, any_address

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            return await self._app(scope, receive, send)
        if scope["type"] == "websocket":
            return await send({"type": "websocket.close"})
        request, bodies = Request(scope, receive), []
        try:
            self._check_names(request.headers)
            if not (POSTED if request.method == "POST" else READ).fullmatch(scope["path"]):
                raise HTTPException(404, "not found")
            if request.method == "POST":
                if request.headers.get("content-type", "").partition(";")[0].strip().lower() != "application/json":
                    raise HTTPException(415, "send application/json")  # a foreign page would need a CORS preflight
                bodies.append(await request.body())
                check_body(bodies[0])
        except ClientDisconnect:
            return None
        except HTTPException as refusal:
            answer = JSONResponse({"detail": refusal.detail}, refusal.status_code)
            return await answer(scope, receive, send)

        async def receive_again() -> Message:
            return {"type": "http.request", "body": bodies.pop()} if bodies else await receive()

        async def send_with_headers(message: Message) -> None:
            if message["type"] == "http.response.start":
                MutableHeaders(scope=message).update(HEADERS)
            await send(message)

        return await self._app(scope, receive_again, send_with_headers)

    def _check_names(self, headers: Headers) -> None:
        """Raises HTTPException if Host, X-Forwarded-Host or Origin is not a name of this app."""
        forwarded = ",".join(headers.getlist("x-forwarded-host")).split(",")
        hosts = {hostname(host) for host in [*(headers.getlist("host") or [""]), *filter(None, forwarded)]}
        for host in hosts:
            known = not self._names.isdisjoint({host, ANY}) or (self._any_address and is_address(host))
            if not host or not known:
                raise HTTPException(403, "the Host is not a name of this app: --allow-host adds a name")
        if any(hostname(origin) not in self._names | hosts for origin in headers.getlist("origin")):
            raise HTTPException(403, "the Origin is not a name of this app: --allow-host adds a name")


def check_body(raw: bytes) -> None:
    """Raises HTTPException for a body that Gradio must not get.

    It looks for files in nested values. A session name that contains its separator disables Stop for all users.
    """
    try:
        body = json.loads(raw)
    except (ValueError, RecursionError):
        raise HTTPException(400, "the body is not JSON") from None
    if not isinstance(body, dict):
        raise HTTPException(400, "the body is not a JSON object")
    if any(key in body and not NAME.fullmatch(str(body[key])) for key in ("session_hash", "event_id")):
        raise HTTPException(400, "session_hash and event_id may have up to 64 letters, digits, _ and -")
    data, event = body.pop("data", []), body.pop("event_data", None) or {}
    if not isinstance(data, list) or not isinstance(event, dict):
        raise HTTPException(400, 'data must be a list: send an object such as {"data": ["All:", 10]}')
    if any(isinstance(value, list | dict) for value in chain(data, event.values(), body.values())):
        raise HTTPException(400, "a value must be a string or a number")


async def bad_call(request: Request, error: Exception) -> JSONResponse:
    """The response when Gradio cannot resolve the endpoint or the arguments of a call."""
    return JSONResponse({"detail": "the endpoint does not accept this call: see /gradio_api/openapi.json"}, 400)


def hostname(text: str) -> str:
    """The host of a URL or of HOST[:PORT], in lower case; "" if there is none."""
    try:
        return text if is_address(text) else urlsplit(text if "//" in text else f"//{text.strip()}").hostname or ""
    except ValueError:
        return ""


def is_address(name: str) -> bool:
    try:
        return bool(ip_address(name))
    except ValueError:
        return False
