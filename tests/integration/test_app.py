"""The served page and its API: right and wrong requests, several users, strangers, and a real registry."""

import json
import re
import runpy
import shutil
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any
from uuid import uuid4

import gradio as gr
import httpx
import pytest
from fixtures_app import PROMPT, _page, _served, _slow, _source, _version, ask, event  # noqa: F401 (fixtures)
from fixtures_mlflow import root_of, trained_project
from gradio_client import Client

from pipeline.config.sections import RegistryConfig
from pipeline.model.sampling import Sampling
from pipeline.registry.register import register
from tests.waiting import wait_until
from webapp.registry_source import Registry
from webapp.tabs.about import about_html
from webapp.tabs.training import run_html

ROOT = Path(__file__).parents[2]
JSON = {"content-type": "application/json"}


@pytest.fixture(scope="module")
def client(page: gr.Blocks) -> Client:
    return Client(page.local_url, verbose=False)


# the API


def test_the_api_streams_the_models_text(client, source, served, monkeypatch):
    monkeypatch.setattr(source.watched, "delay_s", 0.03)
    answers = list(client.submit(PROMPT, 40, 0, seed=1, api_name="/generate"))
    (last,) = answers[-1]["samples"]
    assert PROMPT + last["text"] == served.generator.text(PROMPT, Sampling.of(max_tokens=40, temperature=0, seed=2))
    assert (answers[-1]["model"], last["seed"], last["passages"][0]["place"]) == ("parrot version 7", 1, 0)
    assert len(answers) > 3
    lengths = [len(answer["samples"][0]["text"]) for answer in answers]
    assert lengths == sorted(lengths)
    assert [answer["finished"] for answer in answers][-2:] == [False, True]


def test_the_two_endpoints_are_documented_and_work(client):
    documented = client.view_api(return_format="dict")["named_endpoints"]
    assert set(documented) == {"/generate", "/next_token"}
    assert "novelty" in documented["/generate"]["description"]
    assert [p["parameter_name"] for p in documented["/next_token"]["parameters"]] == ["prompt", "most", "part"]
    answer = client.predict("First Citizen:\nBefore we proceed any", 3, api_name="/next_token")
    assert answer["tokens"][0]["text"] == " further"
    assert (len(answer["tokens"]), answer["context_times"]) == (3, 1)


def test_the_client_example_runs_or_says_that_nothing_answers(page, monkeypatch, capsys):
    example = str(ROOT / "examples" / "client.py")
    monkeypatch.setattr(sys, "argv", [example, page.local_url])
    runpy.run_path(example)
    assert "tokens/s" in capsys.readouterr().out
    monkeypatch.setattr(sys, "argv", [example, "127.0.0.1:9"])  # the port of "discard"
    with pytest.raises(SystemExit) as end:
        runpy.run_path(example)
    assert end.value.code.startswith("error: nothing answers at http://127.0.0.1:9: start the app")


def test_wrong_values_are_refused_in_one_line(page, capfd):  # E2, E3; test_page_parts has all cases
    def generate(prompt: Any, max_tokens: Any) -> dict[str, Any]:
        return ask(page, event(page, "generate"), [prompt, max_tokens, 0.8, 0, 1.0, 1.0, 1, 0])

    assert generate("a\ud800\x00", 3)["output"]["data"][0]["finished"]
    too_long = "the prompt has 1,000,000 characters: give 10,000 at most"
    for prompt, max_tokens, words in (
        ("x" * 1_000_000, 3, too_long),
        ("All:", float("nan"), "max_tokens nan"),
        ("All:", [], "string or a number"),
    ):
        answer = generate(prompt, max_tokens)
        assert not answer["success"]
        assert words in answer["output"]["error"]
        assert "\n" not in answer["output"]["error"]
    assert "Traceback" not in capfd.readouterr().err


def test_a_call_with_too_few_values_is_refused_in_one_line(page, capfd):
    for name in ("generate", "update"):
        answer = ask(page, event(page, name), [])
        assert (answer["success"], "data has 0 values" in answer["output"]["error"]) == (False, True)
    assert capfd.readouterr().err == ""


def test_an_unknown_event_is_refused_in_a_stream_that_ends(page, capfd):
    for path in ("call/generate/nothing", "call/v2/generate/nothing"):
        assert "404" in httpx.get(f"{page.local_url}gradio_api/{path}").text
    assert "Traceback" not in capfd.readouterr().err


def test_the_refusal_of_a_wrong_body_names_a_call_that_works(page):
    url = f"{page.local_url}gradio_api/call/"
    refused = httpx.post(f"{url}generate", json={"data": "All:"}).json()["detail"]
    body, path = re.search(r"POST (\{.*\}) to /gradio_api/call/(\S+)", refused).groups()
    called = httpx.post(f"{url}{path}", content=body, headers=JSON).json()
    answer = httpx.get(f"{url}{path}/{called['event_id']}", timeout=60).text
    assert "event: complete" in answer


