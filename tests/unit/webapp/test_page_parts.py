"""The parts of the page as functions: what each tab computes, and the HTML that it shows."""

import re
from copy import copy
from html import escape
from types import SimpleNamespace

import gradio as gr
import pytest
from fixtures_app import INFO, LINES, WINDOW, Stub, _at_full_speed, _page, _source, _version, ask, event  # noqa: F401 (fixtures)
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.config.sections import ModelConfig
from pipeline.data.corpus_index import CorpusIndex
from pipeline.system.errors import InputError
from webapp.chart import line_chart
from webapp.completion import complete
from webapp.html import marked_html, place_html, split_text, user_errors
from webapp.model_source import Served
from webapp.page import TABS, compose, head_html
from webapp.tabs import next_token
from webapp.tabs.about import about_html, parts, sizes
from webapp.tabs.next_token import next_token_html, predict_next
from webapp.tabs.recall import _about_windows, heat_html, n_windows, recital_html, roundtrip_length
from webapp.tabs.training import run_html
from webapp.tabs.write import samples_html


@pytest.fixture
def served(source: Stub) -> Served:
    return source.current()


@given(st.text(max_size=40), st.lists(st.integers(0, 60), max_size=5))
@settings(max_examples=60, deadline=None)
def test_cutting_a_text_before_tokens_loses_and_repeats_nothing(tokenizer, text, places):
    text = text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    ids = tokenizer.encode(text)
    pieces = split_text(tokenizer, ids, sorted(min(place, len(ids)) for place in places))
    assert "".join(pieces) == text


def test_a_character_split_over_tokens_is_whole_on_one_side(tokenizer):
    ids = tokenizer.encode("a🙂b")  # the face takes several tokens
    assert split_text(tokenizer, ids, [2]) == ["a🙂", "b"]


def test_what_stands_in_the_training_text_is_marked_and_the_prompt_is_not(served):
    prompt = "First Citizen:\nBefore we"
    completion = list(complete(served, prompt, 1, max_tokens=12, temperature=0))[-1]
    html = marked_html(served, completion.ids(0), len(completion.prompt_ids))
    assert html.startswith('<span class="prompt">First Citizen:\nBefore we</span><mark tabindex="0" role="button" ')
    assert 'data-place="0"' in html
    assert completion.novelty(0) == 0
    assert "".join(completion.text(0)) in LINES


def test_of_two_passages_that_overlap_each_opens_as_a_whole(tokenizer):
    text = [*range(300, 312), 0, *range(306, 320)]
    served = SimpleNamespace(corpus=CorpusIndex(text), tokenizer=tokenizer, info={"version": "1"})
    html = marked_html(served, range(300, 320), 0)
    assert re.findall(r'data-place="(\d+)" data-length="(\d+)"', html) == [("0", "12"), ("13", "14")]
    assert re.sub("<[^>]*>", "", html) == escape(tokenizer.decode(range(300, 320)))


@pytest.mark.security
@pytest.mark.parametrize(
    ("on_page", "message"),
    [(True, "'&lt;b&gt;x&lt;/b&gt;' is no number &amp; so on"), (False, "'<b>x</b>' is no number & so on")],
)
def test_an_error_is_escaped_on_the_page_and_unchanged_in_the_api(on_page, message):
    with pytest.raises(gr.Error) as told, user_errors(on_page):
        raise InputError("'<b>x</b>' is no number & so on")
    assert told.value.message == message


def test_a_place_shows_the_text_around_it(served):
    html = place_html(served, 3, 4)
    assert "<mark>\nBefore we proceed</mark>" in html
    assert "hear me speak" in html


def test_what_is_not_searched_of_a_long_text_is_said_where_it_counts(served):
    n = len(served.ids)
    long = copy(served)
    long.corpus = CorpusIndex(served.ids, n_text=10 * n)
    said = f"Only the first {n:,} of the {10 * n:,} tokens of the training text are searched"
    completion = list(complete(long, "All:", 1, max_tokens=2, temperature=0))[-1]
    for html in (samples_html(completion), next_token_html(long, "All:")):
        assert said in html
    assert f"token {n - 24:,} of {10 * n:,}" in place_html(long, n - 24, 24)
    completion = list(complete(served, "All:", 1, max_tokens=2, temperature=0))[-1]
    assert "Only the first" not in samples_html(completion) + next_token_html(served, "All:")


def test_the_end_of_a_document_is_a_token_but_no_text_to_go_on_with(served):
    assert next_token._text(served, served.tokenizer.eot) is None
    end = {"id": served.tokenizer.eot, "text": None, "probability": 0.5, "times_in_text": 0}
    html = next_token._line(served, end, 0)
    assert "&lt;|endoftext|&gt;" in html
    assert " disabled" in html


def test_every_text_is_escaped(served):
    end = served.ids[-24:].tolist()
    for html in (
        marked_html(served, end, 2),
        place_html(served, len(served.ids) - 24, 24),
        heat_html(served, end, 0, ""),
    ):
        assert "&lt;b&gt;" in html or "&lt;</span>" in html
        assert "<b>First" not in html
    ids = served.tokenizer.encode("<img src=x onerror=alert(1)>&'\"")
    assert "<img" not in marked_html(served, ids, 0) + heat_html(served, ids, 0, "<b>") + next_token_html(
        served, "<img "
    )
    assert "<b>Resolved" not in run_html(served)


