"""Write a registered version as a zip file of some kB, for the test that later programs can still read it.

    python -m tests.versions.make NUMBER tests/versions/format-1.zip

runs in a project that has registered version NUMBER. Format 1 was written so, from the recipe `smoke` with these
changes: `corpus.source: texts/days.txt` (48 lines such as `Day 1: the cat slept in the hall.`),
`corpus.tokenizer: bytes`, `model.n_layer: 1`, `model.n_embd: 16`, `model.block_size: 16`, `windows.seq_len: 16`,
`windows.micro_batch_size: 16`, `optim.max_epochs: 20`, `target.loss: 1.5` and `registry.model: days`. All files are
those of the program, except that of its code only pyfunc.py is kept, since nothing runs it, that MLmodel does not say
where the code was, and that the listing and its tag are then written again.
"""

import json
import shutil
import sys
import tempfile
from pathlib import Path

from pipeline.commands.arguments import open_project_registry
from pipeline.registry.artifacts import LISTING_TAG, _write_listing, open_version
from pipeline.registry.catalog import HISTORY, find_version
from pipeline.system.host import SOURCE_ROOT

CODE = "code/pipeline/registry/pyfunc.py"
OF_THIS_MACHINE = ("host", "run_folder", "model_id", "run_id")  # tags


def write(number: str, path: Path) -> None:
    store, name = open_project_registry()
    version = find_version(store, name, number)
    run = store.client.get_run(version.run_id)
    with tempfile.TemporaryDirectory() as folder:
        files = shutil.copytree(open_version(store, version).parent, Path(folder, "files"))
        code = (files / CODE).read_bytes()
        shutil.rmtree(files / "code")
        (files / CODE).parent.mkdir(parents=True)
        (files / CODE).write_bytes(code)
        model = files / "MLmodel"  # MLflow notes where the code was
        model.write_text(model.read_text(encoding="utf-8").replace(str(SOURCE_ROOT), "/project"), encoding="utf-8")
        histories = {key: store.client.get_metric_history(version.run_id, key) for key in HISTORY}
        described = {
            "tags": _without(version.tags) | {LISTING_TAG: _write_listing(files)},
            "run_tags": _without(run.data.tags),
            "params": run.data.params,
            "metrics": {key: [[p.step, p.value, p.timestamp] for p in points] for key, points in histories.items()},
        }
        Path(folder, "version.json").write_text(json.dumps(described, indent=1))
        shutil.make_archive(str(path.with_suffix("")), "zip", folder)


def _without(tags: dict[str, str]) -> dict[str, str]:
    return {key: value for key, value in tags.items() if key not in OF_THIS_MACHINE and not key.startswith("mlflow.")}


if __name__ == "__main__":
    write(sys.argv[1], Path(sys.argv[2]))
