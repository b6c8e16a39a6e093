"""The OpenAI protocol as its clients use it: the openai package, lm-eval, several users, bad bodies, an API key."""

import json
import os
import re
import signal
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import gradio as gr
import httpx
import openai
import pytest
from fixtures_app import LINES, PROMPT, WINDOW, _page, _served, _slow, _source, _version, free_port, running  # noqa: F401 (fixtures)
from openai import OpenAI

from pipeline.model.sampling import Sampling
from tests.waiting import wait_until
from webapp import engine as engine_module
from webapp.server import make_app

APP = Path(__file__).parents[2] / "app.py"
GREEDY = Sampling(max_tokens=40, temperature=0)


@pytest.fixture(scope="module")
def client(page: gr.Blocks) -> OpenAI:
    return OpenAI(base_url=f"{page.local_url}v1", api_key="none", max_retries=0)


@pytest.fixture
def http(page):
    with httpx.Client(base_url=page.local_url, timeout=60) as http:
        yield http


# the openai package


def test_a_completion_is_the_models_text(client, served):
    for model in ("parrot", "parrot@7", "parrot@champion", "champion", "7"):
        answer = client.completions.create(model=model, prompt=PROMPT, max_tokens=40, temperature=0)
        (choice,) = answer.choices
        assert PROMPT + choice.text == served.generator.text(PROMPT, GREEDY)
        assert (answer.model, choice.finish_reason) == ("parrot@7", "length")
    n_prompt = len(served.tokenizer.encode(PROMPT))
    usage = answer.usage
    assert (usage.prompt_tokens, usage.completion_tokens, usage.total_tokens) == (n_prompt, 40, n_prompt + 40)
    assert client.completions.create(model="6", prompt="All:", max_tokens=1).model == "parrot@6"


def test_a_stream_gives_the_same_text_in_pieces_and_its_usage_at_the_end(client, served, slow):
    slow.delay_s = 0.06  # longer than the time between two chunks
    chunks = list(
        client.completions.create(
            model="parrot", prompt=PROMPT, max_tokens=40, temperature=0, stream=True,
            stream_options={"include_usage": True},
        )
    )  # fmt: skip
    assert PROMPT + "".join(chunk.choices[0].text for chunk in chunks[:-1]) == served.generator.text(PROMPT, GREEDY)
    assert [chunk.choices[0].finish_reason for chunk in chunks[:-1]] == [*[None] * (len(chunks) - 2), "length"]
    assert len(chunks) > 3
    assert (chunks[-1].choices, chunks[-1].usage.completion_tokens, chunks[0].usage) == ([], 40, None)
    assert len({chunk.id for chunk in chunks}) == 1


def test_choices_have_the_seeds_after_the_first_and_a_list_of_prompts_the_texts_of_each_alone(client, served):
    def ask(prompt: Any, n: int = 1) -> list[str]:
        answer = client.completions.create(
            model="parrot", prompt=prompt, n=n, seed=5, max_tokens=20, temperature=2.0, extra_body={"top_k": 40}
        )
        assert [choice.index for choice in answer.choices] == list(range(len(answer.choices)))
        return [choice.text for choice in answer.choices]

    def alone(prompt: str, seed: int) -> str:
        sampling = Sampling(max_tokens=20, temperature=2.0, top_k=40, seed=seed)
        return served.generator.text(prompt, sampling).removeprefix(prompt)

    expected = [alone(prompt, seed) for prompt in ("All:", "the") for seed in (5, 6)]
    ids = [served.tokenizer.encode(prompt) for prompt in ("All:", "the")]
    assert len(set(expected)) > 2  # the seeds of a prompt that the model knows well may agree
    assert ask(["All:", "the"], n=2) == ask(ids, n=2) == expected
    assert ask("All:", n=2) == ask(ids[0], n=2) == expected[:2]
    unseeded = {  # the model does not know this prompt
        client.completions.create(model="parrot", prompt="1066 and", temperature=2, max_tokens=60).choices[0].text
        for _ in "123456"
    }
    assert len(unseeded) > 1  # without a seed, each answer has its own


