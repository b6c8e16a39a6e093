"""The stage `tokenize`, killed in the middle of a shard."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from fixtures_tokenizer import _project  # noqa: F401 (a fixture)

from pipeline.data.encode import write_tokens
from pipeline.data.token_files import data_sha256

ROOT = Path(__file__).parents[2]

STAGE = """if True:
    import sys, time
    from pathlib import Path
    from pipeline.data import encode
    from pipeline.system.entrypoint import run_stage
    from stages import tokenize

    original, made = encode.write_shard, []

    def write_shard(path, batches, vocab_size):
        made.append(path)
        if len(made) > int(sys.argv[1]):
            path.write_bytes(b"half")
            print("half written", flush=True)
            time.sleep(60)
        original(path, batches, vocab_size)
        Path("made").write_text(str(len(made)))

    encode.write_shard = write_shard
    encode.write_tokens.__defaults__ = (1.0, 0.0, None, 1 << 18, None)
    run_stage(tokenize.main)
    """  # stands still in the middle of a shard, once it has made as many as it is told


def start(project, n_shards):
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", STAGE, str(n_shards)]
    pipe = subprocess.PIPE
    return subprocess.Popen(command, cwd=project, env=environment, stdout=pipe, stderr=pipe, text=True)


@pytest.mark.fault
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL, signal.SIGINT])
def test_b7_a_killed_stage_goes_on_at_its_last_finished_shard(project, tokenizer, number, interruptible):
    process = start(project, 2)
    assert "half written\n" in process.stdout, process.stderr.read()  # waits for that line, or for the end
    process.send_signal(number)
    said = process.communicate(timeout=30)[1]
    assert process.returncode == (130 if number == signal.SIGINT else -number)
    assert said == ("error: interrupted: run the same command again to repeat it\n" if number == signal.SIGINT else "")
    assert not (project / "data" / "tokens").exists()
    process = start(project, 1000)
    said = process.communicate(timeout=60)[1]
    assert process.returncode == 0, said
    write_tokens(project / "data" / "corpus.txt", tokenizer, project / "clean", 1.0, 0.1, shard_bytes=1 << 18)
    assert data_sha256(project / "data" / "tokens") == data_sha256(project / "clean")
    assert int((project / "made").read_text()) == len(names(project / "clean")) - 1 - 2  # but the manifest, and those
    assert names(project / "data") == ["corpus.sha256", "corpus.txt", "tokenizer", "tokens"]


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())
