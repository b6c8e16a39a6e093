"""The app's API: its endpoints, many users at once, wrong and hostile requests."""

import os
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any
from uuid import uuid4

import gradio as gr
import httpx
import psutil
import pytest
from fixtures_app import PATIENCE_S, SLOW_S, Stub, _at_full_speed, _page, _source, _version, ask, event, free_port  # noqa: F401 (fixtures)
from gradio_client import Client

from pipeline.model.sampling import Sampling
from tests.waiting import wait_until
from webapp.model_source import Served

ROOT = Path(__file__).parents[2]
HOSTILE = [
    "",
    "x" * 1_000_000,
    "First Citizen:\n" * 60,
    "<|endoftext|>",
    "🙂👩‍👩‍👧",
    "a\x00b",
    "\ud800",
    "<script>alert(1)</script><img src=x onerror=alert(2)>",
    "{{value}} ${1+1} `",
]


@pytest.fixture(scope="module")
def client(page: gr.Blocks) -> Client:
    return Client(page.local_url, verbose=False)


@pytest.fixture
def served(source: Stub) -> Served:
    return source.current()


# the API


def test_the_api_writes_what_the_model_writes(client, served):
    answer = client.predict("First Citizen:\nBefore we", 10, 0, api_name="/generate")
    sample = answer["samples"][0]
    expected = served.generator.text("First Citizen:\nBefore we", Sampling.of(max_tokens=10, temperature=0))
    assert "First Citizen:\nBefore we" + sample["text"] == expected
    assert (answer["model"], answer["finished"], sample["novelty"]) == ("parrot version 7", True, 0)
    assert sample["passages"][0]["place"] == 0


def test_the_api_streams(client, source):
    source.watched.delay_s = 0.03
    job = client.submit("All:", 40, api_name="/generate")
    answers = list(job)
    assert len(answers) > 3
    lengths = [len(answer["samples"][0]["text"]) for answer in answers]
    assert lengths == sorted(lengths)
    assert [answer["finished"] for answer in answers][-2:] == [False, True]


def test_the_api_tells_what_may_follow(client):
    answer = client.predict("First Citizen:\nBefore we proceed any", 3, api_name="/next_token")
    assert answer["tokens"][0]["text"] == " further"
    assert len(answer["tokens"]) == 3
    assert answer["context_times"] == 1


def test_the_endpoints_are_documented_and_no_others_are(client):
    documented = client.view_api(return_format="dict")["named_endpoints"]
    assert set(documented) == {"/generate", "/next_token"}
    assert "novelty" in documented["/generate"]["description"]
    assert [p["parameter_name"] for p in documented["/next_token"]["parameters"]] == ["prompt", "most"]


def test_the_client_example_runs(page):
    done = subprocess.run(
        [sys.executable, ROOT / "examples" / "client.py", page.local_url], capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 0, done.stderr
    assert "tokens/s" in done.stdout


def test_the_client_example_says_where_nothing_answers():
    client = [sys.executable, ROOT / "examples" / "client.py", "127.0.0.1:9"]  # the port of "discard"
    done = subprocess.run(client, capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stdout) == (1, "")
    assert (
        done.stderr
        == "error: nothing answers at http://127.0.0.1:9: start the app with `make app`, or name another address\n"
    )


@pytest.mark.security
@pytest.mark.parametrize("prompt", HOSTILE, ids=range(len(HOSTILE)))
def test_any_prompt_is_answered_or_refused_in_words(page, prompt):
    answers = ask(page, event(page, "generate"), [prompt, 5, 0.8, 0, 1.0, 1.0, 1, 0])
    nexts = ask(page, event(page, "next_token"), [prompt, 5])
    if len(prompt) > 10_000:
        assert answers["output"]["error"] == nexts["output"]["error"]
        assert "the prompt has 1,000,000 characters: give 10,000 at most" in answers["output"]["error"]
    else:
        assert answers["output"]["data"][0]["finished"]
        assert len(nexts["output"]["data"][0]["tokens"]) == 5


@pytest.mark.security
@pytest.mark.parametrize("value", [-1, 1e9, 3.7, float("nan"), None, "many", [], {}, True, "1e400"])
@pytest.mark.parametrize("name", ["max_tokens", "temperature", "top_k", "top_p", "samples", "seed"])
def test_any_number_is_used_or_refused_in_words(page, client, name, value):
    names = ["prompt", "max_tokens", "temperature", "top_k", "top_p", "repetition_penalty", "samples", "seed"]
    values = dict(zip(names, ["All:", 3, 0.8, 0, 1.0, 1.0, 1, 0], strict=True)) | {name: value}
    answer = ask(page, event(page, "generate"), list(values.values()))
    if not answer["success"]:
        assert name in answer["output"]["error"] or "must be a text or a number" in answer["output"]["error"]
        assert "\n" not in answer["output"]["error"]
    else:
        assert value is True or (name, value) in [("temperature", 3.7), ("seed", 1e9)]


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("v2/generate", {"prompt": "All:", "length": 3}),
        ("v2/generate", {"max_tokens": 3}),
        ("v2/x", {"prompt": "All:"}),
        ("x", {"data": []}),
    ],
)
def test_a_call_that_no_endpoint_takes_is_refused_in_words(page, path, body):
    answer = httpx.post(f"{page.local_url}gradio_api/call/{path}", json=body)
    assert (answer.status_code, "see /gradio_api/openapi.json" in answer.text) == (400, True)


