"""Whether the present code gives the fingerprint of a version."""

from pathlib import Path

from fixtures_registry import save_small_model

from pipeline.config.params import load_params
from pipeline.data.token_files import data_sha256, write_shard
from pipeline.registry import reproduce
from pipeline.system.files import write_manifest
from pipeline.tracking.fingerprint import fingerprint_of
from pipeline.training.config import RunConfig
from tests.trainings import change

ROOT = Path(__file__).parents[3]


def test_the_fingerprint_of_a_version_for_a_gpu_is_computed_on_any_machine(tmp_path, bpe):
    save_small_model(tmp_path / "model", bpe, trained_length=8, fold_vocab=True)
    (tmp_path / "params.yaml").write_bytes((ROOT / "params.yaml").read_bytes())
    change(tmp_path, **{"train.device": "cuda"})
    (tokens := tmp_path / "tokens").mkdir()
    write_shard(tokens / "train-00000.bin", [list(range(20))], 50257)
    write_manifest(tokens)
    config = RunConfig.of(load_params(tmp_path / "params.yaml")).sized_for(50257)
    assert reproduce._fingerprint_here(tmp_path) == fingerprint_of(data_sha256(tokens), config.decisive)
