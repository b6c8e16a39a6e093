"""Stage `tokenizer`: download the tokenizer to data/tokenizer, or train it on the training part of data/corpus.txt."""

from pathlib import Path

from pipeline.system.entrypoint import run_stage


def main() -> None:
    from pipeline.config.params import load_params
    from pipeline.config.sections import CorpusConfig
    from pipeline.data.corpus import verify_corpus
    from pipeline.data.encode import training_text
    from pipeline.data.tokenizer import make_tokenizer

    config = load_params().section(CorpusConfig)
    corpus, folder = Path("data/corpus.txt"), Path("data/tokenizer")
    verify_corpus(corpus)
    tokenizer = make_tokenizer(config.tokenizer, folder, training_text(corpus, config.fraction, config.val_fraction))
    print(f"{folder}: the tokenizer {tokenizer.name}, {tokenizer.n_vocab:,} ids")


if __name__ == "__main__":
    run_stage(main)
