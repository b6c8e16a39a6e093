"""What tests of trainings share: a recorder that does nothing, and changes of a project's params.yaml."""

from pathlib import Path
from typing import Any

import yaml


class Untracked:
    """Replaces the recorder where MLflow is not tested."""

    def __init__(self, *arguments: object) -> None:
        pass

    def __enter__(self) -> "Untracked":
        return self

    def __exit__(self, *error: object) -> None:
        pass


def change(folder: Path, **values: Any) -> None:
    """Set dotted keys, such as `optim.lr`, in `folder`/params.yaml."""
    params = yaml.safe_load((folder / "params.yaml").read_text())
    for key, value in values.items():
        section, name = key.split(".")
        params[section][name] = value
    (folder / "params.yaml").write_text(yaml.safe_dump(params))
