"""Stage `download_tokenizer`: download the files of the tokenizer to data/tokenizer, unless they are there."""

from pathlib import Path

from pipeline.system.entrypoint import run_stage


def main() -> None:
    from pipeline.config.params import load_params
    from pipeline.config.sections import CorpusConfig
    from pipeline.data.tokenizer import fetch_tokenizer

    config = load_params().section(CorpusConfig)
    fetch_tokenizer(config.tokenizer, Path("data/tokenizer"))


if __name__ == "__main__":
    run_stage(main)
