"""The parts of the page as functions: what each tab computes, and the HTML that it shows."""

import re
from copy import copy
from html import escape
from types import SimpleNamespace

import pytest
from fixtures_app import FACTS, LINES, WINDOW, Stub, _at_full_speed, _page, _source, _version, ask, event  # noqa: F401 (fixtures)
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.config.sections import ModelConfig
from pipeline.data.corpus_index import CorpusIndex
from pipeline.system.errors import InputError
from webapp.chart import line_chart
from webapp.completion import write
from webapp.html import cut, place_html, refusal, traced
from webapp.model_source import Served
from webapp.tabs import next_token
from webapp.tabs.about import parts, sizes
from webapp.tabs.next_token import Likely, expect, expected_html
from webapp.tabs.recall import heat_html, n_windows, recitable, recital_html
from webapp.tabs.training import run_html
from webapp.tabs.write import samples_html


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
