"""Data sets and models of a small Hub of our own: what is read, resumed downloads, the cache, and what is refused."""

import hashlib
import json
import os
import re
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote, urlsplit

import pytest
import yaml
from fixtures_tokenizer import corpus_config

from tests.small_models import save_published

ROOT = Path(__file__).parents[2]
COMMIT, OLD = "c" * 40, "0" * 40
LONG = b"a line of a long text\n" * (1 << 20)  # 22 MiB: huggingface_hub keeps what it has received in parts of 10 MiB
BREAK_AT = 15 << 20  # bytes after which the connection ends
FILES = {
    "README.md": b"a card",
    ".gitattributes": b"",
    "dataset_infos.json": b"{}",
    "data/train-00000-of-00002.csv": b"poem,n\nfirst,1\n",
    "data/train-00001-of-00002.csv": b"poem,n\nsecond,2\n",
    "data/test-00000-of-00001.csv": b"poem,n\nthird,3\n",
    "raw/a[1].txt": b"fourth",
    "raw/more/b.txt": b"fifth",
}
REPOS = {
    ("poets/poems", COMMIT): FILES,
    ("poets/poems", OLD): {"raw/a.txt": b"before"},
    ("poets/stories", COMMIT): {"train.txt": b"one", "train.csv": b"text\ntwo\n", "LICENSE": b"free"},
    ("poets/long", COMMIT): {"long.txt": LONG},
    ("poets/none", COMMIT): {"image.png": b"\x89PNG"},
}
REVISIONS = {"main": COMMIT, "v1": OLD, "refs/pr/1": OLD, COMMIT: COMMIT, OLD: OLD}
FAULTS = {"poets/gated": (403, "GatedRepo"), "poets/missing": (404, "RepoNotFound")}


class Hub(BaseHTTPRequestHandler):
    """The requests that huggingface_hub makes for a download; a reply ends after BREAK_AT bytes."""

    def do_HEAD(self) -> None:
        self.do_GET(head=True)

    def do_GET(self, head: bool = False) -> None:
        self.server.seen.append((self.command, self.path, self.headers))
        path = unquote(urlsplit(self.path).path)
        if not (
            found := re.fullmatch(r"(?:(?:/api)?/datasets|/api/models)?/(\w+/\w+)/(revision|tree|resolve)/(.+)", path)
        ):
            return self.answer(404, b"{}", head)
        repo, kind, rest = found.groups()
        if repo in FAULTS:
            return self.answer(FAULTS[repo][0], b"{}", head, **{"X-Error-Code": FAULTS[repo][1]})
        commit = next((REVISIONS[name] for name in REVISIONS if rest == name or rest.startswith(f"{name}/")), None)
        if (repo, commit) not in REPOS:
            return self.answer(404, b"{}", head, **{"X-Error-Code": "RevisionNotFound"})
        files = REPOS[repo, commit]
        if kind == "revision":
            return self.answer(200, json.dumps({"id": repo, "sha": commit, "siblings": []}).encode(), head)
        if kind == "tree":
            found = [{"type": "file", "path": name, "size": len(files[name]), "oid": "1" * 40} for name in files]
            return self.answer(200, json.dumps(found).encode(), head)
        name = rest.removeprefix(f"{commit}/")
        begin = int(re.search(r"\d+", self.headers.get("Range", "bytes=0-"))[0])
        etag = {"ETag": f'"{hash(name) & 0xFFFF:x}"', "X-Repo-Commit": commit, "Accept-Ranges": "bytes"}
        if begin:
            etag["Content-Range"] = f"bytes {begin}-{len(files[name]) - 1}/{len(files[name])}"
        return self.answer(206 if begin else 200, files[name][begin:], head, **etag)

    def answer(self, status: int, body: bytes, head: bool, **headers: str) -> None:
        self.send_response(status)
        for key, value in {"Content-Length": len(body), "Content-Type": "application/json", **headers}.items():
            self.send_header(key, str(value))
        self.end_headers()
        if not head:
            self.wfile.write(body[:BREAK_AT])

    def log_message(self, *args: object) -> None:
        pass


