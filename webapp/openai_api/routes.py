"""The routes of the OpenAI protocol, and those that lm-eval's remote tokenizer asks."""

import asyncio
import json
import time
from collections import deque
from collections.abc import AsyncIterator, Coroutine
from contextlib import suppress
from functools import partial
from typing import Any, TypeVar
from uuid import uuid4

from fastapi import APIRouter, Request
from pydantic import BaseModel, ConfigDict, Field
from starlette.concurrency import run_in_threadpool
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route
from starlette.types import Receive, Scope, Send

from pipeline.data.tokenizer import EOT, whole_text
from pipeline.system.errors import PipelineError
from webapp.engine import Job, Row, Stopped, TimedOut, Update
from webapp.metrics import REQUESTS
from webapp.model_source import Served, Source
from webapp.openai_api.choices import Choice
from webapp.openai_api.errors import ApiError
from webapp.openai_api.models import Models
from webapp.openai_api.schema import MAX_PROMPT_TOKENS, MAX_SCORED_TOKENS, CompletionRequest

ALL_METHODS = ["GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS"]
T = TypeVar("T")
CHUNK_S = 0.1  # between two chunks of a stream: more of them would take the cores from the model


class TokenizeRequest(BaseModel):
    model_config = ConfigDict(extra="ignore")  # lm-eval and vLLM's clients send more

    prompt: str = Field(description="text to be encoded")
    model: str | None = Field(None, description="an id of /v1/models; null: the served version")


class DetokenizeRequest(BaseModel):
    model_config = ConfigDict(extra="ignore")

    tokens: list[int] = Field(description="token ids to be decoded")
    model: str | None = Field(None, description="an id of /v1/models; null: the served version")


class Completion:
    """A request in the engine, and its choices."""

    def __init__(self, body: CompletionRequest, served: Served) -> None:
        """Encode the prompts. Raises Busy, before any work, or ApiError for a prompt that the model cannot read."""
        self._body, self._engine = body, served.engine
        self._engine.require_room()
        sampling, generator, tokenizer = body.sampling(), served.generator, served.tokenizer
        self._encoded = [_encoded(prompt, served) for prompt in body.prompts]
        n_scored = body.n * sum(map(len, self._encoded)) if body.echo and body.logprobs is not None else 0
        if n_scored > MAX_SCORED_TOKENS:
            message = (
                f"logprobs with echo: {n_scored:,} tokens of prompts, counted n times: {MAX_SCORED_TOKENS:,} at most"
            )
            raise ApiError(400, message, "logprobs")
        self._choices: list[Choice] = []
        self._rows: list[Row] = []
        for ids in self._encoded:
            echoed = whole_text(tokenizer.decode_bytes(i for i in ids if i != tokenizer.eot)) if body.echo else None
            for n in range(body.n):  # a list of prompts gets the texts that each would get alone
                index = len(self._choices)
                sequence = generator.start(ids, sampling, index, seed_offset=n, n_top=body.logprobs)
                scores = None if body.logprobs is None or not body.echo else generator.score(ids, body.logprobs)
                self._rows.append(Row(sequence, scores))
                self._choices.append(Choice(index, tokenizer, echoed, body.logprobs is not None))
        self._head = {
            "id": f"cmpl-{uuid4().hex}",
            "object": "text_completion",
            "created": int(time.time()),
            "model": f"{served.info['name']}@{served.info['version']}",
            "system_fingerprint": str(served.info["tags"].get("model_sha256", ""))[:16] or None,
        }
        self._updates: deque[Update] = deque()  # the engine's thread appends
        self._wake, self._woken = asyncio.Event(), False
        self._complete = asyncio.Event()
        self._job: Job | None = None

    def submit(self) -> None:
        """Hand the request to the engine. Raises Busy."""
        loop = asyncio.get_running_loop()

        def emit(update: Update) -> None:
            self._updates.append(update)
            if loop.is_closed():
                return
            if last := update is None or isinstance(update, PipelineError):
                loop.call_soon_threadsafe(self._complete.set)
            if (last or self._body.stream) and not self._woken:
                self._woken = True
                loop.call_soon_threadsafe(self._wake.set)

        self._job = self._engine.submit(self._rows, emit)

    def cancel(self) -> None:
        if self._job:
            self._job.cancel()

    async def updates(self) -> AsyncIterator[None]:
        """Yield each time when updates have come to the choices, until all have. Raises ApiError."""
        while True:
            await self._wake.wait()
            self._wake.clear()
            self._woken = False
            while self._updates:
                if (update := self._updates.popleft()) is None:
                    yield
                    return
                if isinstance(update, PipelineError):
                    raise ApiError(503 if isinstance(update, TimedOut | Stopped) else 500, f"{update}")
                self._choices[update.sequence].add(update)
            yield
            with suppress(TimeoutError):
                await asyncio.wait_for(self._complete.wait(), CHUNK_S)

    async def whole(self) -> dict[str, Any]:
        async for _ in self.updates():
            pass
        return self._head | {"choices": [choice.take() for choice in self._choices], "usage": self._usage()}

    async def events(self) -> AsyncIterator[str]:
        """The chunks as server-sent events; an error is one, too."""
        wants_usage = self._body.stream_options is not None and self._body.stream_options.include_usage
        no_usage = {"usage": None} if wants_usage else {}
        try:
            async for _ in self.updates():
                for choice in self._choices:
                    if (taken := choice.take()) is not None:
                        yield _event(self._head | {"choices": [taken]} | no_usage)
            if wants_usage:
                yield _event(self._head | {"choices": [], "usage": self._usage()})
        except ApiError as error:
            yield _event(error.body())
        yield "data: [DONE]\n\n"

    def _usage(self) -> dict[str, int]:
        prompt, new = sum(map(len, self._encoded)), sum(choice.n_tokens for choice in self._choices)
        return {"prompt_tokens": prompt, "completion_tokens": new, "total_tokens": prompt + new}