def test_the_next_token_is_shown_beside_what_the_text_has(served):
    found = predict_next(served, "First Citizen:\nBefore we proceed any")
    best = found["tokens"][0]
    assert (best["text"], best["times_in_text"], found["context_times"]) == (" further", 1, 1)
    assert best["probability"] > 0.9
    assert 0 <= found["entropy_nats"] < 0.6
    probabilities = [one["probability"] for one in found["tokens"]]
    assert probabilities == sorted(probabilities, reverse=True)


def test_an_unknown_last_token_leaves_no_grey_bars(served):
    assert predict_next(served, "zebra")["context_times"] == 0
    assert "no grey bars" in next_token_html(served, "zebra")


def test_the_heat_map_is_pale_where_the_model_knows_the_text_and_dark_where_it_is_moved(served):
    def mean(start: int) -> float:
        losses = served.generator.token_losses(served.ids[start : start + WINDOW + 1].tolist())
        return sum(losses) / len(losses)

    assert mean(0) < 0.1 < 1 < mean(WINDOW // 2)


def test_the_recital_is_the_text_where_it_was_learnt_by_heart(served):
    html = recital_html(served, served.ids[: WINDOW + 1].tolist())
    assert "all correct" in html
    assert "<ins>" not in html


def test_errors_of_the_recital_are_marked_on_both_sides(served):
    ids = served.ids[: WINDOW + 1].tolist()
    ids[18] = served.tokenizer.encode(" zebra")[0]
    html = recital_html(served, ids)
    assert "correct before the first error" in html
    assert "<del>" in html
    assert "<ins>" in html


def test_what_is_given_to_recite_is_read_as_the_same_tokens(served):
    ids = served.tokenizer.encode("speak.\n\nAll")
    assert served.tokenizer.encode(served.tokenizer.decode(ids[:-1])) != ids[:-1]  # two newlines become one token
    assert roundtrip_length(served, ids, len(ids) - 1) == len(ids) - 2


def test_words_are_found_one_place_after_the_other_and_from_the_start_again(served):
    first = served.find("SPEAK", -1)
    second = served.find("speak", first[0])
    assert served.tokenizer.decode(served.ids[slice(*first)]).strip() == "speak"
    assert second[0] > first[0]
    assert served.find("zebra", 0) is None
    assert served.find("", 0) is None
    assert served.find("proceed any", 80) == served.find("proceed any", -1)


def test_the_parts_add_up_to_the_model():
    tiny = ModelConfig.model_validate(INFO["params"]["model"])
    gpt2 = tiny.model_copy(update={"n_layer": 12, "n_head": 12, "n_embd": 768, "block_size": 1024})
    for config in (tiny, gpt2):
        assert sum(n_params for _, _, n_params in parts(config)) == config.n_params
    assert gpt2.n_params == 124_439_808  # as published
    assert sizes(gpt2)[0][2] == pytest.approx(4 * 124_439_808 / 2**20)


@pytest.mark.parametrize("points", [[], [[1, 0.0]], [[1, float("nan")]], [[5, 3.0]], [[1, 2.0], [2, 2.0]]])
@pytest.mark.parametrize("log", [True, False])
def test_any_curve_can_be_drawn(points, log):
    html = line_chart("x < y", "nats", points, points, log, goal=0.1)
    assert "nan" not in html
    assert "x < y" not in html


def test_an_answer_is_the_same_for_a_seed_and_for_one_sample_among_four(served):
    four, again = (list(complete(served, "All:", 4, max_tokens=20, seed=5))[-1] for _ in range(2))
    assert four.samples == again.samples
    assert list(complete(served, "All:", 1, max_tokens=20, seed=7))[-1].samples[0] == four.samples[2]


def test_a_generation_that_is_closed_stops_the_model(source, served):
    completion = complete(served, "All:", 1, max_tokens=500)
    next(completion)
    assert source.watched.open == 1
    completion.close()
    assert source.watched.open == 0


def test_a_new_tab_is_one_entry_in_a_table(source):
    def toy_tab(page: gr.Blocks, source: Stub) -> None:
        shown = gr.HTML()
        page.load(lambda: source.current().label, None, shown, api_name="toy")

    page = compose(source, TABS | {"Toy": toy_tab})
    titles = [block.label for block in page.blocks.values() if isinstance(block, gr.Tab)]
    assert titles == ["Write", "Next token", "Recall", "Training", "About", "Toy"]
    assert page.fns[event(page, "toy")].fn() == "parrot version 7"


def test_a_version_with_other_or_no_parameters_is_shown(served):
    old = copy(served)
    windows = {"length": WINDOW, "batch": 4, "accumulate": 1, "order": "shuffled"}
    for params in ({**INFO["params"], "windows": windows, "optim": {"kind": "adamw", "clip": 1.0}}, {}):
        old.info = served.info | {"params": params}
        assert f"windows of {WINDOW} tokens" in about_html(old)
        assert f"windows of {WINDOW} tokens" in _about_windows(old)
        assert ("windows:\n  length:" in run_html(old)) == bool(params)


def test_what_is_wrong_with_the_champion_is_on_the_page(source, served):
    source.trouble = "champion could not be loaded (<b>)"
    completion = list(complete(served, "All:", 1, max_tokens=2))[-1]
    for html in (head_html(source), samples_html(completion, source.trouble)):
        assert "champion could not be loaded (&lt;b&gt;)" in html


def test_all_windows_of_the_text_can_be_chosen(served):
    assert n_windows(served) == -(-(len(served.ids) - 1) // WINDOW)