def test_a_stop_text_ends_a_choice(client, served):
    whole = served.generator.text(PROMPT, GREEDY)[len(PROMPT) :]
    for stop in ("hear", ["☃", "hear"]):
        answer = client.completions.create(model="parrot", prompt=PROMPT, max_tokens=40, temperature=0, stop=stop)
        assert (answer.choices[0].text, answer.choices[0].finish_reason) == (whole.partition("hear")[0], "stop")


def test_log_probabilities_are_those_of_the_model(client, served):
    ids = served.tokenizer.encode(LINES)[:12]
    answer = client.completions.create(model="parrot", prompt=ids[:6], max_tokens=6, temperature=0, logprobs=3)
    found = answer.choices[0].logprobs
    assert found.tokens == [served.tokenizer.decode([i]) for i in ids[6:]]  # it recites
    losses = served.generator.token_losses(ids)
    assert [-p for p in found.token_logprobs] == pytest.approx(losses[5:], abs=1e-4)
    assert [len(top) for top in found.top_logprobs] == [3] * 6
    assert all(max(top, key=top.get) == token for top, token in zip(found.top_logprobs, found.tokens, strict=True))
    text = answer.choices[0].text
    assert [text[offset:].startswith(token) for offset, token in zip(found.text_offset, found.tokens, strict=True)]


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("max_tokens", [0, 3])
def test_echo_scores_the_prompt(http, served, stream, max_tokens):
    ids = served.tokenizer.encode(LINES)[: WINDOW + 1]  # one window, whose losses our own function has as well
    text = served.tokenizer.decode(ids)
    body = {"prompt": text, "max_tokens": max_tokens, "temperature": 0, "logprobs": 1, "echo": True, "stream": stream}
    answer = http.post("v1/completions", json=body)
    events = [line.removeprefix("data: ") for line in answer.text.splitlines() if line.startswith("data: {")]
    bodies = [json.loads(each) for each in events] if stream else [answer.json()]
    choices = [choice for each in bodies for choice in each["choices"]]
    found = {key: [value for choice in choices for value in choice["logprobs"][key]] for key in choices[0]["logprobs"]}
    assert "".join(choice["text"] for choice in choices).startswith(text)
    assert found["tokens"][: len(ids)] == [served.tokenizer.decode([i]) for i in ids]
    assert len(found["tokens"]) == len(ids) + max_tokens
    assert found["token_logprobs"][0] is found["top_logprobs"][0] is None
    losses = served.generator.token_losses(ids)
    assert [-p for p in found["token_logprobs"][1 : len(ids)]] == pytest.approx(losses, abs=1e-4)
    assert found["text_offset"] == sorted(found["text_offset"])


def test_an_echoed_prompt_that_begins_within_a_character_has_the_offsets_of_its_text(client, served):
    (half,) = (i for i in range(300) if served.tokenizer.decode_bytes([i]) == b"\xa9")
    prompt = [half, *served.tokenizer.encode("All:")]
    (choice,) = client.completions.create(model="parrot", prompt=prompt, max_tokens=0, echo=True, logprobs=0).choices
    assert choice.text == "\ufffdAll:"
    assert choice.logprobs.text_offset == [0, 1, 4]


def test_models_are_listed_by_number_and_alias(client):
    assert [model.id for model in client.models.list()] == ["parrot", "parrot@champion", "parrot@7", "parrot@6"]
    assert client.models.retrieve("parrot@champion").id == client.models.retrieve("champion").id == "parrot@champion"
    with pytest.raises(openai.NotFoundError, match="choose one of parrot, parrot@champion"):
        client.models.retrieve("parrot@8")


def test_errors_are_those_that_the_client_knows(client):
    for values, error, param in (
        ({"model": "other"}, openai.NotFoundError, "model"),
        ({"extra_body": {"colour": "red"}}, openai.BadRequestError, "colour"),
        ({"n": 0}, openai.BadRequestError, "n"),
        ({"prompt": [0] * 7_000, "n": 3, "echo": True, "logprobs": 0}, openai.BadRequestError, "logprobs"),
    ):
        with pytest.raises(error) as refused:
            client.completions.create(**{"model": "parrot", "prompt": "All:", **values})
        assert (refused.value.param, "\n" in refused.value.message) == (param, False)
    with pytest.raises(openai.NotFoundError, match="/v1/completions"):
        client.chat.completions.create(model="parrot", messages=[{"role": "user", "content": "Hello"}])


