"""registry_source: a name and an alias of MLflow's registry -> the version behind it, looked at between requests."""

import threading
import time
from collections import OrderedDict
from pathlib import Path

from pipeline.model.generator import load_generator
from pipeline.registry.catalog import describe_version, find_version, list_versions, open_registry, open_version
from pipeline.system.errors import InputError, PipelineError
from webapp.model_source import Served

CHECK_S = 3.0  # between two looks at the registry
RETRY_S = 30.0  # after a failure: to hash a large model takes seconds
KEPT = 3  # versions in memory: the one that is served, and two side by side


class Registry:
    """The version that `which`, an alias or a number, names in the store of `root`.

    Thread-safe. A version that cannot be loaded leaves the one before in its place, and `trouble` says why.
    """

    def __init__(self, root: Path, name: str, which: str) -> None:
        """Raises ModelMissing or IntegrityError where there is nothing to begin with."""
        self._name, self._which = name, which
        self._looking, self._loading = threading.Lock(), threading.Lock()
        self._opened: OrderedDict[str, Served] = OrderedDict()
        self._broken, self._retry = "", 0.0  # the number that could not be loaded, and when to try it again
        self.trouble: str | None = None
        self._store = open_registry(root)
        self._served = self._open(str(find_version(self._store, name, which).version))
        self._due = time.monotonic() + CHECK_S

    def current(self) -> Served:
        """The version to serve a request with; none waits for the registry, or for another version to be loaded."""
        if time.monotonic() >= self._due and self._looking.acquire(blocking=False):
            threading.Thread(target=self._look, daemon=True).start()
        return self._served

    def _look(self) -> None:
        """Serve whatever the registry names now."""
        try:
            version = find_version(self._store, self._name, self._which)
            number, now = str(version.version), time.monotonic()
            if number != self._broken or now >= self._retry:
                self._broken, self._retry = number, now + RETRY_S
                served = self._open(number)
                served.facts["aliases"] = sorted(version.aliases)
                self._served, self._broken, self.trouble = served, "", None
        except PipelineError as error:
            self.trouble = f"{self._which} could not be loaded ({error}), so {self._served.label} stays"
        finally:
            self._due = time.monotonic() + CHECK_S
            self._looking.release()

    def versions(self) -> list[str]:
        return [str(version.version) for version in list_versions(self._store, self._name)]

    def open(self, number: str) -> Served:
        if number not in self.versions():
            raise InputError(f"version {number!r} is not in the registry: choose one of {', '.join(self.versions())}")
        return self._open(number)

    def _open(self, number: str) -> Served:
        """Load a version, or find it among those that were loaded last."""
        with self._loading:
            if number not in self._opened:
                version = find_version(self._store, self._name, number)
                folder = open_version(self._store, version)
                self._opened[number] = Served(load_generator(folder), describe_version(self._store, version))
            self._opened.move_to_end(number)
            while len(self._opened) > KEPT:
                self._opened.popitem(last=False)
            return self._opened[number]
