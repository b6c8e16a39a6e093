"""Refuse every request that the page and its API do not need, before Gradio or FastAPI reads it.

Gradio also offers uploads, files, a proxy and monitoring. Host and Origin must be names of this app. Otherwise any web
site in the user's browser could use it, through DNS rebinding or a cross-site POST.
"""

import json
import re
from base64 import b64decode
from collections.abc import Iterable
from hmac import compare_digest
from ipaddress import ip_address
from itertools import chain
from urllib.parse import urlsplit

from starlette.datastructures import Headers, MutableHeaders
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from webapp.openai_api.errors import TOO_LARGE, ApiError

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


class NameFilter:
    """ASGI middleware for all paths. `names`: host names of this app, ANY for all; `any_address`: every IP address too.

    DNS rebinding needs a name, so an address is safe. Starlette's TrustedHostMiddleware checks neither addresses nor
    Origin. A POST must be JSON: a foreign page would need a CORS preflight, which nothing here answers.
    """

    def __init__(self, app: ASGIApp, names: Iterable[str], any_address: bool) -> None:
        self._app, self._names, self._any_address = app, {*map(hostname, names)} - {""}, any_address

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            return await self._app(scope, receive, send)
        if scope["type"] == "websocket":
            return await send({"type": "websocket.close"})
        headers = Headers(scope=scope)
        refusal = self._refusal(headers)
        if scope["method"] == "POST" and not is_json(headers):
            refusal = refusal or JSONResponse(_body(415, "send application/json"), 415)
        if (length := headers.get("content-length", "")).isdecimal() and int(length[:20]) > MAX_BODY:
            refusal = refusal or JSONResponse(_body(413, TOO_LARGE), 413)
        if refusal:
            return await refusal(scope, receive, send)

        async def send_with_headers(message: Message) -> None:
            if message["type"] == "http.response.start":
                MutableHeaders(scope=message).update(HEADERS)
            await send(message)

        return await self._app(scope, receive, send_with_headers)

    def _refusal(self, headers: Headers) -> JSONResponse | None:
        """The response if Host, X-Forwarded-Host or Origin is not a name of this app."""
        forwarded = ",".join(headers.getlist("x-forwarded-host")).split(",")
        hosts = {hostname(host) for host in [*(headers.getlist("host") or [""]), *filter(None, forwarded)]}
        for host in hosts:
            known = not self._names.isdisjoint({host, ANY}) or (self._any_address and is_address(host))
            if not host or not known:
                return JSONResponse(_body(403, "the Host is not a name of this app: --allow-host adds a name"), 403)
        if any(hostname(origin) not in self._names | hosts for origin in headers.getlist("origin")):
            return JSONResponse(_body(403, "the Origin is not a name of this app: --allow-host adds a name"), 403)
        return None


class GradioFilter:
    """ASGI middleware in front of Gradio: only the paths and bodies that the page and its endpoints need."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return await self._app(scope, receive, send)
        request, bodies = Request(scope, receive), []
        try:
            if not (POSTED if request.method == "POST" else READ).fullmatch(scope["path"]):
                raise HTTPException(404, f"{scope['path'][:200]} does not exist here: /docs lists the paths")
            if request.method == "POST":
                bodies.append(await request.body())
                check_body(bodies[0])
        except ClientDisconnect:
            return None
        except HTTPException as refusal:
            words = TOO_LARGE if refusal.status_code == 413 else refusal.detail
            answer = JSONResponse(_body(refusal.status_code, words), refusal.status_code)
            return await answer(scope, receive, send)

        async def receive_again() -> Message:
            return {"type": "http.request", "body": bodies.pop()} if bodies else await receive()

        try:
            await self._app(scope, receive_again, send)
        except RuntimeError as error:
            if not isinstance(error.__cause__, HTTPException):
                raise
            await send({"type": "http.response.body"})  # Gradio refuses an unknown event within the stream it began


class KeyFilter:
    """ASGI middleware: every path but /health needs the API key, as a Bearer token or as the password of Basic.

    The page asks for it as well, since it generates text, too: a browser shows its login, with any user name.
    """

    def __init__(self, app: ASGIApp, key: str) -> None:
        self._app, self._key = app, key.encode()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or scope["path"] == "/health" or self._given(Headers(scope=scope)):
            return await self._app(scope, receive, send)
        words = "no or wrong API key: send Authorization: Bearer KEY, or log in with the key as password"
        challenge = {"WWW-Authenticate": 'Basic realm="API key as password", charset="UTF-8"'}
        answer = JSONResponse(_body(401, words, "invalid_api_key"), 401, challenge)
        return await answer(scope, receive, send)

    def _given(self, headers: Headers) -> bool:
        """Whether the key is in the headers; the time does not tell how much of it is right."""
        scheme, _, value = headers.get("authorization", "").partition(" ")
        given = value.strip().encode("latin-1")
        if scheme.lower() == "basic":
            try:
                given = b64decode(given, validate=True).partition(b":")[2]
            except ValueError:
                return False
        elif scheme.lower() != "bearer":
            return False
        return compare_digest(given, self._key)


def is_json(headers: Headers) -> bool:
    return headers.get("content-type", "").partition(";")[0].strip().lower() == "application/json"


def _body(status: int, message: str, code: str | None = None) -> dict[str, object]:
    """The body of a refusal; `detail` is for the page's clients, `error` for OpenAI's."""
    return {"detail": message, **ApiError(status, message, code=code).body()}


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
        named = 'POST {"prompt": "All:", "max_tokens": 10} to /gradio_api/call/v2/generate'
        raise HTTPException(400, f"data must be a list, and event_data an object: {named} sends values by name")
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
