"""Serve a version of the MLflow registry, and follow its alias when it moves."""

import tempfile
import threading
import time
import weakref
from functools import lru_cache
from pathlib import Path
from typing import Any, Literal

from pipeline.model.generator import load_generator
from pipeline.registry.artifacts import TEMPORARY, open_version
from pipeline.registry.catalog import aliases_of, describe_version, find_version, list_versions, open_registry
from pipeline.system.errors import InputError
from webapp.model_source import Listed, Served

CHECK_S = 3.0  # between two checks of the registry
RETRY_S = 30.0  # until the next check after a failure; hashing a large model takes seconds
KEPT = 3  # versions in memory: the served one, and two that are compared


class Registry:
    """The version that `which`, an alias or a number, names in the store of `root`; thread-safe.

    A thread checks the registry every CHECK_S, so that the first request after a quiet time gets the new version, too,
    and no request waits for the registry or for a version to load. If the new version cannot be loaded, the current one
    stays, and `trouble` says why.
    """

    def __init__(self, root: Path, name: str, which: str, precision: Literal["auto", "fp32", "bf16"] = "auto") -> None:
        """Raises ModelMissing or IntegrityError if the first version cannot be loaded."""
        self._name, self._which, self._precision = name, which, precision
        self._load = lru_cache(KEPT)(self._load_version)
        self.trouble: str | None = None
        self._store = open_registry(root)
        self._opened: dict[str, dict[str, Any]] = {}  # number -> info of each version that was loaded
        self._served = self._open(str(find_version(self._store, name, which).version))
        threading.Thread(target=_keep_following, args=(weakref.ref(self),), daemon=True, name="registry").start()

    def current(self) -> Served:
        """The version for the next request."""
        return self._served

    def follow(self) -> float:
        """Switch to the version that the registry names now; return the seconds until the next check."""
        try:
            version = find_version(self._store, self._name, self._which)
            served, aliases = self._open(str(version.version)), aliases_of(self._store, self._name)
            for number, info in list(self._opened.items()):  # a request may add a version
                info["aliases"] = sorted(alias for alias, of in aliases.items() if of == number)
            self._served, self.trouble = served, None
        except Exception as error:  # also a lack of memory
            self.trouble = f"{self._which} could not be loaded ({error}), so {self._served.label} stays"
            return RETRY_S
        return CHECK_S

    def versions(self) -> list[str]:
        return [version.number for version in self.listed()]

    def listed(self) -> list[Listed]:
        return [
            Listed(str(version.version), sorted(version.aliases), version.creation_timestamp // 1000)
            for version in list_versions(self._store, self._name)
        ]

    def open(self, number: str) -> Served:
        if number not in self._opened and number not in (known := self.versions()):
            raise InputError(f"version {number!r} is not in the registry: choose one of {', '.join(known)}")
        return self._open(number)

    def _open(self, number: str) -> Served:
        served = self._load(number)
        self._opened[number] = served.info
        return served

    def _load_version(self, number: str) -> Served:
        version = find_version(self._store, self._name, number)
        with tempfile.TemporaryDirectory(prefix=TEMPORARY) as copies:  # of the files, if the store is not local
            files = open_version(self._store, version, Path(copies))
            info = describe_version(self._store, version, files)
            return Served(load_generator(files, self._precision), info)


def _keep_following(registry: weakref.ref[Registry]) -> None:
    """Let a registry check its store until nobody uses it."""
    wait = CHECK_S
    while True:
        time.sleep(wait)
        if (used := registry()) is None:
            return
        wait = used.follow()
        del used
