"""The app's API: its endpoints, many users at once, wrong and hostile requests."""

import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import gradio as gr
import httpx
import psutil
import pytest
from fixtures_app import FACTS, LINES, WINDOW, Stub, _at_full_speed, _page, _source, _version, ask, event  # noqa: F401 (fixtures)
from gradio_client import Client

from pipeline.sampling import Sampling
from webapp.source import Served

ROOT = Path(__file__).parent.parent
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
        assert name in answer["output"]["error"]
        assert "\n" not in answer["output"]["error"]
    else:
        assert value is True or (name, value) in [("temperature", 3.7), ("seed", 1e9)]


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
                assert answer["output"].get("title") == "Not possible", (fn.name, data, answer)
    assert "Traceback" not in capfd.readouterr().err


# many users


def test_a_user_who_stops_ends_no_other_stream(page, source):
    source.watched.delay_s = 0.02
    one, other = (Client(page.local_url, verbose=False) for _ in range(2))
    stopped, going_on = (each.submit("All:", 100, 0, api_name="/generate") for each in (one, other))
    assert source.watched.open_within(2, 10)
    next(stopped)  # by now the client knows what to cancel
    stopped.cancel()
    assert source.watched.open_within(1, 1)
    assert going_on.result(timeout=30)["finished"]


def test_a_user_who_leaves_ends_the_stream(page, source):
    source.watched.delay_s = 0.02
    number = event(page, "generate")
    with httpx.Client(base_url=f"{page.local_url}gradio_api/", timeout=30) as http:
        data = ["All:", 1000, 0.8, 0, 1.0, 1.0, 1, 0]
        http.post("queue/join", json={"fn_index": number, "data": data, "session_hash": "leaves"})
        with http.stream("GET", "queue/data", params={"session_hash": "leaves"}) as stream:
            next(stream.iter_lines())
            assert source.watched.open_within(1, 5)
    assert source.watched.open_within(0, 1.5)  # a second, and the time to say so


def test_of_fifty_users_each_gets_their_own_answer_or_is_told_to_wait(page, source):
    source.watched.delay_s = 0.005
    number = event(page, "generate")

    def answer(n: int) -> dict[str, Any]:
        return ask(page, number, ["All:", 12, 1.5, 0, 1.0, 1.0, 1, n])

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


@pytest.mark.slow
def test_five_hundred_requests_leave_memory_flat(page):
    number = event(page, "generate")

    def used() -> int:
        for n in range(250):
            assert ask(page, number, ["All:", 3, 0.8, 0, 1.0, 1.0, 1, n])["success"]
        return int(psutil.Process().memory_info().rss)

    before, after = used(), used()
    assert after - before < 20e6


# who may ask for what


@pytest.mark.security
@pytest.mark.parametrize(
    "path",
    [
        "gradio_api/file=/etc/passwd", "gradio_api/file/etc/passwd", "gradio_api/file=pyproject.toml",
        "file=/etc/passwd", "gradio_api/file=http://127.0.0.1:1/", "gradio_api/proxy=http://127.0.0.1:1/x", "gradio_api/proxy=https://a.hf.space/",
        "gradio_api/upload_progress?upload_id=1", "gradio_api/component_server", "gradio_api/vibe-code/",
        "gradio_api/run-history/records", "gradio_api/runs", "monitoring", "monitoring/summary", "gradio_api/deep_link",
        "gradio_api/token", "login", "docs", "static/../../etc/passwd", "assets/..%2f..%2f..%2fpyproject.toml",
        "gradio_api/custom_component/1/client/component/index.js", "gradio_api/stream/a/b/1/playlist.m3u8", "pwa_icon",
    ],
)  # fmt: skip
def test_files_proxy_and_all_else_that_gradio_offers_are_closed(page, path):
    for method in ("GET", "POST", "HEAD"):
        assert httpx.request(method, page.local_url + path).status_code in (403, 404, 405), method


@pytest.mark.security
def test_nothing_can_be_uploaded(page):
    for path in ("gradio_api/upload", "gradio_api/upload/", "upload"):
        answer = httpx.post(page.local_url + path, files={"files": ("a.txt", b"x")})
        assert answer.status_code == 404


@pytest.mark.security
@pytest.mark.parametrize(
    ("headers", "status"),
    [
        ({}, 200),
        ({"host": "localhost:7860"}, 200),
        ({"host": "[::1]:7860"}, 200),
        ({"host": "rebound.example"}, 403),
        ({"host": "127.0.0.1.example"}, 403),
        ({"host": ""}, 403),
        ({"origin": "http://localhost:1"}, 200),
        ({"origin": "https://evil.example"}, 403),
        ({"origin": "null"}, 403),
        ({"origin": "http://localhost.evil.example"}, 403),
        ({"origin": "http://[::1"}, 403),
    ],
)
def test_only_this_machine_may_ask(page, headers, status):
    for path in ("config", ""):
        assert httpx.get(page.local_url + path, headers=headers).status_code == status


@pytest.mark.security
def test_a_body_too_large_is_refused_before_it_is_read(page):
    def endless():
        for _ in range(40):
            yield b"x" * 2**20

    url = f"{page.local_url}gradio_api/queue/join"
    assert httpx.post(url, content=b"x" * (17 * 2**20)).status_code == 413
    try:
        status = httpx.post(url, content=endless(), timeout=20).status_code
    except httpx.TransportError:
        status = 0  # hung up on
    assert status in (0, 400, 413, 422, 500)


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
