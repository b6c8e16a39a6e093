"""Stage `download`: corpus.source or a mirror -> data/corpus.txt, its hash data/corpus.sha256, and data/bpe."""

from pathlib import Path

from pipeline.system.entrypoint import run_stage


def main() -> None:
    from pipeline.config.params import load_params
    from pipeline.config.sections import CorpusConfig
    from pipeline.data.corpus import fetch_corpus
    from pipeline.data.tokenizer import fetch_bpe

    config = load_params().section(CorpusConfig)
    fetch_corpus(config, Path("data/corpus.txt"))
    fetch_bpe(Path("data/bpe"))


if __name__ == "__main__":
    run_stage(main)