def test_temperature_0_is_greedy(client):
    answers = [client.predict("All:", 10, 0, seed=seed, api_name="/generate") for seed in (1, 2)]
    assert answers[0]["samples"][0]["text"] == answers[1]["samples"][0]["text"]


@pytest.mark.security
def test_no_event_of_the_page_lets_an_error_through(page, capfd):
    """Whatever is sent: an answer, or words; never a traceback, of which the reader would see `Error` alone."""
    junk: list[Any] = [None, "x", -1, 1e300, [1], {"a": 1}, "\ud800", "9" * 30, "<b>"]
    for number, fn in page.fns.items():
        if fn.fn is None:
            continue
        for n, value in enumerate(junk):
            data = [value if n % 2 else junk[(n + i) % len(junk)] for i in range(len(fn.inputs))]
            answer = ask(page, number, data, {"version": "7", "place": value, "length": value, "token": value})
            if not answer["success"]:
                assert answer["output"]["error"], (fn.name, data)
                refused = answer["output"].get("title") == "Not possible" or answer.get("status") == 400
                assert refused, (fn.name, data, answer)
    assert "Traceback" not in capfd.readouterr().err


# many users


def test_a_user_who_stops_ends_no_other_stream(page, source):
    source.watched.delay_s = SLOW_S
    one, other = (Client(page.local_url, verbose=False) for _ in range(2))
    stopped, going_on = (each.submit("All:", 200, 0, api_name="/generate") for each in (one, other))
    assert source.watched.opens(2)
    next(stopped)  # by now the client knows what to cancel
    stopped.cancel()
    assert source.watched.opens(1)
    source.watched.delay_s = 0.0
    assert going_on.result(timeout=60)["finished"]


def stop(page: gr.Blocks, source: Stub) -> float:
    """Begin a stream and stop it; return when."""
    job = Client(page.local_url, verbose=False).submit("All:", 1000, 0, api_name="/generate")
    assert source.watched.opens(1)
    next(job)
    stopped = time.monotonic()
    job.cancel()
    return stopped


def leave(page: gr.Blocks, source: Stub) -> float:
    """Begin a stream and read no more of it; return since when."""
    number, session = event(page, "generate"), uuid4().hex
    with httpx.Client(base_url=f"{page.local_url}gradio_api/", timeout=60) as http:
        data = ["All:", 1000, 0.8, 0, 1.0, 1.0, 1, 0]
        http.post("queue/join", json={"fn_index": number, "data": data, "session_hash": session})
        with http.stream("GET", "queue/data", params={"session_hash": session}) as stream:
            next(stream.iter_lines())
            assert source.watched.opens(1)
            return time.monotonic()


