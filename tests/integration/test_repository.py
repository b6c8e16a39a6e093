"""What git has, or would add: no weights, stores, large files or secrets."""

import re
import subprocess
from pathlib import Path

import pytest

from pipeline.system.host import git

ROOT = Path(__file__).parents[2]
LARGEST_BYTES, LARGEST_PICTURE_BYTES = 1_000_000, 250_000  # a picture of the page has 190,000
GENERATED = re.compile(
    r"\.(safetensors|pth?|bin|ckpt|onnx|gguf|h5|pkl|pickle|npy|npz|db|sqlite3?|whl|zip|zst|gz|tar)(-\w+)?$"
)
FORMAT_1 = ROOT / "tests/versions/format-1.zip"  # a registered version, which every later release must read
SECRET = re.compile(
    rb"-----BEGIN [A-Z ]*PRIVATE KEY|\bAKIA[0-9A-Z]{16}\b|\b(gh[a-z]|hf|sk|github_pat|xox[a-z])[-_][A-Za-z0-9_-]{20,}"
)


@pytest.mark.skipif(not git("ls-files", "dvc.yaml", folder=ROOT), reason="git does not track this folder")
def test_no_weights_stores_large_files_or_secrets_are_committed():
    listing = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    names = subprocess.check_output(listing, cwd=ROOT, text=True).split("\0")
    committed = [ROOT / name for name in names if (ROOT / name).is_file()]
    assert len(committed) > 100  # the listing works
    for path in committed:
        is_picture = path.suffix in (".png", ".jpg", ".jpeg", ".gif", ".webp")
        assert path == FORMAT_1 or not GENERATED.search(path.name), path
        assert path.stat().st_size <= (LARGEST_PICTURE_BYTES if is_picture else LARGEST_BYTES), path
        assert not SECRET.search(path.read_bytes()), path
