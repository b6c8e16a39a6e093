"""The models of the API while the registry does not answer."""

import asyncio
from types import SimpleNamespace

import pytest

from pipeline.system.errors import ModelMissing
from webapp.model_source import Listed
from webapp.openai_api import models as module
from webapp.openai_api.errors import ApiError
from webapp.openai_api.models import Models

SERVED = SimpleNamespace(info={"name": "parrot", "version": "7", "aliases": ["champion"]})


class Source:
    """Serves version 7; its registry can fail."""

    def __init__(self, fails=False):
        self.fails, self.n_listings = fails, 0

    def current(self):
        return SERVED

    def listed(self):
        self.n_listings += 1
        if self.fails:
            raise ModelMissing("the store is locked")
        return [Listed("7", ["champion"], 2), Listed("6", [], 1)]

    def open(self, number):
        return number


def test_the_served_version_is_opened_by_each_of_its_names_without_the_registry():
    models = Models(source := Source(fails=True))
    for wanted in (None, "parrot", "7", "champion", "parrot@7", "parrot@champion"):
        assert asyncio.run(models.open(wanted)) is SERVED
    assert source.n_listings == 0
    with pytest.raises(ApiError, match="the store is locked"):
        asyncio.run(models.open("6"))


def test_requests_at_once_share_a_listing_and_the_last_one_is_used_when_the_registry_fails(monkeypatch):
    models = Models(source := Source())

    async def at_once():
        return await asyncio.gather(*(models.open("6") for _ in range(5)))

    assert asyncio.run(at_once()) == ["6"] * 5
    assert source.n_listings == 1
    source.fails = True
    monkeypatch.setattr(module, "FRESH_S", 0.0)
    models._due = 0.0
    assert asyncio.run(models.open("6")) == "6"
    assert source.n_listings == 2
