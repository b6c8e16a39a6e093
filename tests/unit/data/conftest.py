"""These tests do not flush files to the disk, which would take most of their time."""

from collections.abc import Iterator

import pytest

from pipeline.system import files


@pytest.fixture(autouse=True, scope="module")
def _no_fsync() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(files, "fsync", lambda path: None)
        yield