def test_an_error_that_nobody_expects_has_openais_shape(http, monkeypatch):
    async def fails(*arguments):
        raise MemoryError

    monkeypatch.setattr("webapp.openai_api.models.Models.open", fails)
    answer = http.post("v1/completions", json={"prompt": "All:"})
    assert (answer.status_code, answer.json()["error"]["type"]) == (500, "server_error")


# lm-eval


def test_lm_eval_gets_the_loglikelihoods_of_our_own_losses(page, served, tmp_path, monkeypatch):
    lm_eval = pytest.importorskip("lm_eval", reason="lm-eval is not installed: pip install 'lm-eval[api]'")
    monkeypatch.setenv("OPENAI_API_KEY", "none")
    rows = [{"context": "All:\n", "choices": ["Speak, speak.", "Resolved."]},
            {"context": PROMPT, "choices": [" proceed any further,", " know't"]}]  # fmt: skip
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row | {"answer": 0}) + "\n" for row in rows))
    task = {
        "task": "parrot", "dataset_path": "json", "dataset_kwargs": {"data_files": str(tmp_path / "rows.jsonl")},
        "test_split": "train", "output_type": "multiple_choice", "doc_to_text": "{{context}}",
        "doc_to_choice": "{{choices}}", "doc_to_target": "{{answer}}", "target_delimiter": "",
        "metric_list": [{"metric": "acc"}],
    }  # fmt: skip
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("HF_DATASETS_OFFLINE", "1")
    arguments = f"model=parrot,base_url={page.local_url}v1/completions,tokenizer_backend=remote,max_length={WINDOW}"
    results = lm_eval.simple_evaluate(model="local-completions", model_args=arguments, tasks=[task], log_samples=True)
    encode = served.tokenizer.encode
    for sample in results["samples"]["parrot"]:
        for (got, greedy), choice in zip(sample["filtered_resps"], sample["doc"]["choices"], strict=True):
            whole, n = encode(sample["doc"]["context"] + choice), len(encode(sample["doc"]["context"]))
            assert str(greedy) == str(is_greedy(served, whole, n))
            assert float(got) == pytest.approx(-sum(served.generator.token_losses(whole)[n - 1 :]), abs=1e-4)


def is_greedy(served, ids: list[int], n: int) -> bool:
    """Whether each id from the n-th on is the most likely one."""
    return all(int(served.generator.next_tokens(ids[:i]).argmax()) == ids[i] for i in range(n, len(ids)))


@pytest.mark.parametrize(
    ("path", "body", "message"),
    [
        ("v1/completions", b'{"prompt": "\xff"}', "the body is not UTF-8"),
        ("v1/completions", b"{", "the body is not JSON"),
        ("v1/completions", b"[]", "the body is not a JSON object"),
        ("v1/completions", b"[" * 100_000, "the body is not JSON"),
        ("tokenize", b'{"prompt": 1}', "prompt: give text"),
        ("detokenize", b'{"tokens": 1}', "tokens: input should be a valid list"),
    ],
)
def test_a_body_that_cannot_be_read_is_told_in_plain_words(http, path, body, message):
    refused = http.post(path, content=body, headers={"content-type": "application/json"})
    assert (refused.status_code, refused.json()["error"]["message"]) == (400, message)


def test_a_text_is_encoded_beside_the_event_loop_and_within_the_limit_of_a_prompt(http, served, monkeypatch):
    threads, encode = [], served.tokenizer.encode
    monkeypatch.setattr(
        served.tokenizer, "encode", lambda text: (threads.append(threading.current_thread()), encode(text))[1]
    )
    ids = http.post("tokenize", json={"prompt": LINES}).json()["tokens"]
    assert http.post("detokenize", json={"tokens": ids}).json() == {"prompt": LINES}
    assert [thread.name.startswith("AnyIO worker") for thread in threads] == [True]
    refused = http.post("tokenize", json={"prompt": "a" * 160_001})
    assert (refused.status_code, refused.json()["error"]["code"]) == (400, "context_length_exceeded")


