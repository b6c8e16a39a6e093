"""Load test of the page's API: requests served and refused, latency, and memory under many simultaneous users.

    python -m benchmarks.load [--users 50] [--seconds 120] [--project FOLDER] [--json FILE]

Starts `app.py` of this checkout on a free port, with the champion of the project in FOLDER. Each user sends a request
to `/generate`, reads the stream to its end, pauses for some seconds, and repeats. A user pauses too when the queue is
full. Prompts, seeds and pauses are sampled from one seed.

Before the test each request is sent once alone. Under load its reply must have exactly the same text. The time to the
first token ends with the first answer of the stream that has text, and includes the time in the queue. Users and server
share the cores of this machine. The exit code is 1 if a reply failed or differed.
"""

import argparse
import asyncio
import json
import os
import random
import socket
import statistics
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import httpx
import psutil

from benchmarks.throughput import machine_name

ROOT = Path(__file__).parent.parent
PROMPTS = ("First Citizen:\n", "ROMEO:\n", "JULIET:\nO ", "KING RICHARD III:\n", "To be, or not to be", "What say you")
N_REQUESTS = 12  # different ones; each is sent alone first
THINK_S = (1.0, 5.0)  # between a reply and the next request, uniformly distributed
TIMEOUT_S = 300.0  # of a stream without data, which then counts as failed


class Request(NamedTuple):
    """The arguments of `/generate`, in order."""

    prompt: str
    max_tokens: int
    temperature: float = 0.8
    top_k: int = 0
    top_p: float = 1.0
    repetition_penalty: float = 1.0
    samples: int = 1
    seed: int = 0


class Reply(NamedTuple):
    """The outcome of a request; if it was refused or failed, only `outcome` and `error` are set."""

    outcome: str  # served, refused or failed
    first_s: float = 0.0
    whole_s: float = 0.0
    n_tokens: int = 0
    text: str = ""
    error: str = ""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--users", type=int, default=50)
    parser.add_argument("--seconds", type=float, default=120, help="how long new requests are sent")
    parser.add_argument("--tokens", type=int, default=60, help="length of each reply")
    parser.add_argument("--project", type=Path, default=ROOT, help="a project with a champion, from `dvc repro`")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--json", type=Path, default=ROOT / "benchmarks" / "results" / "load.json")
    arguments = parser.parse_args()
    rng = random.Random(arguments.seed)  # noqa: S311 (no secret)
    requests = [Request(rng.choice(PROMPTS), arguments.tokens, seed=rng.randrange(10**6)) for _ in range(N_REQUESTS)]
    with served(arguments.project) as (url, server):
        report = asyncio.run(load(url, server, requests, arguments))
    print_table(report)
    arguments.json.write_text(json.dumps(report, indent=1) + "\n")
    sys.exit(report["failed"] > 0 or report["differing"] > 0)