@pytest.mark.parametrize("end", [stop, leave])
def test_a_user_who_stops_or_leaves_ends_the_stream_within_a_second(page, source, end):  # E6
    source.watched.delay_s = SLOW_S
    lasted = []
    for _ in range(3):  # the best counts: others use this machine too
        ended = end(page, source)
        assert source.watched.opens(0)
        lasted.append(time.monotonic() - ended)
    assert min(lasted) < 1


def test_of_fifty_users_each_gets_their_own_answer_or_is_told_to_wait(page, source):
    source.watched.delay_s = SLOW_S
    number = event(page, "generate")

    def answer(n: int) -> dict[str, Any]:
        answered = ask(page, number, ["All:", 12, 1.5, 0, 1.0, 1.0, 1, n])
        source.watched.delay_s = 0.0  # the first to be answered is told that the queue is full
        return answered

    with ThreadPoolExecutor(50) as pool:
        answers = list(pool.map(answer, range(50)))
    refused = [each for each in answers if not each["success"]]
    assert all("Queue is full" in each["output"]["error"] for each in refused)
    assert 0 < len(refused) < 50
    alone = source.current().generator
    for n, each in enumerate(answers):
        if each["success"]:
            sample = each["output"]["data"][0]["samples"][0]
            expected = alone.text("All:", Sampling.of(max_tokens=12, temperature=1.5, seed=n))
            assert (sample["seed"], "All:" + sample["text"]) == (n, expected)


@pytest.fixture(scope="module")
def app(version: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[str, psutil.Process, Path]]:
    """`app.py` on its own, with all in its environment that tells Gradio to open up: address, process, what it said."""
    said = tmp_path_factory.mktemp("app") / "said"
    known = {key: os.environ[key] for key in ("PATH", "HOME") if key in os.environ}
    command = [sys.executable, ROOT / "app.py", "--folder", version, "--port", str(port := free_port())]
    with said.open("w") as out:
        process = subprocess.Popen(command, env=known | OPENING, cwd=said.parent, stdout=out, stderr=out)
    url = f"http://127.0.0.1:{port}/"
    try:
        assert wait_until(lambda: process.poll() is not None or answers(url), 300)
        yield url, psutil.Process(process.pid), said
    finally:
        process.terminate()
        process.wait(60)


OPENING = {
    "GRADIO_SHARE": "True", "GRADIO_SERVER_NAME": "0.0.0.0", "GRADIO_ALLOWED_PATHS": "/", "GRADIO_MCP_SERVER": "True",
    "GRADIO_ROOT_PATH": "http://evil.example", "GRADIO_SSR_MODE": "True", "GRADIO_LOCAL_DEV_MODE": "1",
    "GRADIO_WATCH_DIRS": "/", "GRADIO_VIBE_MODE": "1", "GRADIO_DEBUG": "1", "GRADIO_NUM_WORKERS": "2",
    "GRADIO_RUN_HISTORY": "True", "GRADIO_PROFILING": "1", "GRADIO_ANALYTICS_ENABLED": "True", "SPACE_ID": "you/page",
    "GRADIO_SERVER_PORT": "7777", "GRADIO_DEFAULT_CONCURRENCY_LIMIT": "none",
}  # fmt: skip


def answers(url: str) -> bool:
    try:
        return httpx.get(f"{url}config").status_code == 200
    except httpx.TransportError:
        return False


@pytest.mark.slow
@pytest.mark.security
def test_nothing_in_the_environment_opens_the_app(app):  # E8
    url, process, said = app
    listening = [c.laddr for one in (process, *process.children(recursive=True)) for c in one.net_connections("tcp")
                 if c.status == "LISTEN"]  # fmt: skip
    assert [f"http://{address.ip}:{address.port}/" for address in listening] == [url]
    config = httpx.get(f"{url}config").json()
    assert (config["dev_mode"], config["vibe_mode"], config["root"]) == (False, False, url.rstrip("/"))
    for path in ("file=/etc/passwd", "mcp/", "vibe-code/", "profiling/summary", "runs"):
        assert httpx.get(f"{url}gradio_api/{path}").status_code == 404, path
    assert httpx.get(url, headers={"origin": "null"}).status_code == 403
    assert "access-control-allow-origin" not in httpx.get(url).headers
    assert said.read_text() == f"parrot version 7: {url.rstrip('/')}\n"


