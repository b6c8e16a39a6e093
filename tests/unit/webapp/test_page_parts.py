"""The parts of the page as functions: the results of each tab, their HTML, and the answers to invalid input."""

import inspect
import re
from copy import copy
from html import escape
from types import SimpleNamespace
from typing import Any

import gradio as gr
import numpy as np
import pytest
from fixtures_app import INFO, LINES, PROMPT, WINDOW, Stub, _served, _source, _version, event  # noqa: F401 (fixtures)
from fixtures_tokenizer import POEM, _made  # noqa: F401 (a fixture)
from hypothesis import example, given, settings
from hypothesis import strategies as st

from pipeline.config.sections import ModelConfig
from pipeline.data.corpus_index import CorpusIndex
from pipeline.data.vocab import Vocabulary
from pipeline.model.generator import Generator, Piece
from pipeline.model.gpt import GPT
from pipeline.system.errors import InputError
from pipeline.system.words import counted
from webapp.api import user_errors
from webapp.chart import _number, line_chart
from webapp.completion import Completion, complete
from webapp.engine import TimedOut
from webapp.html import alias_words, marked_html, place_html, split_text, where_html
from webapp.model_source import Served
from webapp.page import TABS, compose, head_html
from webapp.page_version import PageVersion
from webapp.tabs import next_token
from webapp.tabs.about import about_html, parts, sizes
from webapp.tabs.next_token import next_token_html, predict_next, times_in_words
from webapp.tabs.recall import _find, _recall, heat_html, last_place, recital_html
from webapp.tabs.training import _compare, run_html
from webapp.tabs.write import FIELDS, NUMBERS, RANGES, _written, samples_html


@pytest.fixture(scope="module")
def page(source: Stub) -> gr.Blocks:
    """The page without a server."""
    return compose(source)


def completed(served: Any, prompt: str, samples: Any = 1, **numbers: Any) -> Completion:
    return list(complete(served, prompt, samples, **numbers))[-1]


def marked(served: Any, ids: Any, n_prompt: int) -> str:
    return marked_html(served, ids, n_prompt, served.corpus.passages(ids, served.min_passage))


@given(st.text("ab \n<é☂🙂👩\u200d", max_size=40), st.lists(st.integers(0, 60), max_size=5))
@example("a🙂b", [2])  # within a character of several tokens
@settings(max_examples=20, deadline=None)
def test_splitting_a_text_loses_and_repeats_nothing(tokenizer, text, places):
    ids = tokenizer.encode(text)
    assert "".join(split_text(tokenizer, ids, sorted(min(place, len(ids)) for place in places))) == text


def test_no_text_has_a_replacement_character_for_a_part_of_a_character(served):
    text, ids = "今天写🐱", served.tokenizer.encode("今天写🐱")  # eleven tokens
    for begin in range(len(ids)):
        for end in range(begin + 1, len(ids) + 1):
            whole = served.tokenizer.decode(ids[begin:end])
            assert "".join(split_text(served.tokenizer, ids[begin:end], range(end - begin))) == whole in text
            assert "\ufffd" not in Completion(served, ids[:begin], 1, [ids[begin:end]]).text(0)  # while it grows
    chinese = copy(served)
    chinese.corpus = CorpusIndex(ids)
    for begin in range(len(ids) - 1):
        the_text, _ = recital_html(served, ids[begin:]).split("The model</b>")
        assert re.sub("<[^>]*>", "", the_text).endswith(served.tokenizer.decode(ids[begin:]))
        assert "\ufffd" not in the_text + heat_html(chinese, begin, "")


def test_copied_passages_are_marked_and_the_prompt_is_not(served):
    prompt = PROMPT.removesuffix(" we")  # enough of the new tokens are then no speaker’s name
    completion = completed(served, prompt, max_tokens=12, temperature=0)
    html = marked(served, completion.ids(0), len(completion.prompt_ids))
    assert html.startswith(f'<span class="prompt">{prompt}</span><mark tabindex="0" role="button" ')
    assert 'data-place="0"' in html
    assert completion.novelty(0) == 0
    assert prompt + completion.text(0) in LINES
    place = place_html(served, 3, 4)
    assert "<mark>\nBefore we proceed</mark>" in place
    assert "of it, from token 3 on" in place
    assert "hear me speak" in place


