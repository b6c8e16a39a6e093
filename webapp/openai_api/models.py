"""The models of /v1/models: the served version, and each registered version by its number and its aliases."""

import asyncio
import time
from typing import Any

from starlette.concurrency import run_in_threadpool

from pipeline.system.errors import PipelineError
from webapp.model_source import Listed, Served, Source
from webapp.openai_api.errors import ApiError

FRESH_S = 3.0  # for so long a listing of the registry is used


class Models:
    """Ids of versions: NAME is the served version; NAME@2 and NAME@champion, or 2 and champion, are others."""

    def __init__(self, source: Source) -> None:
        self._source = source
        self._listing, self._opening = asyncio.Lock(), asyncio.Lock()  # one at a time
        self._listed: list[Listed] = []
        self._due = 0.0

    async def listing(self) -> list[dict[str, Any]]:
        """The models as OpenAI lists them. Raises ApiError if the registry has not answered yet."""
        versions, served = await self._versions(), self._source.current()
        name = served.info["name"]
        created = {version.number: version.created for version in versions}
        ids = {name: str(served.info["version"])}
        for version in versions:
            ids |= {f"{name}@{key}": version.number for key in (*version.aliases, version.number)}
        return [
            {"id": key, "object": "model", "created": created.get(number, 0), "owned_by": "registry", "version": number}
            for key, number in ids.items()
        ]

    async def model(self, wanted: str) -> dict[str, Any]:
        """One of them. Raises ApiError if there is none of this id."""
        name = self._source.current().info["name"]
        listing = await self.listing()
        for each in listing:
            if wanted in (each["id"], str(each["id"]).removeprefix(f"{name}@")):
                return each
        known = ", ".join(str(each["id"]) for each in listing[:8])
        raise ApiError(404, f"The model {wanted!r} does not exist: choose one of {known}", "model", "model_not_found")

    async def open(self, wanted: str | None) -> Served:
        """The version of an id, which is loaded if it is not in memory; None: the served version. Raises ApiError.

        The served version needs no answer of the registry.
        """
        served = self._source.current()
        name, number, aliases = (served.info[key] for key in ("name", "version", "aliases"))
        if wanted in (None, name) or str(wanted).removeprefix(f"{name}@") in (str(number), *aliases):
            return served
        number = (await self.model(str(wanted)))["version"]
        async with self._opening:  # so that no version is loaded twice
            try:
                return await run_in_threadpool(self._source.open, number)
            except PipelineError as error:
                raise ApiError(503, f"{error}", "model") from None

    async def _versions(self) -> list[Listed]:
        """The versions of the registry; the last ones that it named if it does not answer now."""
        async with self._listing:
            if time.monotonic() >= self._due:
                try:
                    self._listed = await run_in_threadpool(self._source.listed)
                except PipelineError as error:
                    if not self._listed:
                        raise ApiError(503, f"{error}", "model") from None
                self._due = time.monotonic() + FRESH_S
            return self._listed
