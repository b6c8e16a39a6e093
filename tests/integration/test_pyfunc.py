"""`mlflow models serve` and `mlflow.pyfunc.load_model` answer for a registered version."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path
from uuid import uuid4

import mlflow.pyfunc
import pandas as pd
import pytest
import torch
from fixtures_mlflow import root_of, trained_project

from pipeline.config.sections import ModelConfig, RegistryConfig
from pipeline.data.vocab import Vocabulary
from pipeline.model.gpt import GPT
from pipeline.model.weights import save_model
from pipeline.registry.register import register

pytestmark = pytest.mark.slow
PROMPTS = ["ROMEO:", "Thou – art é"]
START_S, ANSWER_S = 300, 120  # generous: a busy machine starts a server in half a minute


@pytest.fixture(scope="module")
def champion(store, bpe, tmp_path_factory):
    """The name of a model whose champion is tiny, but real."""
    project = trained_project(tmp_path_factory.mktemp("served") / "project")
    torch.manual_seed(0)
    shape = ModelConfig(n_layer=1, n_head=1, n_embd=4, block_size=16, vocab_size=50257, dropout=0.0, fold_vocab=False)
    save_model(project / "models" / "model", GPT(shape, Vocabulary.full(50257)), bpe)
    config = RegistryConfig(model=f"served-{uuid4().hex[:8]}", max_target_loss=0.1)
    assert register(root_of(store), project, config)["champion"]
    return config.model


@pytest.fixture(scope="module")
def server(store, champion, tmp_path_factory):
    """Address of MLflow's own server of the champion, which is on the loopback alone and ends with the tests."""
    folder = tmp_path_factory.mktemp("server")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    inherited = {name: value for name, value in os.environ.items() if not name.startswith(("MLFLOW", "DVC"))}
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    command = [sys.executable, "-m", "mlflow", "models", "serve", "-m", f"models:/{champion}@champion"]
    with (folder / "log").open("w") as log:
        process = subprocess.Popen(
            [*command, "--env-manager", "local", "--host", "127.0.0.1", "--port", str(port)],
            cwd=folder,
            env={**inherited, "PATH": path, "MLFLOW_TRACKING_URI": store.uri, "OMP_NUM_THREADS": "1"},
            stdout=log,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
    try:
        address = f"http://127.0.0.1:{port}"
        wait_for(f"{address}/ping", process, folder / "log")
        yield address
    finally:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait(30)


def wait_for(address, process, log):
    end = time.monotonic() + START_S
    while time.monotonic() < end and process.poll() is None:
        try:
            with urllib.request.urlopen(address, timeout=5):
                return
        except OSError:
            time.sleep(0.5)
    pytest.fail(f"no server: {log.read_text()[-2000:]}")


def ask(server, prompts, params):
    """Status and JSON of the server's answer."""
    body = json.dumps({"dataframe_split": {"columns": ["prompt"], "data": [[p] for p in prompts]}, "params": params})
    request = urllib.request.Request(f"{server}/invocations", body.encode(), {"Content-Type": "application/json"})
    try:
        with urllib.request.urlopen(request, timeout=ANSWER_S) as answer:
            return answer.status, json.load(answer)
    except urllib.error.HTTPError as error:
        return error.code, json.load(error)


@pytest.mark.parametrize(
    "params",
    [
        {"max_tokens": 5, "temperature": 0.0},
        {"max_tokens": 20, "temperature": 1.5, "top_k": 10, "seed": 7},  # past the 16 positions that the model has
    ],
)
def test_the_server_answers_as_the_loaded_champion_does(server, champion, store, params, monkeypatch):
    monkeypatch.setenv("MLFLOW_TRACKING_URI", store.uri)
    loaded = mlflow.pyfunc.load_model(f"models:/{champion}@champion")
    expected = loaded.predict(pd.DataFrame({"prompt": PROMPTS}), params=params)
    assert ask(server, PROMPTS, params) == (200, {"predictions": expected})
    assert all(text.startswith(prompt) and text != prompt for text, prompt in zip(expected, PROMPTS, strict=True))


def test_the_seed_decides_what_is_drawn(server):
    texts = [ask(server, PROMPTS, {"max_tokens": 10, "temperature": 1.0, "seed": seed}) for seed in (1, 1, 2)]
    assert texts[0] == texts[1] != texts[2]


def test_without_parameters_the_defaults_hold(server):
    status, answer = ask(server, ["ROMEO:"], {})
    assert (status, len(answer["predictions"])) == (200, 1)


@pytest.mark.security
@pytest.mark.parametrize(
    "params",
    [
        {"temperature": -1.0},
        {"temperature": float("nan")},
        {"temperature": None},
        {"max_tokens": -1},
        {"max_tokens": "many"},
        {"top_k": -1},
    ],
)
def test_a_bad_parameter_is_refused_and_the_server_goes_on(server, params):
    status, answer = ask(server, ["ROMEO:"], params)
    assert 400 <= status < 500, answer
    assert next(iter(params)) in json.dumps(answer)  # the reason, by name
    assert ask(server, ["ROMEO:"], {"max_tokens": 0}) == (200, {"predictions": ["ROMEO:"]})
