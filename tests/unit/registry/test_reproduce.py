"""Why a version that was trained again has other weights."""

import pytest

from pipeline.registry.reproduce import reason_for_difference


@pytest.mark.parametrize(
    ("fingerprint", "threads", "reason"),
    [
        ("another", 64, "its fingerprint is another instead of same"),
        ("same", 64, r"the environment differs (threads 2 -> 64)"),
        ("same", 2, "the environment is the same, so the training is not deterministic"),
    ],
)
def test_the_first_difference_explains_other_weights(fingerprint, threads, reason):
    again = {"fingerprint": fingerprint, "environment": {"torch": "2.13", "threads": threads}}
    assert reason_for_difference(again, "same", {"torch": "2.13", "threads": 2}) == reason
