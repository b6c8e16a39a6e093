"""Stage `download`: corpus.source or a mirror -> data/corpus.txt, its hash data/corpus.sha256, and data/bpe."""

from pathlib import Path

from pipeline.config import load_params
from pipeline.corpus import CorpusConfig, fetch_corpus
from pipeline.stage import run_stage
from pipeline.tokenizer import fetch_bpe


def main() -> None:
    config = load_params().section(CorpusConfig)
    fetch_corpus(config, Path("data/corpus.txt"))
    fetch_bpe(Path("data/bpe"))


if __name__ == "__main__":
    run_stage(main)
