"""Download the files of data sets on the Hugging Face Hub, and those of object stores."""

import glob
import logging
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path, PurePosixPath
from typing import Any
from urllib.parse import unquote

from pipeline.config.sections import HUB, STORES
from pipeline.data.documents import OPENERS, TABLES
from pipeline.system.errors import DISK_FULL, InputError, OutOfSpaceError, one_line
from pipeline.system.progress import Bar

AGENT = "gpt2-to-target"
TRAIN = re.compile(r"(?<![a-z])train(?![a-z])", re.IGNORECASE)  # in the paths of a training split
HIDDEN = re.compile(r"(^|/)\.")
NO_TEXTS = {"dataset_infos.json", "dataset_dict.json"}  # they describe a data set


def fetch_hub(source: str) -> dict[str, Path]:
    """Download the files of `hf://datasets/OWNER/NAME[@REVISION][/PATH]` into the Hub's cache; return name -> file.

    The environment decides as for all programs of the Hub: HF_HOME, HF_TOKEN, HF_ENDPOINT, HF_HUB_OFFLINE. If the Hub
    cannot be reached, the cache must have the files. Interrupted downloads are resumed. Raises InputError or
    OutOfSpaceError.
    """
    from huggingface_hub import errors, get_cached_repo_tree, snapshot_download

    found = HUB.fullmatch(source)
    assert found, "CorpusConfig has checked it"
    repo, revision = found["repo"], unquote(found["revision"] or "main")
    download = partial(snapshot_download, repo, repo_type="dataset", user_agent=AGENT, tqdm_class=Bar)
    logging.getLogger("huggingface_hub").setLevel(logging.ERROR)  # it warns of a download of no file, a listing
    with hub_as_one_line(source, repo):
        folder = Path(download(revision=revision, allow_patterns=[]))
    commit = folder.name
    try:
        listing = [file.path for file in get_cached_repo_tree(repo, repo_type="dataset", revision=commit)]
    except errors.CachedRepoTreeNotFoundError:  # the Hub cannot be reached, and another program has filled the cache
        listing = [file.relative_to(folder).as_posix() for file in folder.rglob("*") if file.is_file()]
    names = choose_files(listing, found["path"] or "", source)
    with hub_as_one_line(source, repo):
        download(revision=commit, allow_patterns=[glob.escape(name) for name in names])
    print(f"{source}: {len(names):,} files of commit {commit}")
    return {f"hf://datasets/{repo}/{name}": folder / name for name in names}


def fetch_store(source: str, folder: Path, **options: Any) -> dict[str, Path]:
    """Download the files of an object store, such as `s3://BUCKET/KEY`, into `folder`; return name -> file.

    The key may be that of a file, a folder or a glob. Credentials and endpoint are those of the environment, as for all
    programs of the store; without any, s3 is read as anybody. Raises InputError.
    """
    from fsspec.callbacks import TqdmCallback
    from fsspec.core import url_to_fs

    scheme = source.partition(":")[0]
    folder.mkdir(exist_ok=True)
    files = {}
    try:
        system, root = url_to_fs(source, skip_instance_cache=True, **options)
        if system.isfile(root):
            names = [root]
        else:
            found = (system.glob if set(root) & set("*?[") else system.find)(root, detail=True)
            names = sorted(
                name for name, info in found.items() if info["size"] and not HIDDEN.search(name)
            )  # no folders
        for number, name in enumerate(names):
            file = files[f"{scheme}://{name}"] = folder / f"{number}"
            bar = {"desc": f"{scheme}://{name}", "unit": "B", "unit_scale": True}
            system.get_file(name, file, callback=TqdmCallback(tqdm_kwargs=bar, tqdm_cls=Bar))
            if (received := file.stat().st_size) != (size := system.info(name)["size"]):
                raise OSError(f"ended after {received:,} of {size:,} bytes")
    except ImportError:
        package = STORES[scheme]
        install = "make install EXTRAS=s3" if scheme == "s3" else f"python -m pip install {package}"
        raise InputError(f"{source} needs the package {package}: `{install}` adds it") from None
    except Exception as error:  # those of botocore have no base in common with OSError
        if type(error).__name__ == "NoCredentialsError" and not options:
            return fetch_store(source, folder, anon=True)
        if isinstance(error, OSError) and error.errno in DISK_FULL:
            raise
        hint = ": check the credentials" if isinstance(error, PermissionError) else ""
        raise InputError(f"could not download {source}: {without_queries(error)}{hint}") from None
    if not files:
        raise InputError(f"{source} matches no file: check corpus.source")
    return files


