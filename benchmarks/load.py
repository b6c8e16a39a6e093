"""Load test of the API: what batching gains, requests served and refused, latency, and memory under many users.

    python -m benchmarks.load [--users 50] [--seconds 120] [--batch 16] [--precision fp32] [--project FOLDER]

Starts `app.py` of this checkout on a free port, with the champion of the project in FOLDER. Requests are streams of
`/v1/completions`. First, `--rounds` times in turn: `--batch` requests one after the other, and then all at once; the
median of the ratios of their tokens/s is what continuous batching gains. Then each user sends a request, reads the
stream to its end, pauses for some seconds, and repeats. A user pauses too when the queue is full. Prompts, seeds and
pauses are sampled from one seed.

A reply among others must have the same text as alone, if the model runs in fp32. In bf16 the last bit depends on the
batch: the number of differing replies is reported. Users and server share the cores of this machine. The exit code is 1
if a reply failed, or differed in fp32.
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
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import httpx
import psutil

from benchmarks.throughput import machine_name

ROOT = Path(__file__).parent.parent
PROMPTS = ("First Citizen:\n", "ROMEO:\n", "JULIET:\nO ", "KING RICHARD III:\n", "To be, or not to be", "What say you")
N_REQUESTS = 16  # different ones
THINK_S = (1.0, 5.0)  # between a reply and the next request, uniformly distributed
TIMEOUT_S = 300.0  # of a stream without data, which then counts as failed


class Request(NamedTuple):
    prompt: str
    max_tokens: int
    seed: int


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
    parser.add_argument("--batch", type=int, default=16, help="requests at once, compared with one after the other")
    parser.add_argument("--rounds", type=int, default=3, help="how often these two are compared")
    parser.add_argument("--precision", default="auto", help="of the model: auto, fp32 or bf16")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--json", type=Path, default=ROOT / "benchmarks" / "results" / "load.json")
    arguments = parser.parse_args()
    rng = random.Random(arguments.seed)  # noqa: S311 (no secret)
    n = max(N_REQUESTS, arguments.batch)
    requests = [Request(rng.choice(PROMPTS), arguments.tokens, rng.randrange(10**6)) for _ in range(n)]
    with served(arguments.project, arguments.precision) as (url, server):
        report = asyncio.run(load(url, server, requests, arguments))
    print_table(report)
    arguments.json.write_text(json.dumps(report, indent=1) + "\n")
    sys.exit(report["failed"] > 0 or (report["differing"] > 0 and report["precision"] == "fp32"))


@contextmanager
def served(project: Path, precision: str) -> Iterator[tuple[str, psutil.Process]]:
    """Start the app; yield its address and process once it answers. It writes to our stdout and stderr."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    command = [sys.executable, ROOT / "app.py", "--port", str(port), "--precision", precision]
    process = subprocess.Popen(command, cwd=project, env=environment)
    url = f"http://127.0.0.1:{port}/"
    try:
        while True:
            try:
                httpx.get(f"{url}health")
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
        precision = (await http.get("health")).json()["precision"]
        await ask(http, requests[0])  # the first request compiles kernels
        rounds = [await compare(http, server, requests[: arguments.batch]) for _ in range(arguments.rounds)]
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
    at_once = [reply for each in rounds for reply in each.at_once]
    return {
        "machine": machine_name(),
        "precision": precision,
        "users": arguments.users,
        "seconds": round(took, 1),
        "tokens": arguments.tokens,
        "think_s": THINK_S,
        "batch": arguments.batch,
        "ratios": [round(each.ratio, 2) for each in rounds],
        "cpu_ratio": round(statistics.median(each.cpu_ratio for each in rounds), 2),
        "ratio": round(statistics.median(each.ratio for each in rounds), 2),
        "alone_tokens_per_s": round(statistics.median(each.alone_tokens_per_s for each in rounds), 1),
        "batch_tokens_per_s": round(statistics.median(each.tokens_per_s for each in rounds), 1),
        "batch_first_token_s": percentiles([reply.first_s for reply in at_once]),
        "batch_differing": sum(reply.text != alone[n].text for each in rounds for n, reply in enumerate(each.at_once)),
        "requests": len(results),
        "served": len(replies),
        "refused": sum(reply.outcome == "refused" for _, reply in results),
        "failed": len(failed) + sum(reply.outcome != "served" for reply in at_once),
        "failures": failed[:5],
        "differing": sum(reply.text != alone[n].text for n, reply in results if reply.outcome == "served"),
        "first_token_s": percentiles(first),
        "reply_s": percentiles(whole),
        "alone_first_token_s": percentiles([reply.first_s for reply in alone]),
        "alone_reply_s": percentiles([reply.whole_s for reply in alone]),
        "tokens_per_s": round(sum(reply.n_tokens for reply in replies) / took, 1),
        "memory_mb": {"before": round(before / 1e6), "after": round(after / 1e6)},
    }