@contextmanager
def served(project: Path) -> Iterator[tuple[str, psutil.Process]]:
    """Start the app; yield its address and process once it answers. It writes to our stdout and stderr."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    process = subprocess.Popen([sys.executable, ROOT / "app.py", "--port", str(port)], cwd=project, env=environment)
    url = f"http://127.0.0.1:{port}/gradio_api/"
    try:
        while True:
            try:
                httpx.get(f"{url}app_id")
                break
            except httpx.TransportError:
                if process.poll() is not None:
                    sys.exit(process.returncode)
                time.sleep(0.2)
        yield url, psutil.Process(process.pid)
    finally:
        process.terminate()
        process.wait(30)


async def load(
    url: str, server: psutil.Process, requests: list[Request], arguments: argparse.Namespace
) -> dict[str, Any]:
    """Send each request alone, then let all users send theirs; return the figures."""
    limits = httpx.Limits(max_connections=None)
    async with httpx.AsyncClient(base_url=url, timeout=TIMEOUT_S, limits=limits) as http:
        alone = [await ask(http, request) for request in requests]
        if failed := [reply for reply in alone if reply.outcome != "served"]:
            sys.exit(f"error: a request without load failed: {failed[0].error}: fix that first")
        before, begun = server.memory_info().rss, time.perf_counter()
        end = begun + arguments.seconds
        rngs = [random.Random(f"{arguments.seed} {n}") for n in range(arguments.users)]  # noqa: S311 (no secret)
        users = [user(http, requests, rng, end) for rng in rngs]
        results = [reply for replies in await asyncio.gather(*users) for reply in replies]
        took, after = time.perf_counter() - begun, server.memory_info().rss
    replies = [reply for _, reply in results if reply.outcome == "served"]
    first, whole = ([getattr(reply, key) for reply in replies] for key in ("first_s", "whole_s"))
    failed = [reply.error for _, reply in results if reply.outcome == "failed"]
    return {
        "machine": machine_name(),
        "users": arguments.users,
        "seconds": round(took, 1),
        "tokens": arguments.tokens,
        "think_s": THINK_S,
        "requests": len(results),
        "served": len(replies),
        "refused": sum(reply.outcome == "refused" for _, reply in results),
        "failed": len(failed),
        "failures": failed[:5],
        "differing": sum(reply.text != alone[n].text for n, reply in results if reply.outcome == "served"),
        "first_token_s": percentiles(first),
        "reply_s": percentiles(whole),
        "alone_first_token_s": percentiles([reply.first_s for reply in alone]),
        "alone_reply_s": percentiles([reply.whole_s for reply in alone]),
        "tokens_per_s": round(sum(reply.n_tokens for reply in replies) / took, 1),
        "alone_tokens_per_s": round(sum(r.n_tokens for r in alone) / sum(r.whole_s for r in alone), 1),
        "memory_mb": {"before": round(before / 1e6), "after": round(after / 1e6)},
    }


async def user(
    http: httpx.AsyncClient, requests: list[Request], rng: random.Random, end: float
) -> list[tuple[int, Reply]]:
    """Send requests until `end`; return the number of each, and its reply."""
    results = []
    await asyncio.sleep(rng.uniform(0, THINK_S[1]))  # so that the users do not start at the same time
    while time.perf_counter() < end:
        n = rng.randrange(len(requests))
        results.append((n, await ask(http, requests[n])))
        await asyncio.sleep(rng.uniform(*THINK_S))
    return results


async def ask(http: httpx.AsyncClient, request: Request) -> Reply:
    """Send one request and read its stream to the end."""
    begun = time.perf_counter()
    try:
        joined = await http.post("call/generate", json={"data": list(request)})
        if joined.status_code == 503 and "Queue is full" in joined.text:
            return Reply("refused")
        event, first = joined.raise_for_status().json()["event_id"], 0.0
        async with http.stream("GET", f"call/generate/{event}") as stream:
            async for kind, data in events(stream.raise_for_status()):
                if kind == "error" or not data:
                    return Reply("failed", error=f"{kind}: {data}")
                answer = data[0]
                text = answer["samples"][0]["text"]
                first = first or (time.perf_counter() - begun if text else 0.0)
                if answer["finished"]:
                    whole = time.perf_counter() - begun
                    return Reply("served", first, whole, request.max_tokens, text)
    except httpx.HTTPError as error:
        return Reply("failed", error=repr(error))
    return Reply("failed", error="the stream ended before the reply did")


async def events(stream: httpx.Response) -> AsyncIterator[tuple[str, Any]]:
    """Yield kind and data of each event of a stream, except heartbeats."""
    kind = ""
    async for line in stream.aiter_lines():
        if line.startswith("event: "):
            kind = line.removeprefix("event: ")
        elif line.startswith("data: ") and kind != "heartbeat":
            yield kind, json.loads(line.removeprefix("data: "))


def percentiles(seconds: list[float]) -> dict[str, float]:
    """Median, 95th percentile and maximum; empty for fewer than two values."""
    if len(seconds) < 2:
        return {}
    cuts = statistics.quantiles(seconds, n=20, method="inclusive")
    return {"p50": round(cuts[9], 2), "p95": round(cuts[18], 2), "max": round(max(seconds), 2)}


def print_table(report: dict[str, Any]) -> None:
    print(f"\n{report['users']} users on {report['machine']}, {report['seconds']} s, {report['tokens']} tokens a reply")
    for key in ("requests", "served", "refused", "failed", "differing", "tokens_per_s", "alone_tokens_per_s"):
        print(f"{key.replace('_', ' '):22} {report[key]:>10,}")
    for key in ("first_token_s", "reply_s", "alone_first_token_s", "alone_reply_s", "memory_mb"):
        values = "  ".join(f"{name} {value:,}" for name, value in report[key].items())
        print(f"{key.replace('_', ' '):22} {values}")


if __name__ == "__main__":
    main()