class EventStream(StreamingResponse):
    """The chunks of a completion. When the client disconnects, the request is cancelled."""

    def __init__(self, completion: Completion, request: Request) -> None:
        headers = {"cache-control": "no-store", "x-accel-buffering": "no"}  # a proxy must pass each chunk on
        super().__init__(completion.events(), media_type="text/event-stream", headers=headers)
        self._completion, self._request = completion, request

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await unless_gone(self._request, super().__call__(scope, receive, send))
        finally:
            self._completion.cancel()


def openai_router(source: Source) -> APIRouter:
    router, models = APIRouter(), Models(source)

    @router.post("/v1/completions", tags=["OpenAI"], responses=_refusals(400, 401, 404, 429))
    async def create_completion(body: CompletionRequest, request: Request) -> Response:
        """Continue a prompt, or several. The answer is that of OpenAI's completions; errors have OpenAI's shape."""
        completion = await run_in_threadpool(Completion, body, await models.open(body.model))
        completion.submit()
        if body.stream:
            REQUESTS.labels("200").inc()
            return EventStream(completion, request)
        try:
            if (answer := await unless_gone(request, completion.whole())) is None:
                raise ApiError(499, "the client has disconnected")
        finally:
            completion.cancel()
        REQUESTS.labels("200").inc()
        return JSONResponse(answer)

    @router.head("/v1/models", include_in_schema=False)
    @router.get("/v1/models", tags=["OpenAI"])
    async def list_models() -> dict[str, Any]:
        """The served version by the name of the model, and each registered version by its number and aliases."""
        return {"object": "list", "data": await models.listing()}

    @router.head("/v1/models/{model:path}", include_in_schema=False)
    @router.get("/v1/models/{model:path}", tags=["OpenAI"], responses=_refusals(401, 404))
    async def retrieve_model(model: str) -> dict[str, Any]:
        """One of them."""
        return await models.model(model)

    @router.get("/tokenizer_info", tags=["Tokenizer"])
    async def tokenizer_info() -> dict[str, Any]:
        """What lm-eval's remote tokenizer asks first."""
        return {"tokenizer_class": source.current().tokenizer.name, "eos_token": EOT, "bos_token": None,
                "pad_token": None, "chat_template": None}  # fmt: skip

    @router.post("/tokenize", tags=["Tokenizer"], responses=_refusals(400, 401, 404))
    async def tokenize(body: TokenizeRequest) -> dict[str, Any]:
        """The token ids of a text; the end-of-text token alone is its id."""
        served = await models.open(body.model)
        text, tokenizer = _checked_text(body.prompt), served.tokenizer
        ids = [tokenizer.eot] if text == EOT else await run_in_threadpool(tokenizer.encode, text)
        return {"tokens": ids, "count": len(ids), "max_model_len": served.window}

    @router.post("/detokenize", tags=["Tokenizer"], responses=_refusals(400, 401, 404))
    async def detokenize(body: DetokenizeRequest) -> dict[str, Any]:
        """The text of token ids."""
        served = await models.open(body.model)
        ids = _checked_ids(body.tokens, served, "tokens")
        text = await run_in_threadpool(served.tokenizer.decode, [i for i in ids if i != served.tokenizer.eot])
        return {"prompt": text}

    refuse_other_methods(router)

    @router.api_route("/v1/{path:path}", methods=ALL_METHODS, include_in_schema=False)
    async def unknown(path: str, request: Request) -> None:
        hint = "a base model has no chat: use /v1/completions" if "chat" in path else "/docs lists the paths"
        raise ApiError(404, f"/v1/{path} does not exist here: {hint}", code="unknown_url")

    return router