class Comparison(NamedTuple):
    """The same requests one after the other, and all at once."""

    alone_tokens_per_s: float
    tokens_per_s: float
    cpu_ratio: float  # of the tokens per second of the server's processor time
    at_once: list[Reply]

    @property
    def ratio(self) -> float:
        return self.tokens_per_s / self.alone_tokens_per_s


async def compare(http: httpx.AsyncClient, server: psutil.Process, requests: list[Request]) -> Comparison:
    begun, cpu_begun = time.perf_counter(), cpu_s(server)
    alone = [await ask(http, request) for request in requests]
    between, cpu_between = time.perf_counter(), cpu_s(server)
    at_once = await asyncio.gather(*(ask(http, request) for request in requests))
    ended, cpu_ended = time.perf_counter(), cpu_s(server)
    n_alone, n_at_once = (sum(reply.n_tokens for reply in replies) for replies in (alone, at_once))
    cpu_ratio = n_at_once / (cpu_ended - cpu_between) / (n_alone / (cpu_between - cpu_begun))
    return Comparison(n_alone / (between - begun), n_at_once / (ended - between), cpu_ratio, at_once)


def cpu_s(process: psutil.Process) -> float:
    """Processor time so far; its ratios say the same beside other programs."""
    times = process.cpu_times()
    return float(times.user + times.system)


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
    body = request._asdict() | {"temperature": 0.8, "stream": True, "stream_options": {"include_usage": True}}
    first, text, n_tokens = 0.0, "", 0
    try:
        async with http.stream("POST", "v1/completions", json=body) as stream:
            if stream.status_code == 429:
                return Reply("refused")
            async for line in stream.raise_for_status().aiter_lines():
                if not line.startswith("data: ") or line == "data: [DONE]":
                    continue
                event = json.loads(line.removeprefix("data: "))
                if "error" in event:
                    return Reply("failed", error=event["error"]["message"])
                text += "".join(choice["text"] for choice in event["choices"])
                first = first or (time.perf_counter() - begun if text else 0.0)
                if event["usage"]:
                    n_tokens = event["usage"]["completion_tokens"]
            if not n_tokens:
                return Reply("failed", error="the stream ended before the reply did")
            return Reply("served", first, time.perf_counter() - begun, n_tokens, text)
    except httpx.HTTPError as error:
        return Reply("failed", error=repr(error))


def percentiles(seconds: list[float]) -> dict[str, float]:
    """Median, 95th percentile and maximum; empty for fewer than two values."""
    if len(seconds) < 2:
        return {}
    cuts = statistics.quantiles(seconds, n=20, method="inclusive")
    return {"p50": round(cuts[9], 2), "p95": round(cuts[18], 2), "max": round(max(seconds), 2)}


def print_table(report: dict[str, Any]) -> None:
    print(f"\n{report['machine']}, {report['precision']}, {report['tokens']} tokens a reply")
    print(f"\n{report['batch']} requests at once against one after the other: {report['ratios']}")
    for key in ("ratio", "cpu_ratio", "alone_tokens_per_s", "batch_tokens_per_s", "batch_differing"):
        print(f"{key.replace('_', ' '):22} {report[key]:>10,}")
    print(f"{'batch first token s':22} {report['batch_first_token_s']}")
    print(f"\n{report['users']} users for {report['seconds']} s")
    for key in ("requests", "served", "refused", "failed", "differing", "tokens_per_s"):
        print(f"{key.replace('_', ' '):22} {report[key]:>10,}")
    for key in ("first_token_s", "reply_s", "alone_first_token_s", "alone_reply_s", "memory_mb"):
        values = "  ".join(f"{name} {value:,}" for name, value in report[key].items())
        print(f"{key.replace('_', ' '):22} {values}")


if __name__ == "__main__":
    main()
