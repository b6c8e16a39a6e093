"""Stage `tokenizer`: download or train the tokenizer, to data/tokenizer; convert published weights, to data/init."""

from collections.abc import Iterator
from pathlib import Path

from pipeline.system.entrypoint import run_stage


def main() -> None:
    from pipeline.config.params import load_params
    from pipeline.config.sections import CorpusConfig, ModelConfig
    from pipeline.data.corpus import verify_corpus
    from pipeline.data.encode import training_text
    from pipeline.data.tokenizer import make_tokenizer
    from pipeline.model.published import write_init

    params = load_params()
    config, model = params.section(CorpusConfig), params.section(ModelConfig)
    corpus, folder = Path("data/corpus.txt"), Path("data/tokenizer")
    verify_corpus(corpus)

    def text() -> Iterator[bytes]:
        return iter(training_text(corpus, config.fraction, config.val_fraction))

    tokenizer = make_tokenizer(config.tokenizer, folder, text())
    print(f"{folder}: the tokenizer {tokenizer.name}, {tokenizer.n_vocab:,} ids")
    print(f"{(init := Path('data/init'))}: {write_init(model, init, tokenizer, next(text(), b'').decode())}")


if __name__ == "__main__":
    run_stage(main)
