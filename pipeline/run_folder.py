"""run_folder: the folder of a run, `checkpoints/<fingerprint>/` -> claimed by the set-up that may go on in it."""

from pathlib import Path

from pipeline.files import locked, read_json, write_json
from pipeline.fingerprint import Identity, differences
from pipeline.recorder import RECORDER_LOCK

IDENTITY = "identity.json"


def claim_folder(folder: Path, identity: Identity) -> None:
    """Make the run's folder, or accept it as it is; one that another set-up began is moved aside, and kept."""
    if (folder / IDENTITY).is_file():
        if not (changed := differences(read_json(folder / IDENTITY), identity)):
            return
        aside = next(path for i in range(1, 1000) if not (path := folder.with_suffix(f".{i}")).exists())
        with locked(folder / RECORDER_LOCK, wait=True):  # the last attempt may still be sent
            folder.rename(aside)
        print(f"starting anew: {', '.join(changed)}; the checkpoints so far are kept in {aside}")
    folder.mkdir(parents=True, exist_ok=True)
    write_json(folder / IDENTITY, identity)


def tell_what_is_new(folder: Path, identity: Identity) -> None:
    """Say how a run differs from the one begun before it."""
    others = sorted(set(folder.parent.glob(f"*/{IDENTITY}")) - {folder / IDENTITY}, key=lambda p: p.stat().st_mtime)
    if others:
        changed = differences(read_json(others[-1]), identity)
        print(f"a new run, not the last one's ({others[-1].parent.name}): {', '.join(changed)}")