@pytest.fixture(scope="module")
def hub():
    with ThreadingHTTPServer(("127.0.0.1", 0), Hub) as server:
        server.seen = []
        threading.Thread(target=server.serve_forever, args=(0.01,)).start()
        yield server
        server.shutdown()


SCRIPT = """
import json, sys
from pipeline.data.remote import fetch_hub
from pipeline.system.errors import InputError
for source in sys.argv[1:]:
    try:
        print(json.dumps([path.read_bytes()[:9].decode() for path in fetch_hub(source).values()]))
    except InputError as error:
        print(json.dumps(str(error)))
"""


@pytest.fixture(name="run")
def _run(hub, tmp_path):
    """Runs Python with arguments in the environment of a user of the Hub, and returns its output."""

    def run(*arguments: str, **environment: str) -> str:
        hub.seen.clear()
        home = {"HF_HOME": str(tmp_path / "home"), "HF_ENDPOINT": f"http://127.0.0.1:{hub.server_port}"}
        done = subprocess.run(
            [sys.executable, *arguments],
            cwd=tmp_path,
            env={**os.environ, "PYTHONPATH": str(ROOT), "HF_TOKEN": "secret", **home, **environment},
            capture_output=True,
            text=True,
            timeout=60,
            check=True,
        )
        assert done.stderr == ""  # no progress bars without a terminal
        assert "secret" not in done.stdout
        return done.stdout

    return run


@pytest.fixture(name="fetched")
def _fetched(run):
    """Fetches sources; returns the beginning of each file of a source, or the error."""

    def fetched(*paths: str, **environment: str) -> list[list[str] | str]:
        said = run("-c", SCRIPT, *(f"hf://datasets/poets/{path}" for path in paths), **environment)
        return [json.loads(line) for line in said.splitlines() if line.startswith(("[", '"'))]

    return fetched


def test_the_stage_reads_a_data_set_when_a_mirror_names_it(run, hub, tmp_path):
    gone, good = "hf://datasets/poets/missing", "hf://datasets/poets/poems"
    sha256 = hashlib.sha256(FILES["data/train-00000-of-00002.csv"] + FILES["data/train-00001-of-00002.csv"]).hexdigest()
    config = corpus_config(gone, good, sha256=sha256, column="poem")
    (tmp_path / "params.yaml").write_text(yaml.safe_dump({"corpus": config.model_dump()}))
    said = run("-m", "stages.download")
    assert f"skipped: could not download {gone}: there is no such data set" in said
    assert f"{good}: 2 files of commit {COMMIT}\n" in said
    assert (tmp_path / "data/corpus.txt").read_bytes() == b"first\0second"
    files = [headers for _, path, headers in hub.seen if "/resolve/" in path]
    assert {headers["Authorization"] for headers in files} == {"Bearer secret"}
    assert all("gpt2-to-target" in headers["User-Agent"] for headers in files)


def test_a_revision_is_a_branch_a_tag_a_commit_or_a_pull_request(fetched):
    revisions = ["v1", "refs/pr/1", "refs%2Fpr%2F1", OLD]
    assert fetched(*(f"poems@{name}/raw/*" for name in revisions)) == [["before"]] * 4
    assert fetched("poems@main/raw/a[[]1].txt", "poems/raw/a[1].txt") == [["fourth"]] * 2


def test_a_download_resumes_where_the_connection_ended(fetched, hub, tmp_path):
    assert fetched("long") == [["a line of"]]
    ranges = [headers["Range"] for method, path, headers in hub.seen if method == "GET" and "/resolve/" in path]
    assert ranges == [None, f"bytes={10 << 20}-"]
    (file,) = tmp_path.glob("home/hub/*/snapshots/*/long.txt")
    assert file.read_bytes() == LONG


