"""README and docs: links lead somewhere, commands exist, and the reference is what docs/generate.py writes."""

import re
import runpy
from pathlib import Path
from urllib.parse import unquote

import pytest

from pipeline.config.sections import SlurmConfig, SweepConfig
from tests.commands import check, commands_in

ROOT = Path(__file__).parents[2]
PLACES = ("*.md", "docs/**/*.md", "texts/README.md", "weights/README.md", "tests/README.md", "benchmarks/LOG.md")
PAGES = {path: path.read_text(encoding="utf-8") for place in PLACES for path in sorted(ROOT.glob(place))}
GENERATE = runpy.run_path(str(ROOT / "docs" / "generate.py"))
COMMENTS = dict(GENERATE["read_comments"]((ROOT / "params.yaml").read_text(encoding="utf-8")))


def without_code(text):
    return re.sub(r"`[^`\n]+`", "`code`", re.sub(r"^```.*?^```", "", text, flags=re.MULTILINE | re.DOTALL))


def anchors(text):
    """The anchors of a page's headings, as GitHub and the site make them."""
    headings = re.findall(r"^#+ (.+)$", re.sub(r"^```.*?^```", "", text, flags=re.MULTILINE | re.DOTALL), re.MULTILINE)
    names = [re.sub(r"\[([^]]*)\]\([^)]*\)", r"\1", heading).lower().strip() for heading in headings]
    return {re.sub(r"[^\w\- ]", "", name).replace(" ", "-") for name in names}


def flaw_of(page, link):
    """What is wrong with a link of a page, if it does not lead to another host."""
    if re.match(r"https?:|mailto:", link):
        return None
    path, _, anchor = unquote(link).partition("#")
    target = (page.parent / path).resolve() if path else page
    if not (target.is_relative_to(ROOT) and target.exists()):
        return "no such file"
    if target.is_dir():
        return None
    return "no such heading" if anchor and anchor not in anchors(PAGES.get(target) or target.read_text()) else None


def test_each_link_leads_to_a_file_and_to_a_heading_in_it():
    found = [
        (page, link)
        for page, text in PAGES.items()
        for link in re.findall(r"\]\(([^)\s]+)[^)]*\)|(?:src|href)=\"([^\"]+)\"", without_code(text))
    ]
    links = [(page, "".join(link)) for page, link in found]
    assert len(links) > 100
    flaws = [f"{page.relative_to(ROOT)}: {link}: {flaw}" for page, link in links if (flaw := flaw_of(page, link))]
    assert not flaws, "\n".join(flaws)


MESSAGES = re.compile(r"^\| .*? \|", re.MULTILINE)  # the first column of the tables of troubleshooting.md
SHOWN = {
    page: [
        (line, complete)
        for line, complete in commands_in(MESSAGES.sub("|", text) if page.name == "troubleshooting.md" else text)
        if "COMMAND" not in line
    ]
    for page, text in PAGES.items()
    if page.name in ("README.md", "CONTRIBUTING.md") or page.is_relative_to(ROOT / "docs")
    if page.name != "command-line.md"  # it is made from the parsers
}


@pytest.mark.parametrize("page", SHOWN, ids=lambda page: str(page.relative_to(ROOT)))
def test_each_command_of_a_page_exists_with_its_flags(page):
    for line, complete in SHOWN[page]:
        try:
            check(line, complete)
        except (Exception, SystemExit) as error:
            raise AssertionError(f"{line}: {error}") from error


def test_each_command_that_a_message_or_a_docstring_names_exists():
    sources = [path for place in ("pipeline", "stages", "webapp") for path in (ROOT / place).rglob("*.py")]
    for path in [ROOT / "app.py", *sources]:
        for command in re.findall(
            r"`((?:totarget|python -m pipeline|make) [^`\n]+)`", path.read_text(encoding="utf-8")
        ):
            assert check(re.sub(r"\{[^{}]*\}", "1", command), complete=False), path


def test_the_commands_are_found():
    lines = [line for commands in SHOWN.values() for line, complete in commands if complete]
    for program in ("totarget", "make", "dvc"):
        assert sum(line.startswith(program) for line in lines) > 5, program


def test_each_page_is_in_the_navigation():
    named = (ROOT / "mkdocs.yml").read_text(encoding="utf-8").split("\nnav:\n")[1]
    pages = [page.relative_to(ROOT / "docs") for page in PAGES if page.is_relative_to(ROOT / "docs")]
    assert not [str(page) for page in pages if f" {page}\n" not in named]


def test_the_reference_is_what_the_parameters_and_parsers_say():
    for path, content in GENERATE["pages"]().items():
        assert path.read_text(encoding="utf-8") == content, "run .venv/bin/python docs/generate.py"


@pytest.mark.parametrize("kind", [SweepConfig, SlurmConfig])
def test_a_flag_and_its_parameter_have_the_same_words(kind):
    for name, field in kind.model_fields.items():
        if name not in ("space", "time_min"):  # they are written in another way on the command line
            assert (
                COMMENTS[f"{kind.section_name}.{name}"].removesuffix(f"; flag --{name.split('_')[0]}")
                == field.description
            )