# several users


def test_the_page_and_the_api_share_a_batch_and_change_no_text(page, client, served, source):
    engine, sizes = served.engine, []
    observe = engine_module.BATCH_SIZE.observe
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(engine_module.BATCH_SIZE, "observe", lambda n: (sizes.append(n), observe(n)))
        patch.setattr(source.watched, "delay_s", 0.02)

        def by_api(seed: int) -> str:
            kwargs = {"prompt": "All:", "seed": seed, "max_tokens": 30, "temperature": 1.2}
            return client.completions.create(model="parrot", **kwargs).choices[0].text

        def by_page(seed: int) -> str:
            sampling = Sampling(max_tokens=30, temperature=1.2, seed=seed)
            return "".join(piece.text for piece in engine.stream(["All:"], sampling))

        with ThreadPoolExecutor(12) as pool:
            texts = list(pool.map(lambda n: (by_api, by_page)[n % 2](n), range(12)))
    for seed, text in enumerate(texts):
        assert "All:" + text == served.generator.text("All:", Sampling(max_tokens=30, temperature=1.2, seed=seed))
    assert max(sizes) > 6


def test_a_client_that_leaves_frees_its_place(http, slow):
    body = {"prompt": "All:", "max_tokens": 2000}
    with http.stream("POST", "v1/completions", json=body | {"stream": True}) as answer:
        lines = answer.iter_lines()
        next(lines)
        assert slow.opens(1)
    assert slow.opens(0)
    with pytest.raises(httpx.ReadTimeout):
        http.post("v1/completions", json=body, timeout=1)
    assert slow.opens(0)


def test_a_full_queue_is_told_with_the_time_to_wait(http, served, slow, monkeypatch):
    monkeypatch.setattr(served.engine, "max_waiting", 0)
    answer = http.post("v1/completions", json={"prompt": "All:"})
    assert (answer.status_code, answer.headers["retry-after"]) == (429, "2")
    assert answer.json()["error"]["code"] == "queue_full"
    assert slow.opens(0)


def test_a_request_that_takes_too_long_ends_with_an_error(http, served, slow, monkeypatch):
    monkeypatch.setattr(served.engine, "timeout_s", 0.5)
    body = {"prompt": "All:", "max_tokens": 2000}
    assert "0 s: ask for fewer tokens" in http.post("v1/completions", json=body).json()["error"]["message"]
    lines = http.post("v1/completions", json=body | {"stream": True}).text.strip().splitlines()
    assert "not finished within" in lines[-3]
    assert lines[-1] == "data: [DONE]"
    assert slow.opens(0)


# the rest of the app


def test_docs_metrics_and_health_are_there_and_load_nothing_from_elsewhere(http):
    docs = http.get("docs")
    assert "default-src 'self'" in docs.headers["content-security-policy"]
    assert "stream_options" in docs.text
    assert "src=" not in docs.text
    words = re.sub(r"\s+", " ", re.sub(r"<[^>]+>", " ", docs.text))
    for said in ("max_tokens integer (0 to 2000) 16", "logprobs integer (0 to 5) or null", "n integer (1 to 128)",
                 "temperature number (0 to 2)", "stop string or list of string (up to 4)", "include_usage (boolean",
                 f"curl {http.base_url}v1/completions"):  # fmt: skip
        assert said in words, said
    assert "422" not in http.get("openapi.json").text
    assert http.get("openapi.json").json()["paths"].keys() >= {"/v1/completions", "/v1/models", "/health", "/metrics"}
    health = {"status": "ok", "model": "parrot version 7", "running": 0, "waiting": 0}
    assert http.get("health").json().items() >= health.items()
    http.post("v1/completions", json={"prompt": "All:", "max_tokens": 2})
    metrics = http.get("metrics").text
    for name in ("requests_total", "tokens_total", "waiting_sequences", "batch_size_bucket", "first_token_seconds_sum"):
        assert f"\ntotarget_{name}" in metrics
    assert http.head("health").status_code == http.head("v1/models").status_code == 200


