"""The settings of a sweep, and its study in memory."""

import pytest

from tests.studies import new_study, sweep_config


@pytest.fixture
def sweep():
    return sweep_config()


@pytest.fixture
def study(sweep):
    return new_study(sweep)