@pytest.mark.slow
def test_five_hundred_requests_leave_memory_flat(app):  # E5
    """10 MB is 20 KB for each, less than the messages of one reply: 30 tokens, sent anew with each that is added."""
    url, process, _ = app

    def used(n_requests: int) -> int:
        with httpx.Client(base_url=f"{url}gradio_api/", timeout=60) as http:
            for n in range(n_requests):
                asked = http.post("call/generate", json={"data": ["All:", 30, 0.8, 0, 1.0, 1.0, 1, n]})
                reply = http.get(f"call/generate/{asked.json()['event_id']}").text
                assert "event: complete" in reply
        return int(process.memory_info().rss)

    before, after = used(100), used(500)  # the first hundred fill what is filled once
    print(f"{before / 1e6:.1f} MB, then {after / 1e6:.1f}")
    assert after - before < 10e6


# who may ask for what


@pytest.mark.security
def test_the_served_page_refuses_strangers_uploads_and_files(page):  # E8; test_request_filter has all cases
    assert httpx.get(page.local_url).status_code == 200
    for headers in ({"host": "rebound.example"}, {"origin": "https://evil.example"}):
        assert httpx.get(page.local_url, headers=headers).status_code == 403
    for path in ("gradio_api/upload", "upload"):
        assert httpx.post(page.local_url + path, files={"files": ("a.txt", b"x")}).status_code == 404
    for path in ("gradio_api/file=/etc/passwd", "gradio_api/proxy=http://127.0.0.1:1/x", "monitoring"):
        assert httpx.get(page.local_url + path).status_code == 404


@pytest.mark.security
def test_nobody_gets_past_the_queue(page):  # E5
    for path in ("run/generate", "run/predict", "api/generate", "run/predict/"):
        asked = {"data": ["All:", 3, 0.8, 0, 1.0, 1.0, 1, 0], "fn_index": event(page, "generate")}
        assert httpx.post(f"{page.local_url}gradio_api/{path}", json=asked).status_code == 404
    assert not page.api_open


@pytest.mark.security
def test_a_body_too_large_is_refused(page):
    def endless():
        for _ in range(40):
            yield b"x" * 2**20

    url, kind = f"{page.local_url}gradio_api/queue/join", {"content-type": "application/json"}
    assert httpx.post(url, content=b"x" * (17 * 2**20), headers=kind).status_code == 413
    try:
        status = httpx.post(url, content=endless(), headers=kind, timeout=60).status_code
    except httpx.TransportError:
        status = 0  # hung up on
    assert status in (0, 413)


@pytest.mark.security
def test_it_listens_on_this_machine_alone_and_is_shared_with_nobody(page):
    assert not page.share
    assert page.share_url is None
    port = page.server_port
    addresses = {
        c.laddr.ip for c in psutil.Process().net_connections("tcp") if c.status == "LISTEN" and c.laddr.port == port
    }
    assert addresses == {"127.0.0.1"}


@pytest.mark.security
def test_the_page_may_load_nothing_from_elsewhere(page):
    answer = httpx.get(page.local_url)
    assert "default-src 'self'" in answer.headers["content-security-policy"]
    assert "http" not in answer.headers["content-security-policy"]
    config = httpx.get(f"{page.local_url}config").json()
    assert config["analytics_enabled"] is False


@pytest.mark.security
def test_a_token_can_be_appended_to_any_prompt(page):
    append = next(number for number, fn in page.fns.items() if fn.name == "append")
    answer = ask(page, append, ["a\ud800"], {"token": 25})
    assert answer["output"]["data"][0] == "a\ufffd:"


def test_a_passage_opens_in_the_text_of_the_version_that_wrote_it(page):
    opened = next(number for number, fn in page.fns.items() if fn.name == "opened")
    assert ask(page, opened, [], {"version": "6", "place": 0, "length": 3})["success"]
    answer = ask(page, opened, [], {"version": "5", "place": 0, "length": 3})
    assert "version '5' is not here" in answer["output"]["error"]