def test_passages_are_searched_once_for_each_sample_and_refresh(page, source, monkeypatch):
    searched, search = [], CorpusIndex.passages
    monkeypatch.setattr(CorpusIndex, "passages", lambda *given: searched.append(given) or search(*given))
    answers = written(source, samples=2, max_tokens=9)
    assert len(searched) == 2 * len(answers)
    answers += page.fns[event(page, "generate")].fn(PROMPT, samples=2, max_tokens=9, temperature=0)
    assert len(searched) == 2 * len(answers)
    ((passage,), novelty) = (answers[-1]["samples"][1][key] for key in ("passages", "novelty"))
    assert passage["text"] in LINES
    assert novelty == 0


def test_each_of_two_overlapping_passages_opens_whole(tokenizer):
    text = [*range(300, 312), 0, *range(306, 320)]
    served = SimpleNamespace(corpus=CorpusIndex(text), tokenizer=tokenizer, info={"version": "1"}, min_passage=8)
    html = marked(served, range(300, 320), 0)
    assert re.findall(r'data-place="(\d+)" data-length="(\d+)"', html) == [("0", "12"), ("13", "14")]
    assert re.sub("<[^>]*>", "", html) == escape(tokenizer.decode(range(300, 320)))


def test_an_error_of_the_api_is_one_line_and_unchanged():
    with pytest.raises(gr.Error) as refusal, user_errors():
        raise InputError("'<b>' is no number & so on")
    assert refusal.value.message == "'<b>' is no number & so on"


def test_every_text_is_escaped(served):
    shown = next_token_html(served, "<img ") + run_html(served)
    for n_before_end, length in ((24, 24), (4, 4), (40, 4)):  # <b> is in the passage, before it and after it
        shown += place_html(served, len(served.ids) - n_before_end, length)
    for ids in (served.ids[-24:].tolist(), served.tokenizer.encode("<img src=x onerror=alert(1)>&'\"")):
        shown += marked(served, ids, 0) + marked(served, ids, 2)
        shown += heat_html(served, len(served.ids) - 24, "<b>")  # here, each token is a span
    assert re.findall("<img|<b>First|<b>Resolved|<<", shown) == []
    assert "&lt;b&gt;First" in shown


def test_a_prompt_that_the_text_has_in_other_tokens_is_not_called_missing(served):
    cut, missing = "contains this prompt, but cut into other tokens", "does not contain this prompt"
    for prompt, words in ((PROMPT, ""), ("hear me speak.", cut), ("HEAR me speak.", missing), ("zebra", missing)):
        html = samples_html(completed(served, prompt, max_tokens=1), prompt)
        assert [each for each in (cut, missing) if each in html] == [words] * bool(words)


def test_the_page_says_where_only_a_part_of_a_long_text_is_searched(served):
    n, long = len(served.ids), copy(served)
    long.corpus = CorpusIndex(served.ids, n_text=10 * n)
    warning = f"Only the first {n:,} of the {10 * n:,} tokens of the training text are searched"
    for version in (long, served):
        completion = completed(version, "All:", max_tokens=2, temperature=0)
        for html in (samples_html(completion, "All:"), next_token_html(version, "All:")):
            assert (warning in html) == (version is long)
    assert f"after 8% of it, from token {n - 24:,} on" in place_html(long, n - 24, 24)
    for html in (head_html(long), about_html(long)):
        assert f"{10 * n:,} tokens" in html
        assert f"{n:,} tokens" not in html


def test_next_tokens_have_the_models_probability_and_their_count_in_the_text(served):
    found = predict_next(served, "First Citizen:\nBefore we proceed any")
    best = found["tokens"][0]
    assert (best["text"], best["times_in_text"], found["context_times"]) == (" further", 1, 1)
    assert best["probability"] > 0.9
    assert 0 <= found["entropy_nats"] < 0.6
    assert predict_next(served, "zebra")["context_times"] == 0
    assert "no grey bars" in next_token_html(served, "zebra")


def test_the_end_of_text_token_cannot_be_appended(served):
    html = next_token._line(
        served, {"id": served.tokenizer.eot, "text": None, "probability": 0.5, "times_in_text": 0}, 0
    )
    assert "&lt;|endoftext|&gt;" in html
    assert " disabled" in html


