"""Names and descriptions of runs and versions."""

import pytest

from pipeline.tracking.descriptions import (
    SOURCE_TAG,
    Result,
    base_name,
    is_given_model_note,
    is_given_name,
    is_given_note,
    model_note,
    run_name,
    run_note,
    source_tag,
    study_name,
    text_name,
    version_note,
)

IDENTITY = {
    "fingerprint": "4ae64722512592fd",
    "data_sha256": "f3156b452260098753d4",
    "params": {"model": {"n_layer": 3, "n_embd": 256}, "target": {"rule": "sliding", "loss": 0.02}},
}
TAGS = {SOURCE_TAG: "https://example.org/tiny_shakespeare/input.txt"}
RESULT = Result(0.01689, 1222, 454_656, True)


@pytest.mark.parametrize(
    ("source", "name"),
    [
        ("https://example.org/char-rnn/master/data/tinyshakespeare/input.txt", "tinyshakespeare"),
        ("texts/diary.txt", "diary"),
        ("texts/notes/*.md", "notes"),
        ("hf://datasets/roneneldan/TinyStories/TinyStories-valid.txt", "TinyStories-valid"),
        ("texts/novel.jsonl.gz", "novel"),
        ("https://example.org/a/b.txt?raw=true", "b"),
        ("texts", "texts"),
    ],
)
def test_a_text_has_a_short_name(source, name):
    assert text_name(source) == name


def test_a_run_is_named_by_text_model_and_result():
    assert run_name(TAGS, IDENTITY) == "tiny_shakespeare 3x256"
    assert run_name(TAGS, IDENTITY, RESULT) == "tiny_shakespeare 3x256 0.0169 in 1,222 steps"
    assert run_name({}, IDENTITY) == "text f3156b45 3x256"
    assert base_name(TAGS | {"dvc_experiment": "lanky-goby"}, IDENTITY) == "tiny_shakespeare 3x256 lanky-goby"
    trial = {"mlflow.parentRunId": "1", "study": "rates", "trial": "7"}
    assert run_name(TAGS | trial, IDENTITY, RESULT) == "rates-7 0.0169 in 1,222 steps"
    applied = {"study": "rates", "trial": "7"}  # a training with the values of a trial is none
    assert base_name(TAGS | applied, IDENTITY) == "tiny_shakespeare 3x256"
    params = IDENTITY["params"] | {"corpus": {"source": TAGS[SOURCE_TAG]}}
    assert study_name("sweep rates", params, "best 209,404 tokens") == (
        "sweep rates tiny_shakespeare 3x256 best 209,404 tokens"
    )


def test_descriptions_say_what_from_which_text_what_it_reached_and_how_to_use_it():
    run, missed = run_note(TAGS, IDENTITY, RESULT), run_note(TAGS, IDENTITY, RESULT._replace(is_met=False))
    version = version_note("bard", TAGS, IDENTITY, RESULT, {"verbatim_recall_anywhere": 0.94, "recall_tokens": 32})
    for note in (run, version, model_note("bard", TAGS, IDENTITY)):
        assert "tiny_shakespeare (`https://example.org/tiny_shakespeare/input.txt`" in note
    assert "3 layers, 256 wide" in run
    assert "Reached: 0.0169 nats per token after 1,222 steps and 454,656 tokens." in run
    assert "Not reached: 0.0169" in missed
    assert "`4ae64722512592fd`" in run
    assert "eached: " not in run_note(TAGS, IDENTITY)
    assert "recites 94% of the passages of 32 tokens" in version
    assert "models:/bard@champion" in version


def test_what_a_user_has_written_is_told_from_what_was_given():
    for name in ("tiny_shakespeare 3x256", "tiny_shakespeare 3x256 0.0169 in 1,222 steps", "4ae64722512592fd"):
        assert is_given_name(name, TAGS, IDENTITY)
    assert is_given_name("text f3156b45 3x256", TAGS, IDENTITY)  # created where the text was not known
    assert not is_given_name("tiny_shakespeare 3x256 the best", TAGS, IDENTITY)
    for note in ("", run_note(TAGS, IDENTITY), run_note(TAGS, IDENTITY, RESULT), run_note({}, IDENTITY)):
        assert is_given_note(note, TAGS, IDENTITY)
    assert not is_given_note(run_note(TAGS, IDENTITY, RESULT) + "\n\nThe best.", TAGS, IDENTITY)
    given = model_note("bard", {SOURCE_TAG: "texts/diary.txt"}, IDENTITY)
    assert is_given_model_note("", "bard", TAGS, IDENTITY)
    assert is_given_model_note(given, "bard", TAGS, IDENTITY)
    assert not is_given_model_note(f"Mine. {given}", "bard", TAGS, IDENTITY)


def test_params_without_a_text_give_no_tag():
    assert source_tag({"corpus": {"source": "texts/a.txt"}}) == {SOURCE_TAG: "texts/a.txt"}
    assert source_tag({}) == source_tag({"corpus": None}) == source_tag({"corpus": {"source": None}}) == {}