@contextmanager
def hub_as_one_line(source: str, repo: str, kind: str = "data set", hint: str = "") -> Iterator[None]:
    """Replace the errors of huggingface_hub, which have no base in common, by ours.

    `hint`: what to do if the Hub cannot be reached.
    """
    from huggingface_hub import constants, errors

    page = f"datasets/{repo}" if kind == "data set" else repo
    try:
        yield
    except errors.GatedRepoError:
        what = f"accept its terms at {constants.ENDPOINT}/{page}, then run `hf auth login` or set HF_TOKEN"
    except errors.RepositoryNotFoundError:
        what = f"there is no such {kind}, or it is private: check its name, `hf auth login` or HF_TOKEN"
    except errors.RevisionNotFoundError:
        what = f"the {kind} has no such revision"
    except errors.LocalEntryNotFoundError as error:
        reason = f" ({without_queries(error.__cause__)})" if error.__cause__ else ""
        what = f"the Hub cannot be reached{reason}, and the cache in {constants.HF_HUB_CACHE} lacks files of it{hint}"
    except Exception as error:
        if isinstance(error, OSError) and error.errno in DISK_FULL:
            raise OutOfSpaceError(f"disk full in {constants.HF_HUB_CACHE}: free some space, or set HF_HOME") from None
        what = without_queries(error)
    else:
        return
    raise InputError(f"could not download {source}: {what}")


def without_queries(error: BaseException) -> str:
    """The message of an error in one line, without the queries of its URLs, which may contain signatures."""
    return re.sub(r"\?[^\s'\"]*", "", one_line(error)) or type(error).__name__


def choose_files(listing: Sequence[str], pattern: str, source: str) -> list[str]:
    """The files of `source` that `pattern` selects, sorted: a file, a folder, a glob, or the training split if empty.

    `listing`: the paths of all files. Hidden files are ignored, and the README.md of the top folder. Raises InputError
    if there is none, or if it is not clear which files are the training split.
    """
    from fsspec.utils import glob_translate

    visible = sorted(name for name in listing if not HIDDEN.search(name) and name != "README.md")
    if pattern in listing:
        return [pattern]
    if not pattern:
        return _training_split(visible, source)
    if found := [name for name in visible if name.startswith(pattern.rstrip("/") + "/")]:
        return found
    try:
        matches = re.compile(glob_translate(pattern)).match
    except ValueError:
        raise InputError(f"{source}: ** must be a whole part, as in **/*.txt: fix corpus.source") from None
    if not (found := [name for name in visible if matches(name)]):
        raise InputError(f"{source} matches no file: it has {', '.join(visible[:5])}{', ...' * (len(visible) > 5)}")
    return found


def _training_split(names: Sequence[str], source: str) -> list[str]:
    """The texts and tables whose paths say `train`, or all, if none does; they must be of one kind in one folder."""
    texts = [name for name in names if _kind(name) in {".txt", *TABLES} and name not in NO_TEXTS]
    texts = [name for name in texts if TRAIN.search(name)] or texts
    places = {(PurePosixPath(name).parent, _kind(name)): name for name in reversed(texts)}
    if len(places) == 1:
        return texts
    examples = ", ".join([*places.values()][:-6:-1])
    what = f"texts of several kinds or in several folders ({examples})" if texts else "no texts and no tables"
    raise InputError(f"{source} has {what}: name a file, a folder or a glob of it, as in {source}/data/*.parquet")


def _kind(name: str) -> str:
    """The suffix of a file, without that of its compression."""
    suffixes = [suffix.lower() for suffix in PurePosixPath(name).suffixes]
    return ([suffix for suffix in suffixes[-2:] if suffix not in OPENERS] or [""])[-1]