def test_a_call_of_no_endpoint_is_refused(page):
    for path, body in (
        ("call/v2/generate", {"prompt": "All:", "length": 3}),
        ("call/x", {"data": []}),
        ("queue/join", {"fn_index": "\ud800", "data": []}),
    ):
        answer = httpx.post(f"{page.local_url}gradio_api/{path}", content=json.dumps(body), headers=JSON)
        assert (answer.status_code, "see /gradio_api/openapi.json" in answer.text) == (400, True), (path, body)


# several users


def test_a_user_who_stops_or_leaves_ends_only_their_own_stream(page, slow):  # E6
    one, other = (Client(page.local_url, verbose=False) for _ in range(2))
    stopped, kept = (each.submit("All:", 500, 0, api_name="/generate") for each in (one, other))
    assert slow.opens(2)
    next(stopped)  # from now on the client can cancel
    stopped.cancel()
    assert slow.opens(1)
    body = {
        "fn_index": event(page, "generate"),
        "data": ["All:", 500, 0.8, 0, 1.0, 1.0, 1, 0],
        "session_hash": "leaves",
    }
    with httpx.Client(base_url=f"{page.local_url}gradio_api/", timeout=60) as http:
        http.post("queue/join", json=body)
        with http.stream("GET", "queue/data", params={"session_hash": "leaves"}) as answer:
            next(answer.iter_lines())
            assert slow.opens(2)
    assert slow.opens(1)
    slow.delay_s = 0.0
    assert kept.result(timeout=60)["finished"]


def test_of_sixty_users_each_gets_their_own_answer_or_is_told_that_the_queue_is_full(page, slow, served):  # E5
    def answer(n: int) -> dict[str, Any]:
        answered = ask(page, event(page, "generate"), ["All:", 6, 1.5, 0, 1.0, 1.0, 1, n])
        slow.delay_s = 0.0  # the first to be answered is refused, since the queue is full
        return answered

    with ThreadPoolExecutor(60) as pool:  # 16 are served and 30 wait
        answers = list(pool.map(answer, range(60)))
    refused = [each for each in answers if not each["success"]]
    assert all("Queue is full" in each["output"]["error"] for each in refused)
    assert 0 < len(refused) < 60
    for n, each in enumerate(answers):
        if each["success"]:
            sample = each["output"]["data"][0]["samples"][0]
            expected = served.generator.text("All:", Sampling.of(max_tokens=6, temperature=1.5, seed=n))
            assert (sample["seed"], "All:" + sample["text"]) == (n, expected)


# strangers


def test_the_served_page_refuses_strangers_files_and_ways_past_the_queue(page):  # E5, E8; test_request_filter has all
    answer = httpx.get(page.local_url)
    policy = answer.headers["content-security-policy"]
    assert (answer.status_code, "default-src 'self'" in policy, "http" in policy) == (200, True, False)
    assert httpx.get(f"{page.local_url}config").json()["analytics_enabled"] is False
    for headers in ({"host": "rebound.example"}, {"origin": "https://evil.example"}):
        assert httpx.get(page.local_url, headers=headers).status_code == 403
    for path in ("gradio_api/file=/etc/passwd", "gradio_api/proxy=http://127.0.0.1:1/x", "monitoring"):
        assert httpx.get(page.local_url + path).status_code == 404
    assert httpx.post(f"{page.local_url}gradio_api/upload", files={"files": ("a.txt", b"x")}).status_code == 415
    assert httpx.post(f"{page.local_url}gradio_api/upload", json={}).status_code == 404
    assert httpx.post(f"{page.local_url}gradio_api/queue/join", content=b"x" * 2**21, headers=JSON).status_code == 413
    values = {"data": ["All:", 3, 0.8, 0, 1.0, 1.0, 1, 0], "fn_index": event(page, "generate")}
    for path in ("run/generate", "run/predict", "api/generate", "run/predict/"):
        assert httpx.post(f"{page.local_url}gradio_api/{path}", json=values).status_code == 404
    assert not page.api_open


# a real registry


def test_a_real_champion_is_served_and_followed(store, version, tmp_path):  # E1, E7
    config = RegistryConfig(model=f"app-{uuid4().hex[:8]}", max_target_loss=0.1)

    def add(loss: float) -> None:
        project = trained_project(tmp_path / str(loss), loss=loss)
        shutil.rmtree(project / "models" / "model")
        shutil.copytree(version / "model", project / "models" / "model")
        assert register(root_of(store), project, config)["champion"]

    add(0.09)
    registry = Registry(root_of(store), config.model, "champion")
    assert registry.current().info["aliases"] == ["candidate", "champion", "champion-sliding"]
    add(0.08)
    assert wait_until(lambda: registry.current().label == f"{config.model} version 2", 60)
    assert registry.versions() == ["2", "1"]
    assert registry.open("1").info["metrics"]["sliding_loss"] == 0.09
    assert "Gradient norm" in run_html(registry.current())
    assert "What it is not" in about_html(registry.current())
