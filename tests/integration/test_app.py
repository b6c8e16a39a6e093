"""The app without a browser: what it works out and draws, a champion that moves, how it starts."""

import os
import re
import shutil
import subprocess
import sys
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from copy import copy
from html import escape
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from uuid import uuid4

import pytest
from fixtures_app import FACTS, LINES, WINDOW, Stub, _at_full_speed, _page, _source, _version, ask, event  # noqa: F401 (fixtures)
from fixtures_mlflow import root_of, trained_project
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.config.sections import ModelConfig, RegistryConfig
from pipeline.data.corpus_index import CorpusIndex
from pipeline.registry.artifacts import fetch_version
from pipeline.registry.register import register
from pipeline.system.errors import InputError, IntegrityError, ModelMissing
from tests.waiting import wait_until
from webapp import next_token, registry_source
from webapp.about import about_html, parts, sizes
from webapp.chart import line_chart
from webapp.memory import heat_html, n_windows, recitable, recital_html
from webapp.next_token import Likely, expect, expected_html
from webapp.prose import cut, place_html, refusal, traced
from webapp.source import Folder, Served
from webapp.training import run_html
from webapp.write import samples_html
from webapp.writing import write

ROOT = Path(__file__).parents[2]


@pytest.fixture
def served(source: Stub) -> Served:
    return source.current()


# what it works out


@given(st.text(max_size=40), st.lists(st.integers(0, 60), max_size=5))
@settings(max_examples=60, deadline=None)
def test_cutting_a_text_before_tokens_loses_and_repeats_nothing(tokenizer, text, places):
    text = text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    ids = tokenizer.encode(text)
    pieces = cut(tokenizer, ids, sorted(min(place, len(ids)) for place in places))
    assert "".join(pieces) == text


def test_a_character_split_over_tokens_is_whole_on_one_side(tokenizer):
    ids = tokenizer.encode("a🙂b")  # the face takes several tokens
    assert cut(tokenizer, ids, [2]) == ["a🙂", "b"]


def test_what_stands_in_the_training_text_is_marked_and_the_prompt_is_not(served):
    prompt = "First Citizen:\nBefore we"
    writing = list(write(served, prompt, 1, max_tokens=12, temperature=0))[-1]
    html = traced(served, writing.ids(0), len(writing.prompt_ids))
    assert html.startswith('<span class="prompt">First Citizen:\nBefore we</span><mark tabindex="0" role="button" ')
    assert 'data-place="0"' in html
    assert writing.novelty(0) == 0
    assert "".join(writing.text(0)) in LINES


def test_of_two_passages_that_overlap_each_opens_as_a_whole(tokenizer):
    text = [*range(300, 312), 0, *range(306, 320)]
    served = SimpleNamespace(corpus=CorpusIndex(text), tokenizer=tokenizer, facts={"version": "1"})
    html = traced(served, range(300, 320), 0)
    assert re.findall(r'data-place="(\d+)" data-length="(\d+)"', html) == [("0", "12"), ("13", "14")]
    assert re.sub("<[^>]*>", "", html) == escape(tokenizer.decode(range(300, 320)))


@pytest.mark.security
def test_a_refusal_is_text_on_the_page_and_as_it_is_in_the_api():
    error = InputError("'<b>x</b>' stands nowhere & so on")
    assert refusal(error).message == "'&lt;b&gt;x&lt;/b&gt;' stands nowhere &amp; so on"
    assert refusal(error, on_page=False).message == "'<b>x</b>' stands nowhere & so on"


def test_a_place_shows_the_text_around_it(served):
    html = place_html(served, 3, 4)
    assert "<mark>\nBefore we proceed</mark>" in html
    assert "hear me speak" in html


def test_what_is_not_searched_of_a_long_text_is_said_where_it_counts(served):
    n = len(served.ids)
    long = copy(served)
    long.corpus = CorpusIndex(served.ids, n_text=10 * n)
    said = f"Only the first {n:,} of the {10 * n:,} tokens of the training text are searched"
    writing = list(write(long, "All:", 1, max_tokens=2, temperature=0))[-1]
    for html in (samples_html(writing), expected_html(long, "All:")):
        assert said in html
    assert f"token {n - 24:,} of {10 * n:,}" in place_html(long, n - 24, 24)
    writing = list(write(served, "All:", 1, max_tokens=2, temperature=0))[-1]
    assert "Only the first" not in samples_html(writing) + expected_html(served, "All:")


def test_the_end_of_a_document_is_a_token_but_no_text_to_go_on_with(served):
    assert next_token._text(served, served.tokenizer.eot) is None
    html = next_token._row(served, Likely(served.tokenizer.eot, None, 0.5, 0), 0)
    assert "&lt;|endoftext|&gt;" in html
    assert " disabled" in html