def refuse_other_methods(router: APIRouter) -> None:
    """Let each path that `router` has so far answer any other method with status 405."""
    allowed: dict[str, set[str]] = {}
    for route in router.routes:
        if isinstance(route, Route):
            allowed.setdefault(route.path, set()).update(route.methods or ())
    for path, methods in allowed.items():
        refuse = partial(_refuse_method, ", ".join(sorted(methods)))
        router.add_route(path, refuse, [each for each in ALL_METHODS if each not in methods], include_in_schema=False)


async def _refuse_method(allowed: str, request: Request) -> Response:
    words = f"{request.method} {request.url.path}: choose {allowed}"
    refused = ApiError(405, words, code="method_not_allowed")
    refused.headers["Allow"] = allowed
    raise refused


def _refusals(*statuses: int) -> dict[int | str, dict[str, Any]]:
    shape = {"error": {"message": "…", "type": "invalid_request_error", "param": "prompt", "code": None}}
    content = {"application/json": {"example": shape}}
    words = {400: "invalid body", 401: "no or wrong API key", 404: "unknown model", 429: "the queue is full"}
    return {status: {"description": words[status], "content": content} for status in statuses}


def _encoded(prompt: str | list[int], served: Served) -> list[int]:
    """Token ids of a prompt, at least one. Raises ApiError."""
    checked = _checked_text(prompt) if isinstance(prompt, str) else _checked_ids(prompt, served, "prompt")
    ids = served.generator.encode(checked)
    if len(ids) > MAX_PROMPT_TOKENS:
        message = f"prompt: {len(ids):,} tokens: {MAX_PROMPT_TOKENS:,} at most"
        raise ApiError(400, message, "prompt", "context_length_exceeded")
    return ids


def _checked_text(text: str) -> str:
    """A text that does not take long to encode. Raises ApiError."""
    if len(text) > (most := 16 * MAX_PROMPT_TOKENS):
        message = f"prompt: {len(text):,} characters: {most:,} at most"
        raise ApiError(400, message, "prompt", "context_length_exceeded")
    return text


def _checked_ids(ids: list[int], served: Served, param: str) -> list[int]:
    n_vocab = served.tokenizer.n_vocab
    if wrong := next((i for i in ids if not 0 <= i < n_vocab), None):
        raise ApiError(400, f"{param}: {wrong} is not a token id: the tokenizer has 0 to {n_vocab - 1}", param)
    return ids


async def unless_gone(request: Request, answer: Coroutine[Any, Any, T]) -> T | None:
    """Await `answer`; when the client disconnects, cancel it and return None."""

    async def gone() -> None:
        while (await request.receive())["type"] != "http.disconnect":
            pass

    working, leaving = asyncio.create_task(answer), asyncio.create_task(gone())
    try:
        await asyncio.wait({working, leaving}, return_when=asyncio.FIRST_COMPLETED)
        return working.result() if working.done() else None
    finally:
        working.cancel()
        leaving.cancel()


def _event(body: dict[str, Any]) -> str:
    return f"data: {json.dumps(body, ensure_ascii=False)}\n\n"