def test_a_part_of_a_character_is_shown_as_bytes_and_pressing_the_others_goes_on_with_it(page, served):
    prompt, part, ids = "All: ", "", served.tokenizer.encode("🐱")
    one = {"text": None, "probability": 0.5, "times_in_text": 0}
    for n, shown in enumerate((r"\xf0\x9f", r"\x90", r"\xb1")):
        assert f' data-token="{ids[n]}">{shown}</button>' in next_token._line(served, one | {"id": ids[n]}, 0, ids[:n])
        assert "disabled" in next_token._line(served, one | {"id": 25}, 0, ids[:n]) or n == 0  # ":" within a character
        assert (prompt, part) == ("All: ", " ".join(map(str, ids[:n])))
        prompt, html, _ = call(page, event(page, "append"), prompt, "7", sent={"token": ids[n], "part": part})
        part = re.search(r'data-part="(.*?)"', html)[1]
    assert (prompt, part) == ("All: 🐱", "")
    after = predict_next(served, "All: ", 2, f"{ids[0]} {ids[1]}")["tokens"]
    assert [one["bytes"] for one in after] == [one["text"].encode().hex() for one in after]
    for part in ("x", "-1", "50257", "1 " * 9, "9" * 5000, None):
        with pytest.raises(InputError, match=r"^part "):
            predict_next(served, "All:", 2, part)


def test_errors_of_a_recital_are_marked_on_both_sides(served):
    ids = served.ids[: WINDOW + 1].tolist()
    html = recital_html(served, ids)
    assert "all correct" in html
    assert "<ins>" not in html
    html = recital_html(served, ids[:18] + served.tokenizer.encode(" zebra")[:1] + ids[19:])
    assert "6 correct before the first error" in html  # half of the window is the prompt
    assert "<del>" in html
    assert "<ins>" in html


def test_a_recital_ends_with_the_document(tokenizer):
    first, eot = tokenizer.encode(LINES)[:40], tokenizer.eot

    def recital_of(recited: list[int], finished: str) -> str:
        def stream(prompts, sampling):
            assert (prompts, sampling.max_tokens) == ([first[:32]], 9)
            yield Piece(0, recited, "", finished, None)

        served: Any = SimpleNamespace(tokenizer=tokenizer, engine=SimpleNamespace(stream=stream))
        return recital_html(served, [*first, eot, *first])

    assert "recites the next <b>9</b>: <b>all correct" in recital_of(first[32:], "end")
    assert "8 correct before the first error" in recital_of([*first[32:], 5], "length")  # it writes on
    assert "3 correct before the first error" in recital_of(first[32:35], "end")  # too early


def test_a_recital_has_the_time_limit_of_other_requests(served, monkeypatch):
    monkeypatch.setattr(served.engine, "timeout_s", -1.0)
    with pytest.raises(TimedOut, match="try again later"):
        recital_html(served, served.ids[: WINDOW + 1].tolist())


