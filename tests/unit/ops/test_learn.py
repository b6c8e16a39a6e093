"""When `learn` makes a version champion that the gate did not."""

from types import SimpleNamespace

import pytest

from pipeline.ops import learn
from pipeline.ops.plan import Options

SLIDING = {"rule": "sliding", "data_sha256": "a", "train_tokens": "1000", "sliding_loss": "0.08"}
HELD_OUT = {"rule": "validation", "data_sha256": "a", "train_tokens": "900", "validation_loss": "4.5"}


@pytest.mark.parametrize(
    ("champion", "ours", "promoted"),
    [
        (None, HELD_OUT, True),
        (None, {**HELD_OUT, "rolled_back": "true"}, False),
        (SLIDING, HELD_OUT, True),  # the user asks for another goal now
        (HELD_OUT, {**HELD_OUT, "validation_loss": "4.4"}, True),
        (HELD_OUT, {**HELD_OUT, "validation_loss": "4.6"}, False),
        (SLIDING, {**SLIDING, "sliding_loss": "0.01"}, False),  # the gate compares these
        (SLIDING, {**SLIDING, "data_sha256": "b", "train_tokens": "1200"}, True),  # the text has grown
        (SLIDING, {**SLIDING, "data_sha256": "b", "train_tokens": "100"}, False),
    ],
)
def test_a_version_is_made_champion_where_the_gate_cannot_compare_it(monkeypatch, champion, ours, promoted):
    tags, done = {"1": champion, "2": ours}, []
    aliases = {"champion": 1} if champion else {}
    monkeypatch.setattr(learn, "open_registry", lambda root: None)
    monkeypatch.setattr(learn, "registered_model", lambda store, name: SimpleNamespace(aliases=aliases))
    monkeypatch.setattr(
        learn, "find_version", lambda store, name, which: SimpleNamespace(version=which, tags=tags[which])
    )
    monkeypatch.setattr(learn, "promote", lambda store, name, which: done.append(which))
    changes = learn._promoted({"model": "diary", "version": "2"})
    assert done == (["2"] if promoted else [])
    assert changes == ({"champion": True, "next_step": None} if promoted else None)


def test_only_a_held_out_run_without_a_target_ends_with_its_best_model():
    wanted = [Options(goal="generalise"), Options(goal="generalise", target=4.0), Options()]
    assert [learn._wants_the_best(options) for options in wanted] == [True, False, False]
