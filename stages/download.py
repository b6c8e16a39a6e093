"""Stage `download`: download the text and the tokenizer to data/corpus.txt, data/corpus.sha256 and data/tokenizer."""

from pathlib import Path

from pipeline.system.entrypoint import run_stage


def main() -> None:
    from pipeline.config.params import load_params
    from pipeline.config.sections import CorpusConfig
    from pipeline.data.corpus import fetch_corpus
    from pipeline.data.tokenizer import fetch_tokenizer

    config = load_params().section(CorpusConfig)
    fetch_corpus(config, Path("data/corpus.txt"))
    fetch_tokenizer(config.tokenizer, Path("data/tokenizer"))


if __name__ == "__main__":
    run_stage(main)
