"""Stage `download`: download the text to data/corpus.txt and data/corpus.sha256."""

from pathlib import Path

from pipeline.system.entrypoint import run_stage


def main() -> None:
    from pipeline.config.params import load_params
    from pipeline.config.sections import CorpusConfig
    from pipeline.data.corpus import fetch_corpus

    fetch_corpus(load_params().section(CorpusConfig), Path("data/corpus.txt"))


if __name__ == "__main__":
    run_stage(main)