def test_a_filled_cache_needs_no_hub_and_an_incomplete_one_is_named(fetched, hub, tmp_path):
    offline, second = {"HF_HUB_OFFLINE": "1"}, "poems/data/train-00001-of-00002.csv"
    assert fetched(second) == [["poem,n\nse"]]
    alone, some, none = fetched(second, "poems", "stories/train.txt", **offline)
    assert alone == ["poem,n\nse"]
    for said in (some, none):
        assert re.search(r": the Hub cannot be reached \(.*\), and the cache in /.*/home/hub lacks files of it$", said)
    both = [["poem,n\nfi", "poem,n\nse"]]
    assert fetched("poems") == both
    assert fetched("poems", **offline) == fetched("poems", HF_ENDPOINT="http://127.0.0.1:1") == both
    for listing in tmp_path.glob("home/hub/*/trees/*.json"):
        listing.unlink()  # as in a cache that another program has filled
    assert fetched("poems", **offline) == both
    assert hub.seen == []


REFUSED = {
    "gated": "accept its terms at http://127.*/datasets/poets/gated, then run `hf auth login` or set HF_TOKEN",
    "missing": "there is no such data set, or it is private: check its name, `hf auth login` or HF_TOKEN",
    "poems@v9": "poems@v9: the data set has no such revision",
    "none": "none has no texts and no tables: name a file, a folder or a glob of it, as in hf://datasets/poets/none/",
    "stories/*.md": "matches no file: it has LICENSE, train.csv, train.txt",
    "a--b": "could not download hf://datasets/poets/a--b: Cannot have -- or ..",
}


def test_what_cannot_be_downloaded_is_named_in_one_line(fetched):
    for said, message in zip(fetched(*REFUSED), REFUSED.values(), strict=True):
        assert re.search(message, said)
        assert "\n" not in said


WEIGHTS = """
import json, sys
from pathlib import Path
from pipeline.model.published import origin_of, write_weights
from pipeline.model.published_files import find_published
from pipeline.system.errors import InputError
for name in sys.argv[1:]:
    try:
        found = find_published(name)
        write_weights(found, Path("init"))
        print(json.dumps([found.download_bytes, found.shape["n_embd"], origin_of(Path("init"))]))
    except InputError as error:
        print(json.dumps(str(error)))
"""


def test_published_weights_are_downloaded_once_and_then_need_no_network(run, hub, tmp_path, monkeypatch):
    save_published(folder := tmp_path / "gpt")
    files = {path.name: path.read_bytes() for path in folder.iterdir()}
    monkeypatch.setitem(REPOS, ("poets/gpt", COMMIT), {**files, "flax_model.msgpack": LONG, "onnx/model.onnx": LONG})
    pickled = {"config.json": files["config.json"], "pytorch_model.bin": b"pickle"}
    monkeypatch.setitem(REPOS, ("poets/pickled", COMMIT), pickled)

    def said(*names, **environment):
        return [json.loads(line) for line in run("-c", WEIGHTS, *names, **environment).splitlines()]

    names = ("hf://poets/gpt", "hf://poets/pickled", "hf://poets/gpt@v3", "hf://poets/gated", "hf://poets/missing")
    found, pickle, *errors = said(*names)
    assert found == [len(files["model.safetensors"]), 16, f"hf://poets/gpt@{COMMIT}"]
    assert pickle.startswith("hf://poets/pickled has its weights only as a pickle (pytorch_model.bin), which may run")
    assert [error.partition(": ")[2].partition(":")[0] for error in errors] == [
        "the model has no such revision",
        "accept its terms at http",
        "there is no such model, or it is private",
    ]
    assert "/poets/gated, then" in errors[1]
    assert not {
        name for _, path, _ in hub.seen if (name := path.rpartition("/")[2]) in ("model.onnx", "pytorch_model.bin")
    }
    offline = {"HF_HUB_OFFLINE": "1"}
    assert said("hf://poets/gpt", **offline) == [[0, *found[1:]]]
    (error,) = said("hf://poets/gpt@v1", **offline)
    assert error.startswith("could not download hf://poets/gpt@v1: the Hub cannot be reached")
