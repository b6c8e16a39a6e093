"""One app for everything: the OpenAI protocol, health, metrics and docs, with the page mounted on it."""

import asyncio
import logging
import socket
import sys
from collections.abc import Collection
from contextlib import suppress
from pathlib import Path
from typing import Any

import uvicorn
from fastapi import FastAPI
from fastapi.exceptions import RequestValidationError
from jinja2 import Environment, FileSystemLoader
from prometheus_client import CONTENT_TYPE_LATEST, generate_latest
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.middleware.body_limit import RequestBodyLimitMiddleware
from starlette.requests import Request
from starlette.responses import HTMLResponse, Response

from webapp.engine import Busy, stop_engines
from webapp.metrics import REGISTRY, n_sequences
from webapp.model_source import Source
from webapp.openai_api.errors import ApiError, api_error, busy, failure, http_error, invalid_body
from webapp.openai_api.routes import openai_router, refuse_other_methods
from webapp.page import compose, mounted
from webapp.request_filter import LOOPBACK, MAX_BODY, KeyFilter, NameFilter, hostname

TEMPLATES = Environment(loader=FileSystemLoader(Path(__file__).parent), autoescape=True, trim_blocks=True)
SHUTDOWN_S = 2  # for answers that are being sent; an open page never ends its stream


def make_app(source: Source, host: str, names: Collection[str] = (), key: str | None = None) -> FastAPI:
    """The app for the address `host`. `names`: further host names, request_filter.ANY for all; `key`: the API key."""
    middleware = [
        Middleware(NameFilter, names={*LOOPBACK, host, *names}, any_address=hostname(host) not in LOOPBACK),
        Middleware(RequestBodyLimitMiddleware, max_body_size=MAX_BODY),
    ]
    if key:
        middleware.append(Middleware(KeyFilter, key=key))
    handlers: dict[int | type[Exception], Any]
    handlers = {
        ApiError: api_error,
        Busy: busy,
        HTTPException: http_error,
        RequestValidationError: invalid_body,
        500: failure,
    }
    app = FastAPI(
        title="Completions of a registered model", description="The protocol of OpenAI's completions, and the page.",
        version="1", docs_url=None, redoc_url=None, middleware=middleware, exception_handlers=handlers,
    )  # fmt: skip
    app.include_router(openai_router(source))

    @app.head("/health", include_in_schema=False)
    @app.get("/health", tags=["Server"])
    async def health() -> dict[str, Any]:
        """Whether the server answers, what it serves, and how many sequences run and wait, of all versions."""
        served = source.current()
        return {"status": "ok", "model": served.label, "precision": served.generator.decoder.precision} | n_sequences()

    @app.get("/metrics", tags=["Server"], response_class=Response)
    async def metrics() -> Response:
        """Requests, tokens, queue, batch size and the time to the first token, in Prometheus' text format."""
        return Response(generate_latest(REGISTRY), media_type=CONTENT_TYPE_LATEST)

    @app.get("/docs", include_in_schema=False)
    async def docs(request: Request) -> HTMLResponse:
        """This description as a page that loads nothing from elsewhere."""
        base = str(request.base_url).rstrip("/")
        return HTMLResponse(TEMPLATES.get_template("docs.html.j2").render(api=app.openapi(), base=base))

    refuse_other_methods(app.router)
    mounted(app, page := compose(source))
    app.state.page = page
    _describe(app)
    return app


def _describe(app: FastAPI) -> None:
    """Take FastAPI's own status 422 from the description, which the app keeps: an invalid body gets 400."""
    described = app.openapi()
    for route in (route for methods in described["paths"].values() for route in methods.values()):
        route["responses"].pop("422", None)
    for unused in ("HTTPValidationError", "ValidationError"):
        described["components"]["schemas"].pop(unused, None)


class Server(uvicorn.Server):
    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """End the requests that run; uvicorn would wait for them, and then log each stream that it cuts."""
        logging.getLogger("uvicorn.error").setLevel(logging.CRITICAL)
        await asyncio.gather(asyncio.to_thread(stop_engines), super().shutdown(sockets))


def serve(app: FastAPI, host: str, port: int) -> None:
    """Serve `app` until a signal ends it."""
    config = uvicorn.Config(
        app, host=host, port=port, log_level="warning", server_header=False, timeout_graceful_shutdown=SHUTDOWN_S,
    )  # fmt: skip
    server = Server(config)
    with suppress(KeyboardInterrupt):  # Ctrl-C is how a server is stopped: uvicorn has closed it, and raises it again
        server.run()
    if not server.started:
        sys.exit(1)  # uvicorn has said why
