"""The stage `tokenize`, killed in the middle of a shard, resumes after its last finished one."""

import os
import signal
import subprocess
import sys
from functools import partial
from pathlib import Path
from unittest.mock import patch

from fixtures_tokenizer import _project  # noqa: F401 (a fixture)

from pipeline.data import encode
from pipeline.data.encode import write_tokens
from pipeline.data.token_files import data_sha256
from stages import tokenize

ROOT = Path(__file__).parents[2]
SHARD_BYTES = 1 << 14

STAGE = """if True:
    import sys, time
    from functools import partial
    from pipeline.data import encode
    from pipeline.system.entrypoint import run_stage
    from stages import tokenize

    original, made = encode.write_shard, []

    def write_shard(path, batches, vocab_size):
        assert not {"torch", "mlflow", "pandas"} & set(sys.modules), "tokenize needs none of them"
        made.append(path)
        if len(made) > 2:
            path.write_bytes(b"half")
            print("half written", flush=True)
            time.sleep(600)
        original(path, batches, vocab_size)

    encode.write_shard = write_shard
    encode.write_tokens = partial(encode.write_tokens, shard_bytes=int(sys.argv[1]))
    run_stage(tokenize.main)
    """  # waits in the middle of its third shard


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_b7_a_killed_stage_resumes_after_its_last_finished_shard(project, tokenizer, monkeypatch, interruptible):
    monkeypatch.chdir(project)
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    for number, code, message in (
        (signal.SIGKILL, -signal.SIGKILL, ""),
        (signal.SIGINT, 130, "error: interrupted: run the same command again to repeat it\n"),
    ):
        command, pipe = [sys.executable, "-c", STAGE, str(SHARD_BYTES)], subprocess.PIPE
        process = subprocess.Popen(command, env=environment, stdout=pipe, stderr=pipe, text=True)
        assert "half written\n" in process.stdout, process.stderr.read()  # waits for that line, or for the end
        process.send_signal(number)
        assert process.communicate(timeout=60)[1] == message
        assert process.returncode == code
        assert not Path("data/tokens").exists()
    with (
        patch.object(encode, "write_tokens", partial(write_tokens, shard_bytes=SHARD_BYTES)),
        patch.object(encode, "write_shard", wraps=encode.write_shard) as write_shard,
    ):
        tokenize.main()
    assert names(Path("data")) == ["corpus.sha256", "corpus.txt", "tokenizer", "tokens"]
    assert (
        write_shard.call_count == len(names(Path("data/tokens"))) - 2 - 2 - 2
    )  # without the manifest, the key, and those
    write_tokens(Path("data/corpus.txt"), tokenizer, Path("clean"), 1.0, 0.1, shard_bytes=SHARD_BYTES)
    assert data_sha256(Path("data/tokens")) == data_sha256(Path("clean"))
