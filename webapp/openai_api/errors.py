"""Errors in OpenAI's shape: {"error": {"message", "type", "param", "code"}}."""

from collections.abc import Mapping
from typing import Any

from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import JSONResponse

from webapp.metrics import REQUESTS

TYPES = {401: "authentication_error", 429: "rate_limit_error", 500: "server_error", 503: "server_error"}
FORMS = {  # of fields that pydantic's messages describe badly
    "prompt": "give text, a list of texts, token ids, or a list of lists of them",
    "stop": "give a text of at most 1,000 characters, or a list of at most 4 of them",
    "stream_options": 'give an object such as {"include_usage": true}',
}
RETRY_AFTER_S = 2
TOO_LARGE = "the body is too large: send 1 MiB at most"


class ApiError(Exception):
    """A request that is refused; `param`: the field of the body that is at fault."""

    def __init__(self, status: int, message: str, param: str | None = None, code: str | None = None) -> None:
        super().__init__(message)
        self.status, self.message, self.param, self.code = status, message, param, code
        self.headers: dict[str, str] = {}

    def body(self) -> dict[str, Any]:
        kind = TYPES.get(self.status, "invalid_request_error")
        return {"error": {"message": self.message, "type": kind, "param": self.param, "code": self.code}}

    def response(self) -> JSONResponse:
        return JSONResponse(self.body(), self.status, self.headers)


async def api_error(request: Request, error: Exception) -> JSONResponse:
    assert isinstance(error, ApiError)
    if request.url.path == "/v1/completions":
        REQUESTS.labels(str(error.status)).inc()
    return error.response()


async def busy(request: Request, error: Exception) -> JSONResponse:
    """The response while too many sequences are waiting."""
    refused = ApiError(429, f"{error}", code="queue_full")
    refused.headers["Retry-After"] = str(RETRY_AFTER_S)
    return await api_error(request, refused)


async def failure(request: Request, error: Exception) -> JSONResponse:
    """The response to an error that nobody expects; uvicorn logs it."""
    return await api_error(request, ApiError(500, "the server failed: its log says why"))


async def http_error(request: Request, error: Exception) -> JSONResponse:
    """The response to an unknown path, a wrong method, or a body that is not JSON."""
    assert isinstance(error, HTTPException)
    if error.status_code == 400:  # FastAPI could not read the body
        form = "UTF-8" if isinstance(error.__cause__, UnicodeDecodeError) else "JSON"
        return await api_error(request, ApiError(400, f"the body is not {form}"))
    detail = TOO_LARGE if error.status_code == 413 else str(error.detail).lower()
    refused = ApiError(error.status_code, f"{request.method} {request.url.path}: {detail}")
    refused.headers = dict(error.headers or {})
    return await api_error(request, refused)


async def invalid_body(request: Request, error: Exception) -> JSONResponse:
    """The response to a body that does not fit the schema: the first fault, with the name of the field."""
    assert isinstance(error, RequestValidationError)
    return await api_error(request, _fault(error.errors()[0]))


def _fault(fault: Mapping[str, Any]) -> ApiError:
    kind, place, message = fault["type"], fault["loc"][1:], str(fault["msg"])
    if kind == "json_invalid":
        return ApiError(400, "the body is not JSON")
    if kind == "value_error":  # by our own validators, whose messages begin with the field or lack it
        message = message.removeprefix("Value error, ")
        return ApiError(400, f"{place[0]}: {message}", str(place[0])) if place else _of_several(message)
    if not place:
        return ApiError(400, "the body is not a JSON object")
    field = ".".join(str(part) for part in place) if place[0] == "stream_options" else str(place[0])
    if kind == "extra_forbidden":
        return ApiError(400, f"Unrecognized request argument supplied: {field}", field)
    if kind != "missing":
        message = "give text" if place == ("prompt",) else FORMS.get(field, message)  # the prompt of /tokenize
    return ApiError(400, f"{field}: {message[:1].lower()}{message[1:]}", field)


def _of_several(message: str) -> ApiError:
    """A fault of fields that do not fit together, as `field: what is wrong`."""
    return ApiError(400, message, message.partition(":")[0])
