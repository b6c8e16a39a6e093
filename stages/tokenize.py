"""Stage `tokenize`: encode data/corpus.txt to data/tokens, and write statistics to reports/corpus.json."""

from pathlib import Path

from pipeline.system.entrypoint import run_stage


def main() -> None:
    from pipeline.config.params import load_params
    from pipeline.config.sections import CorpusConfig
    from pipeline.data.corpus import verify_corpus
    from pipeline.data.encode import write_tokens
    from pipeline.data.statistics import describe_corpus
    from pipeline.data.token_files import TokenFolder
    from pipeline.data.tokenizer import load_tokenizer
    from pipeline.system.files import write_json

    config = load_params().section(CorpusConfig)
    corpus, folder = Path("data/corpus.txt"), Path("data/tokens")
    verify_corpus(corpus)
    tokenizer = load_tokenizer(Path("data/tokenizer"), config.tokenizer)
    write_tokens(corpus, tokenizer, folder, config.fraction, config.val_fraction)
    text = TokenFolder(folder)
    print(f"{folder}: {len(text.train):,} tokens to train on, {len(text.val):,} to validate; now its statistics")
    write_json(Path("reports/corpus.json"), describe_corpus(text.train, text.val, tokenizer))


if __name__ == "__main__":
    run_stage(main)
