"""guard: a request -> the page, or a refusal before Gradio sees it.

Gradio serves far more than this app needs: uploads, files, a proxy, monitoring. So only what the page and the API use
is let through. On a loopback address, Host and Origin must be names of it as well: else any page in the user's browser
could talk to the app, by rebinding a name of its own to 127.0.0.1 or by posting blindly.
"""

import re
from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any
from urllib.parse import urlsplit

Scope = MutableMapping[str, Any]
Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
App = Callable[[Scope, Receive, Send], Awaitable[None]]

LOOPBACK = frozenset({"localhost", "127.0.0.1", "::1"})
LARGEST_BODY = 16 * 2**20  # bytes; a prompt of a million characters is refused in words, more than that without
OPEN = re.compile(
    r"/(config|info|theme\.css|favicon\.ico|robots\.txt|manifest\.json)?/?"
    r"|/(assets|static|svelte)/.+"
    r"|/gradio_api/(config|info|openapi\.json|app_id|startup-events|theme\.css|cancel|reset|heartbeat/\w+)/?"
    r"|/gradio_api/(queue/(join|data|status)|call/(v2/)?\w+(/\w+)?|(run|api)/\w+)/?"
)
POLICY = (
    "default-src 'self'; script-src 'self' 'unsafe-inline' 'unsafe-eval'; style-src 'self' 'unsafe-inline'; "
    "img-src 'self' data: blob:; font-src 'self' data:; object-src 'none'; base-uri 'self'; form-action 'self'"
)  # Gradio's own scripts need inline and eval; nothing may leave for another host


class Guard:
    """ASGI middleware; `loopback`: whether only names of this machine are let in."""

    def __init__(self, app: App, loopback: bool) -> None:
        self._app, self._loopback = app, loopback

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
        elif refusal := self._refusal(scope):
            await _answer(send, *refusal)
        else:
            await self._app(scope, _counted(receive), _with_policy(send))

    def _refusal(self, scope: Scope) -> tuple[int, str] | None:
        """Status and reason, None where the request may pass."""
        headers = {name.decode("latin-1"): value.decode("latin-1") for name, value in scope["headers"]}
        if self._loopback and hostname(f"//{headers.get('host', '')}") not in LOOPBACK:
            return 403, "the Host is not this machine"
        if self._loopback and "origin" in headers and hostname(headers["origin"]) not in LOOPBACK:
            return 403, "the Origin is not this machine"
        if not OPEN.fullmatch(scope["path"]):
            return 404, "there is nothing here"
        length = headers.get("content-length", "0")
        if not length.isdecimal() or int(length) > LARGEST_BODY:
            return 413, f"more than {LARGEST_BODY:,} bytes"
        return None


def hostname(url: str) -> str | None:
    """The host's name in a URL, None where there is none."""
    try:
        return urlsplit(url).hostname
    except ValueError:
        return None


def _counted(receive: Receive) -> Receive:
    """`receive`, ending the request as if its sender had left where a body of unstated length grows too long."""
    received = 0

    async def counted() -> Message:
        nonlocal received
        message = await receive()
        received += len(message.get("body", b""))
        return {"type": "http.disconnect"} if received > LARGEST_BODY else message

    return counted


def _with_policy(send: Send) -> Send:
    async def with_policy(message: Message) -> None:
        if message["type"] == "http.response.start":
            headers = {b"content-security-policy": POLICY.encode(), b"x-content-type-options": b"nosniff"}
            headers |= {b"referrer-policy": b"no-referrer"}
            message["headers"] = [*message.get("headers", []), *headers.items()]
        await send(message)

    return with_policy


async def _answer(send: Send, status: int, reason: str) -> None:
    headers = [(b"content-type", b"text/plain; charset=utf-8")]
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": f"{reason}\n".encode()})
