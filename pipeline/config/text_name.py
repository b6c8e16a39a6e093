"""The short name of a text, for its model and its runs."""

import re

COMMON = {"input", "train", "text", "texts", "data", "corpus", "main", "resolve"}  # names that say nothing of a text
SCHEME = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*:/*")
SUFFIX = re.compile(
    r"(\.(txt|text|md|markdown|rst|tex|log|csv|tsv|json|jsonl|ndjson|parquet))?(\.(gz|zst))?\Z", re.IGNORECASE
)


def text_name(source: str) -> str:
    """The name of the text `source`, a path or a URL, such as tinyshakespeare for .../tinyshakespeare/input.txt.

    It is the last part of the path that has no wildcard and is not in COMMON, without the suffix of a text. Empty if
    there is no such part.
    """
    if scheme := SCHEME.match(source):
        source = re.split("[?#]", source[scheme.end() :])[0]
    parts = source.split("/")
    names = [SUFFIX.sub("", part) for part in parts if not set("*?[") & set(part)]
    names = [name for name in names if re.search(r"\w", name)]
    return next((name for name in reversed(names) if name.lower() not in COMMON), names[-1] if names else "")
