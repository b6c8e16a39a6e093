"""A registered version as MLflow stores it: no pickle, and `mlflow models serve` answers as the model does."""

import json
import os
import re
import subprocess
import sys
import urllib.error
import urllib.request
from pathlib import Path
from uuid import uuid4

import mlflow.pyfunc
import pandas as pd
import pytest
from fixtures_mlflow import root_of, trained_project
from fixtures_registry import _keep_threads, save_small_model, serving  # noqa: F401 (a fixture)

from pipeline.config.sections import RegistryConfig
from pipeline.data.openings import openings
from pipeline.data.token_files import TokenFolder
from pipeline.model.generator import load_generator
from pipeline.model.sampling import Sampling
from pipeline.registry.catalog import find_version, open_version
from pipeline.registry.register import register
from pipeline.system.host import SOURCE_ROOT

PROMPTS = ["ROMEO:", "Thou – art é"]
IMPORTS = """if True:
    import sys
    from pathlib import Path
    from pipeline.model.sampling import Sampling
    from pipeline.registry import pyfunc
    print("torch" in sys.modules)
    from pipeline.model.generator import load_generator
    load_generator(Path(sys.argv[1])).text("ROMEO:", Sampling(max_tokens=5))
    print({"torch", "torch._dynamo", "sympy"} & sys.modules.keys())
    """


@pytest.fixture(scope="module")
def champion(store, bpe, tmp_path_factory):
    """The name of a model whose champion is small, but real."""
    project = trained_project(tmp_path_factory.mktemp("served") / "project")
    (project / "models" / "model" / "manifest.json").unlink()
    save_small_model(project / "models" / "model", bpe)
    config = RegistryConfig(model=f"served-{uuid4().hex[:8]}", max_target_loss=0.1)
    assert register(root_of(store), project, config)["champion"]
    return config.model


@pytest.fixture(scope="module")
def server(store, champion, tmp_path_factory):
    """Address of MLflow's own server for the champion."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("MLFLOW", "DVC"))}
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    environment |= {"PATH": path, "MLFLOW_TRACKING_URI": store.uri, "OMP_NUM_THREADS": "1"}
    command = ["-m", "mlflow", "models", "serve", "-m", f"models:/{champion}@champion", "--env-manager", "local"]
    with serving(command, "/ping", tmp_path_factory.mktemp("server"), environment) as (address, _):
        yield address


def ask(server, prompts, params):
    """Status and JSON of the server's answer."""
    body = json.dumps({"dataframe_split": {"columns": ["prompt"], "data": [[p] for p in prompts]}, "params": params})
    request = urllib.request.Request(f"{server}/invocations", body.encode(), {"Content-Type": "application/json"})
    try:
        with urllib.request.urlopen(request, timeout=120) as answer:
            return answer.status, json.load(answer)
    except urllib.error.HTTPError as error:
        return error.code, json.load(error)


def test_mlflow_loads_the_registered_files_which_hold_no_pickle(store, champion, monkeypatch):
    files = open_version(store, find_version(store, champion, "champion")).parent
    names = [path.relative_to(files).as_posix() for path in files.rglob("*") if path.is_file()]
    assert not [name for name in names if name.endswith((".pkl", ".pickle", ".pt", ".pth", ".pyc"))]
    assert {"artifacts/params.yaml", "artifacts/tokens/train-00000.bin", "code/pipeline/model/gpt.py"} <= set(names)
    assert "code/pipeline/report/templates/model_card.md.j2" in names
    requirements = (files / "requirements.txt").read_text()
    assert "torch==" in requirements
    assert "cloudpickle" not in requirements
    assert "+" not in requirements  # no package index has a local suffix such as +cpu

    monkeypatch.setenv("MLFLOW_TRACKING_URI", store.uri)
    served, generator = mlflow.pyfunc.load_model(f"models:/{champion}@candidate"), load_generator(files / "artifacts")
    sampled = {"max_tokens": 5, "temperature": 1.0, "seed": 3}
    expected = [generator.text(prompt, Sampling(**sampled)) for prompt in PROMPTS]
    assert served.predict(pd.DataFrame({"prompt": PROMPTS}), params=sampled) == expected
    assert served.metadata.get_input_schema().input_names() == ["prompt"]
    text = TokenFolder(files / "artifacts" / "tokens").train
    assert list(served.input_example["prompt"]) == openings(text, generator.tokenizer, 1)


def test_saving_a_version_does_not_import_torch_nor_loading_one_its_compiler(store, champion):
    folder = open_version(store, find_version(store, champion, "champion"))
    done = subprocess.run([sys.executable, "-c", IMPORTS, folder], capture_output=True, text=True, timeout=120)
    assert done.stdout.splitlines() == ["False", "{'torch'}"], done.stderr


def test_the_server_answers_as_the_model_does_and_refuses_invalid_parameters(server, champion, store):
    generator = load_generator(open_version(store, find_version(store, champion, "champion")))
    unstopped = generator.text(PROMPTS[0], Sampling(max_tokens=20, temperature=1.5))
    stop = unstopped[len(PROMPTS[0]) + 3 :][:2]
    assert len(generator.text(PROMPTS[0], Sampling(max_tokens=20, temperature=1.5, stop=[stop]))) < len(unstopped)
    for params in (
        {},  # the defaults
        {"max_tokens": 5, "temperature": 0.0},
        {"max_tokens": 20, "temperature": 1.5, "top_k": 10, "seed": 7},  # beyond the model's 16 positions
        {"max_tokens": 20, "temperature": 1.5, "top_k": 10, "seed": 8},
        {"max_tokens": 0},
        {"max_tokens": 20, "temperature": 1.5, "stop": [stop]},
    ):
        expected = [generator.text(prompt, Sampling(**params)) for prompt in PROMPTS]
        assert ask(server, PROMPTS, params) == (200, {"predictions": expected})
    for name, value in (("temperature", float("nan")), ("temperature", None), ("max_tokens", "many"), ("top_k", -1)):
        status, answer = ask(server, PROMPTS, {name: value})
        assert 400 <= status < 500, answer
        assert name in json.dumps(answer)
        assert "Traceback" not in json.dumps(answer)
    status, answer = ask(server, ["ROMEO:", None], {})
    assert (status, "prompt 2 of 2 is null" in answer["message"], "Traceback" in str(answer)) == (400, True, False)
    assert ask(server, ["ROMEO:"], {"max_tokens": 0}) == (200, {"predictions": ["ROMEO:"]})


def test_the_request_in_the_guide_is_answered(server):
    guide = (SOURCE_ROOT / "docs/guides/serving.md").read_text()
    body = re.search(r"/invocations.*?-d '(.*?)'", guide, re.DOTALL)[1]
    request = json.loads(body)
    prompts = [row[0] for row in request["dataframe_split"]["data"]]
    status, answer = ask(server, prompts, request["params"])
    assert status == 200
    assert answer["predictions"][0].startswith("ROMEO:")