def test_health_counts_the_sequences_of_all_versions(http, slow):
    body = {"model": "6", "prompt": "All:", "max_tokens": 2000, "stream": True}
    with http.stream("POST", "v1/completions", json=body) as answer:
        next(answer.iter_lines())
        assert http.get("health").json()["running"] == 1
    assert wait_until(lambda: http.get("health").json()["running"] == 0, 30)


@pytest.mark.parametrize(
    ("method", "path", "status", "allow"),
    [
        ("GET", "v1/completions", 405, "POST"),
        ("POST", "v1/models", 405, "GET, HEAD"),
        ("POST", "health", 405, "GET, HEAD"),
        ("POST", "metrics", 405, "GET"),
        ("DELETE", "docs", 405, "GET"),
        ("GET", "tokenize", 405, "POST"),
        ("POST", "v1/chat/completions", 404, None),
        ("GET", "nowhere", 404, None),
        ("POST", "nowhere", 404, None),
    ],
)
def test_a_wrong_path_or_method_is_told_in_openais_shape(http, method, path, status, allow):
    refused = http.request(method, path, json={})
    assert (refused.status_code, refused.headers.get("allow")) == (status, allow)
    assert f"/{path}" in refused.json()["error"]["message"]


@pytest.mark.parametrize("path", ["v1/completions", "gradio_api/queue/join", "nowhere"])
@pytest.mark.parametrize("chunked", [False, True])
def test_a_body_that_is_too_large_is_told_in_openais_shape(http, path, chunked):
    body = b"x" * 2**21
    refused = http.post(path, content=iter([body]) if chunked else body, headers={"content-type": "application/json"})
    if path != "nowhere" or not chunked:  # of an unknown path no body is read
        assert refused.status_code == 413
        assert "1 MiB at most" in refused.json()["error"]["message"]


def test_an_api_key_is_required_of_the_api_and_of_the_page(source):
    key = "s3cret-word"
    with running(make_app(source, "127.0.0.1", key=key)) as url:
        for path in ("v1/models", "", "config", "metrics", "docs"):
            refused = httpx.get(url + path)
            assert (refused.status_code, refused.json()["error"]["code"]) == (401, "invalid_api_key"), path
            assert httpx.get(url + path, auth=("anybody", key)).status_code == 200, path
        assert httpx.get(f"{url}health").status_code == 200
        assert OpenAI(base_url=f"{url}v1", api_key=key).completions.create(model="parrot", prompt="All:").choices
        with pytest.raises(openai.AuthenticationError, match="API key"):
            OpenAI(base_url=f"{url}v1", api_key="other").models.list()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_the_server_and_tells_the_streams_that_run(version, number):
    port = str(free_port())
    command = [sys.executable, APP, "--folder", version, "--port", port]
    pipe = subprocess.PIPE
    with subprocess.Popen(command, stdout=pipe, stderr=pipe, text=True) as app, httpx.Client(timeout=60) as http:
        try:
            url = f"http://127.0.0.1:{port}/v1/completions"
            assert app.stdout
            assert "version 7" in app.stdout.readline()  # it is about to listen
            assert wait_until(lambda: answers(f"http://127.0.0.1:{port}/health"), 60)
            body = {"prompt": "All:", "max_tokens": 2000, "temperature": 2, "n": 32, "stream": True}
            with http.stream("POST", url, json=body) as answer:
                lines = answer.iter_lines()
                assert "choices" in next(lines)
                os.kill(app.pid, number)
                events = [line for line in lines if line]
            assert (app.communicate(timeout=60), app.returncode) == (("", ""), 0)
        finally:
            app.kill()
    assert "the server stops" in events[-2]
    assert events[-1] == "data: [DONE]"


def answers(url: str) -> bool:
    try:
        return httpx.get(url).status_code == 200
    except httpx.TransportError:
        return False