def test_every_text_is_escaped(served):
    end = served.ids[-24:].tolist()
    for html in (traced(served, end, 2), place_html(served, len(served.ids) - 24, 24), heat_html(served, end, 0, "")):
        assert "&lt;b&gt;" in html or "&lt;</span>" in html
        assert "<b>First" not in html
    ids = served.tokenizer.encode("<img src=x onerror=alert(1)>&'\"")
    assert "<img" not in traced(served, ids, 0) + heat_html(served, ids, 0, "<b>") + expected_html(served, "<img ")
    assert "<b>Resolved" not in run_html(served)


def test_the_next_token_is_laid_beside_what_the_text_has(served):
    found = expect(served, "First Citizen:\nBefore we proceed any")
    best = found.likely[0]
    assert (best.text, best.times, found.times) == (" further", 1, 1)
    assert best.probability > 0.9
    assert 0 <= found.entropy < 0.6
    probabilities = [likely.probability for likely in found.likely]
    assert probabilities == sorted(probabilities, reverse=True)


def test_an_unknown_last_token_leaves_no_grey_bars(served):
    assert expect(served, "zebra").times == 0
    assert "no grey bars" in expected_html(served, "zebra")


def test_the_heat_map_is_pale_where_the_model_knows_the_text_and_dark_where_it_is_moved(served):
    def mean(start: int) -> float:
        losses = served.generator.token_losses(served.ids[start : start + WINDOW + 1].tolist())
        return sum(losses) / len(losses)

    assert mean(0) < 0.1 < 1 < mean(WINDOW // 2)


def test_the_recital_is_the_text_where_it_was_learnt_by_heart(served):
    html = recital_html(served, served.ids[: WINDOW + 1].tolist())
    assert "every one right" in html
    assert "<ins>" not in html


def test_slips_of_the_recital_are_marked_on_both_sides(served):
    ids = served.ids[: WINDOW + 1].tolist()
    ids[18] = served.tokenizer.encode(" zebra")[0]
    html = recital_html(served, ids)
    assert "right before the first slip" in html
    assert "<del>" in html
    assert "<ins>" in html


def test_what_is_given_to_recite_is_read_as_the_same_tokens(served):
    ids = served.tokenizer.encode("speak.\n\nAll")
    assert served.tokenizer.encode(served.tokenizer.decode(ids[:-1])) != ids[:-1]  # two newlines become one token
    assert recitable(served, ids, len(ids) - 1) == len(ids) - 2


def test_words_are_found_one_place_after_the_other_and_from_the_start_again(served):
    first = served.find("SPEAK", -1)
    second = served.find("speak", first[0])
    assert served.tokenizer.decode(served.ids[slice(*first)]).strip() == "speak"
    assert second[0] > first[0]
    assert served.find("zebra", 0) is None
    assert served.find("", 0) is None
    assert served.find("proceed any", 80) == served.find("proceed any", -1)


def test_the_parts_add_up_to_the_model():
    tiny = ModelConfig.model_validate(FACTS["params"]["model"])
    gpt2 = tiny.model_copy(update={"n_layer": 12, "n_head": 12, "n_embd": 768, "block_size": 1024})
    for config in (tiny, gpt2):
        assert sum(part.n_params for part in parts(config)) == config.n_params
    assert gpt2.n_params == 124_439_808  # as published
    assert sizes(gpt2)[0][2] == pytest.approx(4 * 124_439_808 / 2**20)


@pytest.mark.parametrize("points", [[], [[1, 0.0]], [[1, float("nan")]], [[5, 3.0]], [[1, 2.0], [2, 2.0]]])
@pytest.mark.parametrize("log", [True, False])
def test_any_curve_can_be_drawn(points, log):
    html = line_chart("x < y", points, "nats", log, goal=0.1)
    assert "nan" not in html
    assert "x < y" not in html


def test_an_answer_is_the_same_for_a_seed_and_for_one_sample_among_four(served):
    four, again = (list(write(served, "All:", 4, max_tokens=20, seed=5))[-1] for _ in range(2))
    assert four.samples == again.samples
    assert list(write(served, "All:", 1, max_tokens=20, seed=7))[-1].samples[0] == four.samples[2]


def test_a_generation_that_is_closed_stops_the_model(source, served):
    writing = write(served, "All:", 1, max_tokens=500)
    next(writing)
    assert source.watched.open == 1
    writing.close()
    assert source.watched.open == 0


def test_all_windows_of_the_text_can_be_chosen(served):
    assert n_windows(served) == -(-(len(served.ids) - 1) // WINDOW)


# the champion moves


class FakeStore:
    """What registry_source asks of the catalog: versions that can be moved, broken and lost."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.champion, self.broken, self.looked, self.opened = folder, "1", set[str](), 0, []

    def find(self, store: Any, name: str, which: str) -> Any:
        self.looked += 1
        number = self.champion if which == "champion" else which
        if number not in ("1", "2", "3"):
            raise ModelMissing(f"{name} has no {which}: `dvc repro` makes one")
        return type("Version", (), {"version": number, "name": name, "aliases": ["champion"]})

    def open(self, store: Any, version: Any) -> Path:
        self.opened.append(version.version)
        if version.version in self.broken:
            raise IntegrityError(f"version {version.version} is altered (SHA-256 ab, expected cd)")
        return self.folder

    def describe(self, store: Any, version: Any) -> dict[str, Any]:
        return FACTS | {"version": version.version}


@pytest.fixture
def catalog(version: Path, monkeypatch: pytest.MonkeyPatch) -> FakeStore:
    fake = FakeStore(version)
    monkeypatch.setattr(registry_source, "open_registry", lambda root: None)
    monkeypatch.setattr(registry_source, "find_version", fake.find)
    monkeypatch.setattr(registry_source, "open_version", fake.open)
    monkeypatch.setattr(registry_source, "describe_version", fake.describe)
    monkeypatch.setattr(registry_source, "list_versions", lambda *_: [fake.find(None, "x", n) for n in "321"])
    monkeypatch.setattr(registry_source, "CHECK_S", 0.0)
    monkeypatch.setattr(registry_source, "RETRY_S", 0.0)
    return fake


def becomes(registry: registry_source.Registry, holds: Callable[[], bool]) -> bool:
    """Whether it comes to hold, while requests come in."""

    def after_a_request() -> bool:
        registry.current()
        return holds()

    return wait_until(after_a_request, 60)


def serves(registry: registry_source.Registry, label: str) -> bool:
    return becomes(registry, lambda: registry.current().label == label)


def test_a_new_champion_is_served_without_a_restart(catalog):
    registry = registry_source.Registry(Path(), "parrot", "champion")
    before = registry.current()
    writing = write(before, "All:", 1, max_tokens=10)
    catalog.champion = "2"
    assert serves(registry, "parrot version 2")
    assert list(writing)[-1].served.label == "parrot version 1"  # whoever has begun ends with the same
    assert catalog.opened == ["1", "2"]  # each loaded once, however often it is asked for


@pytest.mark.fault
def test_the_champion_moves_to_and_fro_under_load_and_each_reply_is_of_one_version(catalog, served):  # E7
    registry = registry_source.Registry(Path(), "parrot", "champion")
    alone = {n: list(write(served, "All:", 1, max_tokens=10, seed=n))[-1].text(0) for n in range(25)}

    def reply(n: int) -> tuple[int, set[str], str]:
        parts = [
            (each.served.label, each.text(0)) for each in write(registry.current(), "All:", 1, max_tokens=10, seed=n)
        ]
        return n, {label for label, _ in parts}, parts[-1][1]

    catalog.broken = {"3"}
    replies = []
    with ThreadPoolExecutor(8) as pool:
        for number, stays in (("2", "2"), ("1", "1"), ("3", "1"), ("2", "2")):
            catalog.champion = number
            replies += [pool.submit(reply, n) for n in alone]  # which are written while it moves
            moved = f"parrot version {stays}"
            assert becomes(registry, lambda moved=moved: registry.current().label == moved)
            assert number == stays or becomes(registry, lambda: "version 3 is altered" in (registry.trouble or ""))
    for n, labels, text in (each.result() for each in replies):
        assert len(labels) == 1
        assert text == alone[n]
    assert {label for each in replies for label in each.result()[1]} == {"parrot version 1", "parrot version 2"}


def test_the_registry_is_asked_every_few_seconds_at_most(catalog, monkeypatch):
    monkeypatch.setattr(registry_source, "CHECK_S", 60.0)
    registry = registry_source.Registry(Path(), "parrot", "champion")
    before = catalog.looked
    for _ in range(100):
        registry.current()
    with registry._looking:  # whatever look has been begun is over
        assert catalog.looked == before


@pytest.mark.fault
def test_a_champion_that_is_altered_or_lost_leaves_the_one_before_and_says_so(catalog):
    registry = registry_source.Registry(Path(), "parrot", "champion")
    catalog.champion, catalog.broken = "2", {"2"}
    assert becomes(registry, lambda: "version 2 is altered" in (registry.trouble or ""))
    assert registry.current().label == "parrot version 1"
    catalog.champion = "9"
    assert becomes(registry, lambda: "has no champion" in (registry.trouble or ""))
    assert "parrot version 1 stays" in registry.trouble
    catalog.champion, catalog.broken = "2", set()
    assert serves(registry, "parrot version 2")
    assert registry.trouble is None


@pytest.mark.fault
def test_after_a_failure_the_files_are_not_read_again_at_once_but_another_champion_is(catalog, monkeypatch):
    registry = registry_source.Registry(Path(), "parrot", "champion")
    monkeypatch.setattr(registry_source, "RETRY_S", 60.0)
    catalog.champion, catalog.broken = "2", {"2"}
    assert becomes(registry, lambda: registry.trouble is not None)
    looked = catalog.looked
    assert becomes(registry, lambda: catalog.looked > looked + 3)
    assert catalog.opened == ["1", "2"]
    assert "version 2 is altered" in registry.trouble
    catalog.champion = "3"
    assert serves(registry, "parrot version 3")


def test_nobody_waits_while_a_new_champion_is_loaded(catalog, monkeypatch):
    registry = registry_source.Registry(Path(), "parrot", "champion")
    loading, go_on, loaded = threading.Event(), threading.Event(), threading.Event()

    def slow(store: Any, version: Any) -> Path:
        loading.set()
        go_on.wait(60)
        loaded.set()
        return catalog.folder

    monkeypatch.setattr(registry_source, "open_version", slow)
    catalog.champion = "2"
    registry.current()
    assert loading.wait(60)
    assert registry.current().label == "parrot version 1"
    assert not loaded.is_set()
    go_on.set()
    assert serves(registry, "parrot version 2")


def test_only_a_few_versions_stay_in_memory(catalog, monkeypatch):
    monkeypatch.setattr(registry_source, "KEPT", 2)
    registry = registry_source.Registry(Path(), "parrot", "champion")
    for number in ("2", "3", "1", "2", "3"):
        assert registry.open(number).facts["version"] == number
    assert len(registry._opened) == 2
    with pytest.raises(InputError, match="not in the registry"):
        registry.open("../1")


@pytest.mark.fault
def test_a_real_registry_is_served_its_champion_moves_and_an_altered_one_is_not_served(
    store, version, tmp_path, monkeypatch
):
    config = RegistryConfig(model=f"app-{uuid4().hex[:8]}", max_target_loss=0.1)

    def add(loss: float) -> None:
        project = trained_project(tmp_path / str(loss), corpus_loss=loss)
        shutil.rmtree(project / "models" / "model")
        shutil.copytree(version / "model", project / "models" / "model")
        assert register(root_of(store), project, config)["champion"]

    add(0.09)
    registry = registry_source.Registry(root_of(store), config.model, "champion")
    assert registry.current().facts["aliases"] == ["candidate", "champion"]
    add(0.08)
    registry._due = 0.0
    assert serves(registry, f"{config.model} version 2")
    assert registry.versions() == ["2", "1"]
    assert registry.open("1").facts["metrics"]["corpus_loss"] == 0.09
    assert "Gradient norm" in run_html(registry.current())
    assert "What it is not" in about_html(registry.current())
    add(0.07)
    weights = fetch_version(store, store.client.get_model_version(config.model, "3"), "model") / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1] + b"x")
    registry._due = 0.0
    assert becomes(registry, lambda: "version 3" in (registry.trouble or ""))
    assert registry.current().label == f"{config.model} version 2"


# at the start


def start(*arguments: str, folder: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    known = {key: os.environ[key] for key in ("PATH", "HOME") if key in os.environ}
    return subprocess.run(
        [sys.executable, ROOT / "app.py", *arguments], cwd=folder, env=known | environment, capture_output=True,
        text=True, timeout=120,
    )  # fmt: skip


@pytest.mark.fault
@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        ((), 7, "dvc repro"),
        (("--folder", "nowhere"), 7, "nowhere not found"),
        (("--folder", "empty"), 7, "export space"),
        (("--share",), 2, "unrecognized arguments: --share"),
        (("--port", "99999"), 2, "'99999' is no port: choose one from 1 to 65535"),
    ],
)
def test_without_a_model_it_ends_with_one_line_that_says_how_to_get_one(tmp_path, arguments, code, words):
    (tmp_path / "empty").mkdir()
    done = start(*arguments, folder=tmp_path)
    assert done.returncode == code, done.stderr
    assert words in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.fault
def test_an_altered_folder_is_not_served(version, tmp_path):
    folder = Path(shutil.copytree(version, tmp_path / "version"))
    weights = folder / "model" / "model.safetensors"
    data = bytearray(weights.read_bytes())
    data[-1] ^= 1
    weights.write_bytes(data)
    with pytest.raises(IntegrityError, match=r"model\.safetensors"):
        Folder(folder)