def test_the_heat_map_shows_the_text_from_a_place_on_with_the_loss_given_the_half_window_before(served):
    for place in (0, 1, WINDOW // 2, WINDOW, last_place(served)):
        begin = max(0, place - WINDOW // 2)
        ids = served.ids[begin : begin + WINDOW + 1].tolist()
        losses = served.generator.token_losses(ids)[max(1, place - begin) - 1 :]
        html = heat_html(served, place, "")
        assert [float(x) for x in re.findall('title="loss ([0-9.]+)', html)] == [round(x, 2) for x in losses]
        assert f"tokens {place:,}–{begin + len(ids) - 1:,}" in html


def test_the_examples_occur_in_the_text_and_differ(served):
    text = served.tokenizer.decode(served.ids.tolist())
    assert served.examples[0] == text[: len(served.examples[0])]
    assert 1 < len(set(served.examples)) == len(served.examples)
    assert all(example in text and len(example) <= 70 and not example[-1].isspace() for example in served.examples)


def test_words_are_found_one_place_after_the_other_and_again_from_the_start(served):
    first = served.find("SPEAK", -1)
    assert served.tokenizer.decode(served.ids[slice(*first)]).strip() == "speak"
    assert served.find("speak", first[0])[0] > first[0]
    assert served.find("proceed any", 80) == served.find("proceed any", -1)
    assert served.find("zebra", 0) is served.find("", 0) is None


def test_the_parts_add_up_to_the_model(served):
    tiny = ModelConfig.model_validate(INFO["params"]["model"])
    gpt2 = tiny.model_copy(update={"n_layer": 12, "n_head": 12, "n_embd": 768, "block_size": 1024})
    for config in (tiny, gpt2):
        assert sum(n_params for _, _, n_params in parts(config)) == config.n_params
    memory = {name: mib * 2**20 for name, _, mib in sizes(gpt2, gpt2.n_ids, 1024)}
    assert memory["weights in fp32, as on the disk"] == pytest.approx(4 * 124_439_808)  # as published
    memory = {name: mib * 2**20 for name, _, mib in sizes(gpt2, 257, 64)}
    assert memory["training in fp32 with AdamW"] == pytest.approx(16 * (124_439_808 - 50_000 * 768))
    assert memory["KV cache of one text, fp32"] == pytest.approx(2 * 12 * 64 * 768 * 4)
    assert f"16 bytes, V = {served.generator.vocabulary.n_rows}<" in about_html(served)
    assert "What it is not" in about_html(served)
    assert f"{50257 * 48:,}" in about_html(served)


@pytest.mark.parametrize(("name", "shortest"), [("bytes", 26), ("chars", 15), ("bpe:320", 14)])
def test_the_page_shows_a_model_of_each_tokenizer(made, name, shortest):
    tokenizer, params = made(name), {"model": {**INFO["params"]["model"], "vocab_size": None}}
    ids = tokenizer.encode(POEM)
    shape = ModelConfig.model_validate(params["model"]).updated(vocab_size=tokenizer.n_vocab)
    model = GPT(shape, Vocabulary.of(np.bincount(ids), tokenizer.n_vocab)).initialise(1).eval()
    model.trained_length = shape.block_size
    served = Served(Generator(model, tokenizer, CorpusIndex(ids)), INFO | {"params": params})
    about = about_html(served)
    assert escape(tokenizer.description) in about
    assert f"{tokenizer.n_vocab * 48:,}" in about
    assert served.min_passage == shortest  # 26 bytes; the poem has 1.8 bytes a character
    for token in predict_next(served, "天地玄黃", 10, "")["tokens"]:
        assert token["text"] is None or token["text"].encode().hex() == token["bytes"]
    assert predict_next(served, "天地玄黃", 10, "")["context_times"] == 2
    assert served.find("CHARLES", -1) is served.find("spat", -1) is None
    begin, end = served.find("SPÄT DURCH", -1)
    assert "spät durch" in tokenizer.decode(ids[begin:end])
    first, place = served.find("Kind", -1)[0], POEM.encode().index(b"Kind")
    assert len(tokenizer.decode_bytes(ids[:first])) in (place - 1, place)  # the token may begin with the space
    shown = re.sub("<[^>]*>", "", heat_html(served, 40, "").partition('class="heat"')[2].partition("</p>")[0])
    assert shown.partition(">")[2].strip("\ufffd") in escape(POEM)
    completion = completed(served, "Wer 漢", max_tokens=9, seed=1)
    assert tokenizer.decode(completion.prompt_ids) == "Wer 漢"
    assert len(completion.samples[0]) <= 9
    assert marked(served, [*tokenizer.encode("Wer"), *ids[:40]], 3).count("<mark ") == 1


def test_any_curve_can_be_drawn():
    for points in ([], [[1, 0.0]], [[1, float("nan")]], [[5, 3.0]], [[1, 2.0], [2, 2.0]]):
        for log in (True, False):
            html = line_chart("x < y", "nats", points, points, log, goal=0.1)
            assert "nan" not in html
            assert "x < y" not in html


def ticks(axis: str, *given: Any, **options: Any) -> list[str]:
    """The labels of an axis of `line_chart`."""
    return re.findall(f'tick {axis}"[^>]*>([^<]*)', line_chart("x", "", *given, **options))


def test_a_logarithmic_axis_has_at_least_two_ticks_and_the_steps_are_whole():
    for low in (0.012, 0.21, 1.4, 2.2, 3, 5.5, 11):
        for high in (1.01 * low, 1.5 * low, 2 * low, 30 * low, 1e4 * low):
            labels = ticks("y", [[1, high], [50, low]], log=True)
            assert 2 <= len(labels) == len(set(labels)) < 10, (low, high, labels)
    assert ticks("x", [[1, 4.2], [2, 3.0]]) == ["0", "1", "2"]
    assert ticks("x", [[1, 4.2]]) == ["0", "1"]
    assert ticks("x", [[1, 4.2], [12, 3.0]]) == ["0", "5", "10"]


def test_a_number_of_a_chart_has_three_digits_in_the_unit_that_it_has_after_rounding():
    numbers = {0: "0", 0.1234: "0.123", 1234.5: "1,230", 9999.6: "10k", 12_345: "12.3k", 999_999: "1M", 2.5e6: "2.5M"}
    assert {number: _number(number) for number in numbers} == numbers


def test_a_new_tab_is_one_entry_in_a_table(source):
    def toy_tab(page: gr.Blocks, version: PageVersion) -> None:
        version.renders(lambda served: (f"toy of {served.label}",), gr.HTML())

    page = compose(source, TABS | {"Toy": toy_tab})
    titles = [block.label for block in page.blocks.values() if isinstance(block, gr.Tab)]
    assert titles == ["Write", "Next token", "Recall", "Training", "About", "Toy"]
    assert call(page, event(page, "update"), "")[-1] == "toy of parrot version 7"


def test_a_version_with_old_or_no_parameters_is_shown(served):
    old = copy(served)
    windows = {"length": WINDOW, "batch": 4, "accumulate": 1, "order": "shuffled"}
    for params in ({**INFO["params"], "windows": windows, "optim": {"kind": "adamw", "clip": 1.0}}, {}):
        old.info = served.info | {"params": params}
        assert f"windows of {WINDOW} tokens" in about_html(old)
        assert ("windows:\n  length:" in run_html(old)) == bool(params)


def test_the_page_says_which_rule_ended_the_training_and_promises_no_memory_of_a_held_out_target(source, served):
    rule = {"name": "validation", "description": "the held-out text", "loss": "validation_loss", "held_out": True}
    info = INFO | {"rule": rule, "metrics": INFO["metrics"] | {"validation_loss": 1.8612}}
    info["history"] = INFO["history"] | {"validation_loss": [[30, 2.0], [60, 1.8612]]}
    held_out = Served(served.generator, info)
    page = head_html(held_out) + about_html(held_out)
    assert "memori" not in page
    assert "Its loss on the rest of the text, which was held out, is 1.8612 nats" in page
    assert "memori" in head_html(served)
    assert f"<h1>{INFO['name']}</h1>" in head_html(served)  # the title is the model's name
    assert compose(source).title == INFO["name"]
    training = run_html(held_out)
    for words in ("target rule: the held-out text", "validation", "thick: over the held-out text"):
        assert words in training
    assert "thick: over the whole text" in run_html(served)


def test_the_page_says_what_the_published_weights_of_a_version_know(served):
    tuned = copy(served)
    assert "assistant: it was trained on no other text" in about_html(served)
    tuned.info = INFO | {"tags": INFO["tags"] | {"init": "hf://gpt2@abc"}}
    assert "assistant: after its published weights, it was trained on no other text" in about_html(tuned)
    assert "its text or those of its published weights contain." in about_html(tuned)


def test_the_page_says_why_the_champion_could_not_be_loaded(source, served, monkeypatch):
    monkeypatch.setattr(source, "trouble", "champion could not be loaded (<b>)")
    for page, number in ((compose(source), ""), (compose(source), "7")):  # one that loads, and one that is open
        assert "champion could not be loaded (&lt;b&gt;)" in call(page, event(page, "update"), number)[2]


def call(page: gr.Blocks, number: int, *values: Any, sent: Any = None) -> Any:
    """The last result of an event, or its refusal; without the network. `sent`: what the page's script adds."""
    fn = page.fns[number].fn
    takes_event = gr.EventData in inspect.get_annotations(fn).values()
    try:
        result = fn(*values, *[gr.EventData(None, sent)] * takes_event)
        return list(result)[-1] if inspect.isgenerator(result) else result
    except gr.Error as refusal:
        return refusal


def test_a_passage_opens_in_its_version_and_a_token_is_appended_to_any_prompt(page):
    opened = event(page, "opened")
    assert "In the training text" in call(page, opened, sent={"version": "6", "place": 0, "length": 3})
    assert "Version '5' is not here" in call(page, opened, sent={"version": "5", "place": 0, "length": 3})
    answers = {call(page, opened, sent={"version": "6", "place": 0, "length": 3, "press": n}) for n in range(2)}
    assert len(answers) == 2  # the page sees that there is a new one
    assert call(page, event(page, "append"), "a\ud800", "7", sent={"token": 25})[0] == "a\ufffd:"


def test_any_prompt_is_completed_or_refused(served):  # E2
    for prompt in ("", "First Citizen:\n" * 60, "<|endoftext|>", "a\x00b", "\ud800"):
        assert completed(served, prompt, max_tokens=5).finished
        assert len(predict_next(served, prompt, 5)["tokens"]) == 5
    for use in (completed, predict_next):
        with pytest.raises(InputError, match="the prompt has 10,001 characters: give 10,000 at most"):
            use(served, "x" * 10_001)


def test_a_wrong_number_is_refused_by_its_name(served):  # E3; test_sampling has those of Sampling
    for name, values in {"samples": (0, 5, 1.5, True, None, "many", float("nan")), "max_tokens": (2001,)}.items():
        for value in values:
            with pytest.raises(InputError, match=f"^{name}"):
                completed(served, "All:", **{"samples": 1, name: value})


def test_a_length_is_refused_with_the_limit_of_the_page(served):
    for too_many in (2001, 99_999):  # Sampling's own limit is between them
        with pytest.raises(InputError, match=f"^max_tokens {too_many}: choose a whole number from 0 to 2,000$"):
            completed(served, "All:", max_tokens=too_many)


def written(source: Stub, prompt: Any = "All:", keep: Any = True, number: Any = "7", **numbers: Any) -> list[Any]:
    """All answers to a press of Write."""
    values = dict(zip(NUMBERS, (1, 2, 0.8, 1, 0, 1, 1), strict=True)) | numbers
    return list(_written(SimpleNamespace(source=source, served=source.open), prompt, *values.values(), keep, number))


def fault_of(answer: tuple[Any, ...]) -> dict[str, str]:
    """Field -> its error."""
    return {name: re.sub("<[^>]*>", "", words) for name, words in zip(FIELDS, answer[5:], strict=True) if words}


def test_an_error_is_shown_beside_its_field_and_the_last_text_stays(source):
    first, *_, last = written(source, max_tokens=40) * 2
    assert fault_of(first) == {}  # errors of the last press go
    assert "All:" in last[1]
    for name, (low, high) in RANGES.items():
        for value in (low - 0.01, high + 1, None, ""):
            (answer,) = written(source, **{name: value})
            shown = "Empty" if value in (None, "") else value
            assert fault_of(answer) == {name: f"{shown}: choose a number from {low} to {high:,}"}
            assert answer[1] == gr.skip()
            assert (answer[3] == gr.update(open=True)) == (name in ("top_k", "top_p", "repetition_penalty"))
    assert fault_of(written(source, seed=None)[0]) == {"seed": "Empty: choose a whole number from 0 to 2,147,483,647"}
    assert "10,000 at most" in fault_of(written(source, "x" * 10_001)[0])["prompt"]
    assert "Version '5' is not here" in fault_of(written(source, number="5")[0])["prompt"]  # about no field
    version = PageVersion.__new__(PageVersion)
    version.source = source
    assert "not in the training text" in _find(version, "zebra <", 0, "7")[1]
    assert _find(version, "speak", 0, "7")[1] == ""
    assert "choose a whole number" in next(_recall(version, 1e6, "", "7"))[2]
    faults = list(_compare(version, "All:", "7", "6", "x", True))[-1]
    assert (faults[0], faults[3], "choose a whole number" in faults[4]) == (gr.skip(), "", True)


def test_each_press_draws_a_seed_which_is_shown_and_can_be_kept(source):
    seeds = {written(source, keep=False, seed=1)[0][4] for _ in range(5)}
    assert len(seeds) > 1
    seed = seeds.pop()
    text = written(source, seed=seed, temperature=1.5, max_tokens=8)[-1][1]
    assert f"seed {seed}" in text
    assert written(source, seed=seed, temperature=1.5, max_tokens=8)[-1][1] == text
    assert 'data-prompt="All:"' in text  # page.js compares it with the field


def test_a_text_says_which_version_wrote_it_after_another_one_is_served(source, served):
    for number, words in (("7", "written by parrot version 7"), ("6", "version 6, which was served when it began")):
        assert words in written(source, number=number)[-1][0]
    assert "version 7 is served now" in written(source, number="6")[-1][0]
    assert "served now" not in written(source, number="7")[-1][0]


def test_all_tabs_of_an_open_page_change_their_version_at_once_and_say_so(source, served, monkeypatch):
    page = compose(source)
    update = event(page, "update")
    number, notice, *parts = call(page, update, "7")
    assert {str(part) for part in (number, notice, *parts[1:])} == {str(gr.skip())}  # nothing has changed
    monkeypatch.setattr(source, "current", lambda: source.open("6"))
    number, notice, *parts = call(page, update, "7")
    assert number == "6"
    assert "Version 6 has replaced version 7" in notice
    shown = " ".join(map(str, parts))
    assert "version 7" not in shown
    for words in ("Shown: version 6", ">parrot version 6</h2>", "A small language model", "Registered on", "reading …"):
        assert words in shown
    assert call(page, update, "")[1] == ""  # a page that loads has no earlier version


def test_words_for_counts_places_and_aliases():
    assert [counted(n, "token") for n in (0, 1, 1200)] == ["0 tokens", "1 token", "1,200 tokens"]
    assert [times_in_words(n) for n in (1, 2, 1200)] == ["once", "twice", "1,200 times"]
    places = {0: "at its beginning", 1: "near its beginning, from token 1 of 1,000 on",
              250: "after 25% of it, from token 250 on", 999: "near its end, from token 999 of 1,000 on"}  # fmt: skip
    for place, words in places.items():
        assert where_html(place, 1000) == words
    assert alias_words([]) == ""
    assert alias_words(["candidate", "champion", "champion-sliding"]) == (
        "It is the champion, which is served by default, and the newest one that was registered, and the best one by "
        "the target rule “sliding”."
    )
    assert alias_words(["paper"]) == "It is the one with the alias “paper”."


def test_the_origin_of_a_version_is_in_words(served):
    version = copy(served)
    version.info = INFO | {"tags": INFO["tags"] | {"tree_clean": "true"}, "environment": {"compiled": "False"}}
    text = re.sub("(<[^>]*>)+", "|", run_html(version))
    assert "|changes that were not committed|none|" in text
    assert "|torch.compile|not used|" in text
    assert "tree_clean" not in text


def test_about_leads_with_what_the_model_is_and_is_for_and_ends_with_its_parameters(served):
    about = about_html(served)
    order = ["A small language model", "It is for seeing what a language model keeps of a text", "What it is not",
             "Its memory", "Its parameters"]  # fmt: skip
    places = [about.index(words) for words in order]
    assert places == sorted(places)


@pytest.mark.parametrize(
    ("text", "marks"),
    [
        ("zebra sees: First, you know Caius Marcius is chief enemy to the", 1),
        ("First Citizen:\nFirst, you know Caius Marcius is zebra", 1),
        ("zebra\n\nFirst Citizen:\nYou zebra", 0),  # nine tokens, but a speaker's name and one word
        ("zebra speak.\n\nAll:\nSpeak, speak.\n\nFirst Citizen:\nzebra", 0),  # six tokens that are no name
    ],
)
def test_only_passages_of_enough_tokens_that_say_something_are_marked(served, text, marks):
    assert marked(served, served.tokenizer.encode(text), 0).count("<mark ") == marks


def test_the_remainder_of_a_passage_behind_the_prompt_or_another_mark_needs_enough_tokens(tokenizer):
    ids = [*tokenizer.encode("one two three four five six seven eight nine ten"), *range(300, 306)]
    served = SimpleNamespace(corpus=CorpusIndex(ids), tokenizer=tokenizer, info={"version": "1"}, min_passage=8)
    for n_prompt in range(len(ids)):
        assert marked(served, ids, n_prompt).count("<mark ") == (len(ids) - n_prompt >= 8)


def test_no_event_fails_with_anything_but_a_refusal(page):
    junk: list[Any] = [None, "x", -1, 1e300, [1], {"a": 1}, "\ud800", "9" * 30, "<b>"]
    for number, fn in page.fns.items():
        for n, value in enumerate(junk if fn.fn else []):
            values = [value if n % 2 else junk[(n + i) % len(junk)] for i in range(len(fn.inputs))]
            sent = {"version": "7", "place": value, "length": value, "token": value}
            answer = call(page, number, *values, sent=sent)
            assert not isinstance(answer, gr.Error) or answer.title == "Not possible", (number, fn.name, values)
