"""body: what was posted to an endpoint -> the JSON that Gradio is to read, or why it may not.

Gradio takes a body of the wrong shape for a fault of its own, with a server error and a traceback; some names of a
session would even spoil Stop, or the log, for everyone from then on. So the body is read here first, and written anew
from the parts that are known. What the values mean is for the endpoint itself to judge.
"""

import json
import re
from collections.abc import Mapping
from typing import Any, NamedTuple

from pipeline.system.errors import InputError

NAME = re.compile(r"[A-Za-z0-9_-]{1,64}")  # of a session or an event
EXAMPLE = 'send an object, such as {"data": ["All:", 10]}'


class Call(NamedTuple):
    """What an event of the page, or an endpoint of the API, takes."""

    endpoint: str  # its name
    parameters: list[str]  # a name for each value
    needed: list[str]  # of these, the ones without a default


def checked_body(endpoint: str, raw: bytes, calls: Mapping[int, Call]) -> bytes:
    """The body for `endpoint`: cancel, reset, queue/join, call/NAME or call/v2/NAME. Raises InputError."""
    try:
        body = json.loads(raw)
    except (ValueError, RecursionError):
        raise InputError(f"the body is no JSON: {EXAMPLE}") from None
    if not isinstance(body, dict):
        raise InputError(f"the body is no JSON object: {EXAMPLE}")
    kept: dict[str, Any]
    if endpoint == "reset":
        kept = {"event_id": _name(body, "event_id")}
    elif endpoint == "cancel":
        kept = {key: _name(body, key) for key in ("session_hash", "event_id")} | {"fn_index": _number(body, calls)}
    elif endpoint == "queue/join":
        number = _number(body, calls)
        kept = {"fn_index": number, "session_hash": _name(body, "session_hash"), "data": _data(body, calls[number])}
        kept |= {"event_data": _event_data(body), "trigger_id": _trigger(body)}
    else:
        call = _call(endpoint.rpartition("/")[2], calls)
        kept = _named(body, call) if endpoint.startswith("call/v2/") else {"data": _data(body, call)}
    return json.dumps(kept).encode()


def _name(body: dict[str, Any], key: str) -> str:
    if not isinstance(name := body.get(key), str) or not NAME.fullmatch(name):
        raise InputError(f"{key} {_brief(name)}: give up to 64 letters, digits, _ and -")
    return name


def _number(body: dict[str, Any], calls: Mapping[int, Call]) -> int:
    number = body.get("fn_index")
    if not isinstance(number, int) or isinstance(number, bool) or number not in calls:
        raise InputError(f"fn_index {_brief(number)}: the page has no such event, load it again")
    return number


def _call(endpoint: str, calls: Mapping[int, Call]) -> Call:
    for call in calls.values():
        if call.endpoint == endpoint:
            return call
    raise InputError(f"/{endpoint[:40]} is no endpoint: see gradio_api/openapi.json")


def _data(body: dict[str, Any], call: Call) -> list[Any]:
    data, wanted = body.get("data"), call.parameters
    if not isinstance(data, list) or len(data) != len(wanted):
        found = f"{len(data)} values" if isinstance(data, list) else "no list"
        raise InputError(f"data has {found}: /{call.endpoint} takes {len(wanted)} values ({', '.join(wanted)})")
    return [_simple(name, value) for name, value in zip(wanted, data, strict=True)]


def _named(body: dict[str, Any], call: Call) -> dict[str, Any]:
    """Values by name, of which some may be left out."""
    if body.keys() - set(call.parameters) or set(call.needed) - body.keys():
        raise InputError(f"/{call.endpoint} takes {', '.join(call.parameters)}, and needs {', '.join(call.needed)}")
    return {name: _simple(name, value) for name, value in body.items()}


def _event_data(body: dict[str, Any]) -> dict[str, Any] | None:
    """What was pressed on the page, None for most events."""
    if (sent := body.get("event_data")) is None:
        return None
    if not isinstance(sent, dict):
        raise InputError(f"event_data {_brief(sent)}: send an object or null")
    return {name: _simple(name[:40], value) for name, value in sent.items()}


def _trigger(body: dict[str, Any]) -> int | None:
    """The number of the element that was pressed, which nothing here asks for."""
    trigger = body.get("trigger_id")
    return trigger if isinstance(trigger, int) and not isinstance(trigger, bool) else None


def _simple(name: str, value: Any) -> Any:
    if isinstance(value, list | dict):  # Gradio would look for files in it
        raise InputError(f"{name} {_brief(value)}: give a text or a number")
    return value


def _brief(value: Any) -> str:
    return ascii(value)[:40]
