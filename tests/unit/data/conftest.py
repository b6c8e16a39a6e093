"""Disk writes of these tests are not flushed: tests/unit/system and the tests of checkpoints hold when they must be."""

from collections.abc import Iterator

import pytest

from pipeline.system import files


@pytest.fixture(autouse=True, scope="module")
def _no_fsync() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(files, "fsync", lambda path: None)
        yield
