"""guard: a request -> the page, or a refusal before Gradio sees it.

Gradio serves far more than this app needs: uploads, files, a proxy, monitoring. So only what the page and the API use
is let through, with bodies that `webapp/body.py` has read. Host and Origin must be names of this app as well: else any
page in the user's browser could talk to it, by rebinding a name of its own to 127.0.0.1 or by posting blindly.
"""

import json
import re
from collections.abc import Awaitable, Callable, Collection, Mapping, MutableMapping
from contextlib import nullcontext
from ipaddress import ip_address
from typing import Any, NamedTuple
from urllib.parse import parse_qs

from pipeline.system.errors import InputError
from webapp.http.body import NAME, Call, checked_body
from webapp.http.readers import Readers

Scope = MutableMapping[str, Any]
Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
App = Callable[[Scope, Receive, Send], Awaitable[None]]

LOOPBACK = frozenset({"localhost", "127.0.0.1", "::1"})
ANY = "*"
LARGEST_BODY = 16 * 2**20  # bytes; a prompt of a million characters is refused in words, more than that without
OPEN = re.compile(
    r"/(config|info|theme\.css|favicon\.ico|robots\.txt|manifest\.json)?/?"
    r"|/(assets|static|svelte)/[\w./@+~-]{1,200}"
    r"|/gradio_api/(config|info|openapi\.json|app_id|startup-events|theme\.css|queue/data)/?"
    rf"|/gradio_api/heartbeat/{NAME.pattern}",
    re.ASCII,
)
POSTED = re.compile(r"/gradio_api/(cancel|reset|queue/join|call/(?:v2/)?\w{1,64})/?", re.ASCII)
READ = re.compile(rf"/gradio_api/(?:queue/data|call/(?:v2/)?\w{{1,64}}/({NAME.pattern}))/?", re.ASCII)
HOST = re.compile(r"(?:\[([0-9A-Fa-f:.]+)\]|([\w.-]+))(?::\d{1,5})?", re.ASCII)
POLICY = (
    "default-src 'self'; script-src 'self' 'unsafe-inline' 'unsafe-eval'; style-src 'self' 'unsafe-inline'; "
    "img-src 'self' data: blob:; font-src 'self' data:; object-src 'none'; base-uri 'self'; form-action 'self'"
)  # Gradio's own scripts need inline and eval; nothing may leave for another host


class Known(NamedTuple):
    """What the guard has to know of the app behind it."""

    names: Collection[str]  # what it may be called; ANY: whatever it is called, as long as Origin says the same
    addresses: bool  # whether any IP address is a name of it: nobody can rebind one
    calls: Mapping[int, Call]
    readers: Readers


class Refused(Exception):  # noqa: N818 (an answer, not a fault)
    """The request ends here, with a status and words."""

    def __init__(self, status: int, reason: str) -> None:
        super().__init__(reason)
        self.status = status


class Guard:
    """ASGI middleware."""

    def __init__(self, app: App, known: Known) -> None:
        self._app, self._known = app, known

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "websocket":
            await send({"type": "websocket.close"})
        elif scope["type"] != "http":
            await self._app(scope, receive, send)
        else:
            try:
                receive, session = await self._checked(scope, receive)
            except (Refused, InputError) as refusal:
                await _answer(send, refusal)
                return
            with self._known.readers.reading(session) if session else nullcontext():
                await self._app(scope, receive, _with_policy(send))

    async def _checked(self, scope: Scope, receive: Receive) -> tuple[Receive, str | None]:
        """Where to read the body from, and the session whose stream this opens. Raises Refused or InputError."""
        self._check_names(scope)
        path, method = scope["path"], scope["method"]
        posted, read = POSTED.fullmatch(path), READ.fullmatch(path)
        if posted and method == "POST":
            body = checked_body(posted[1], await _body(scope, receive), self._known.calls)
            self._known.readers.look_later()
            return _once(body, receive), None
        if read and method == "GET":
            session = read[1] or parse_qs(scope["query_string"].decode("latin-1")).get("session_hash", [""])[-1]
            if not self._known.readers.is_open(session):
                raise Refused(404, "nothing can be read under this name: join the queue first")
            return receive, session
        if not (posted or read or OPEN.fullmatch(path)):
            raise Refused(404, "there is nothing here")
        return receive, None

    def _check_names(self, scope: Scope) -> None:
        """Raises Refused where Host, what a proxy says that it was, or Origin is a stranger's."""
        known, proxied = self._known, ",".join(_values(scope, "x-forwarded-host")).split(",")
        hosts = [hostname(host.strip()) for host in [*(_values(scope, "host") or [""]), *filter(None, proxied)]]
        for host in hosts:
            if not host or not ({host, ANY} & set(known.names) or (known.addresses and is_address(host))):
                raise Refused(403, "the Host is not a name of this app: --allow-host gives it one")
        for origin in _values(scope, "origin"):
            if hostname(origin.partition("://")[2]) not in {*known.names, *hosts}:
                raise Refused(403, "the Origin is not this app: --allow-host gives it another name")


def hostname(netloc: str) -> str | None:
    """The name in `name:port`, in lower case; None where that is not what it is."""
    found = HOST.fullmatch(netloc)
    return (found[1] or found[2]).lower() if found else None


def is_address(name: str) -> bool:
    try:
        return bool(ip_address(name))
    except ValueError:
        return False


def _values(scope: Scope, header: str) -> list[str]:
    return [value.decode("latin-1") for name, value in scope["headers"] if name == header.encode()]


async def _body(scope: Scope, receive: Receive) -> bytes:
    """All that was posted. Raises Refused."""
    kind = "".join(_values(scope, "content-type")).partition(";")[0].strip().lower()
    if kind != "application/json":  # what a foreign page may post without asking is none
        raise Refused(415, "the body should be JSON: say so with Content-Type: application/json")
    length, body, more = "".join(_values(scope, "content-length")), bytearray(), True
    too_long = Refused(413, f"the body has more than {LARGEST_BODY:,} bytes")
    if length.isdecimal() and int(length) > LARGEST_BODY:
        raise too_long
    while more:
        message = await receive()
        body += message.get("body", b"")
        more = message.get("more_body", False)
        if message["type"] == "http.disconnect" or len(body) > LARGEST_BODY:
            raise too_long
    return bytes(body)


def _once(body: bytes, receive: Receive) -> Receive:
    """`receive`, with `body` in place of what has been read from it already."""
    bodies = [body]

    async def received() -> Message:
        return {"type": "http.request", "body": bodies.pop()} if bodies else await receive()

    return received


def _with_policy(send: Send) -> Send:
    async def with_policy(message: Message) -> None:
        if message["type"] == "http.response.start":
            headers = {b"content-security-policy": POLICY.encode(), b"x-content-type-options": b"nosniff"}
            headers |= {b"referrer-policy": b"no-referrer"}
            message["headers"] = [*message.get("headers", []), *headers.items()]
        await send(message)

    return with_policy


async def _answer(send: Send, refusal: Refused | InputError) -> None:
    status = refusal.status if isinstance(refusal, Refused) else 400
    headers = [(b"content-type", b"application/json"), (b"x-content-type-options", b"nosniff")]
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": json.dumps({"detail": str(refusal)}).encode()})
