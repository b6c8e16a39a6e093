"""Curves, tags and identities of versions, forged ones too."""

from itertools import pairwise
from types import SimpleNamespace

import pytest

from pipeline.registry.catalog import _row, printable, read_identity, require_valid_tags, thinned
from pipeline.system.errors import IntegrityError


@pytest.mark.parametrize("n", [0, 1, 1999, 2000, 2001, 3999, 4000, 4001, 100_000])
def test_a_curve_keeps_its_last_point_and_at_most_two_thousand(n):
    points = [[step, step / 2] for step in range(n)]
    kept = thinned(points[::-1])
    assert kept == sorted(kept)
    assert len(kept) <= 2000
    assert kept[-1:] == points[-1:]
    assert kept == points or len(kept) > 900
    assert len({b[0] - a[0] for a, b in pairwise(kept)}) <= 1


COLUMNS = ("rule", "loss", "bits/byte")
VALID = {"fingerprint": "f" * 16, "target_loss": "0.1", "steps_to_target": "20", "tokens_to_target": "160"}


@pytest.mark.parametrize(
    ("changes", "invalid"),
    [
        ({"target_loss": "low"}, "target_loss"),
        ({"target_loss": None}, "target_loss"),
        ({"fingerprint": None}, "fingerprint"),
        ({"steps_to_target": "x"}, "steps_to_target"),
        ({"tokens_to_target": "1e9"}, "tokens_to_target"),
    ],
)
def test_a_tag_that_is_no_number_is_refused(changes, invalid):  # C8
    require_valid_tags(VALID, "x version 1")
    require_valid_tags({"fingerprint": "f", "target_loss": "0.1"}, "x version 1")  # a target that was not reached
    tags = {tag: value for tag, value in (VALID | changes).items() if value is not None}
    with pytest.raises(IntegrityError, match=f"x version 1 has no valid tag {invalid}"):
        require_valid_tags(tags, "x version 1")


def test_a_row_of_the_table_has_the_loss_of_the_versions_rule_also_in_bits_per_byte():
    tags = {"rule": "validation", "validation_loss": "1.5", "validation_bits_per_byte": "0.25", "sliding_loss": "0.1"}
    tags |= {"sliding_bits_per_byte": "0.01"}
    cells = [
        [_row(SimpleNamespace(version="1", aliases=[], tags=each, creation_timestamp=0))[key] for key in COLUMNS]
        for each in (tags, {"rule": "sliding", "sliding_loss": "0.1"}, {})
    ]
    assert cells == [["validation", "1.5000", "0.2500"], ["sliding", "0.1000", "-"], ["-", "-", "-"]]


@pytest.mark.parametrize("content", ["[]", "{}", '{"sources": [], "environment": {}}', "[" * 100_000])
def test_a_forged_identity_is_one_line(content, tmp_path):  # C8
    (path := tmp_path / "identity.json").write_text(content)
    with pytest.raises(IntegrityError, match=r"identity\.json") as raised:
        read_identity(path, "x version 1")
    assert "\n" not in str(raised.value)


def test_a_forged_or_missing_tag_is_shown_unchanged_but_a_terminal_executes_nothing():  # C8
    tags = {"rule": "sliding", "sliding_loss": "low", "train_tokens": "∞", "target_loss": "\x1b[2J"}
    row = _row(SimpleNamespace(version=1, aliases=[], tags=tags, creation_timestamp=0))
    assert (row["loss"], row["train tokens"], row["steps to target"], row["aliases"]) == ("low", "∞", "-", "-")
    assert printable(row["target"]) == "�[2J"
    assert printable("a\nb\tc\u2028\u202e\ud800\x9b", also="\n") == "a\nb�c����"
    words = "　段　🏳\ufe0f\u200d🌈 \u00ab\u202fmot\u202f\u00bb می\u200cخواهم \U0001f6dc"  # spaces, joiners, Unicode 15
    assert printable(words) == words


@pytest.mark.parametrize(
    ("tags", "shown"),
    [
        ({"rule": "validation", "validation_loss": "1.86", "sliding_loss": "1.1"}, ("validation", "1.8600")),
        ({"rule": "corpus", "corpus_loss": "0.09", "sliding_loss": "3.0"}, ("corpus", "0.0900")),
        ({"rule": "validation"}, ("validation", "-")),
        ({"sliding_loss": "0.09"}, ("-", "-")),  # an early version
        ({"rule": "new", "sliding_loss": "0.09"}, ("new", "-")),  # of a later version of the project
    ],
)
def test_the_table_shows_the_target_rule_and_the_loss_that_it_compares(tags, shown):
    row = _row(SimpleNamespace(version=1, aliases=[], tags=tags, creation_timestamp=0))
    assert (row["rule"], row["loss"]) == shown
