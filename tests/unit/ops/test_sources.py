"""The text that SOURCE names, its name, and its copies in texts/."""

from pathlib import Path

import pytest

from pipeline.ops.sources import bring, find_source, name_of, require_room
from pipeline.system.errors import InputError


@pytest.fixture
def outside(tmp_path, monkeypatch):
    """A folder beside the project, in which commands run."""
    (tmp_path / "project" / "texts").mkdir(parents=True)
    (tmp_path / "project" / "texts" / "README.md").write_text("Your own texts")
    (tmp_path / "home" / "notes" / "old").mkdir(parents=True)
    for name in ("diary.txt", "notes/a.txt", "notes/old/b.txt", "notes/c.jsonl.gz"):
        (tmp_path / "home" / name).write_text(name)
    monkeypatch.chdir(tmp_path / "project")
    return tmp_path / "home"


def test_a_model_has_the_name_of_its_text(outside):
    names = {
        "/a/My diary (2).md": "My-diary-2",
        "hf://datasets/A/NAME@v1": "NAME-v1",
        "....txt": "project",
        "*.md": "project",
    }
    assert {given: name_of(given) for given in names} == names


def test_a_file_outside_of_the_project_gets_a_copy_under_the_name_of_its_model(outside):
    source = find_source(str(outside / "diary.txt"), None)
    assert (source.source, source.name) == ("texts/diary.txt", "diary")
    assert not Path(source.source).exists()
    copies = bring(source, in_place=False)
    assert Path("texts/diary.txt").read_text() == (outside / "diary.txt").read_text() == "diary.txt"
    assert bring(source, in_place=False) == copies
    assert find_source(str(outside / "notes/c.jsonl.gz"), "mail").source == "texts/mail.jsonl.gz"
    inside = find_source("texts/diary.txt", None)
    assert (inside.source, inside.copies) == ("texts/diary.txt", {})


def test_a_folder_or_a_glob_is_copied_with_its_subfolders(outside):
    bring(find_source(f"{outside}/notes", None), in_place=False)
    assert sorted(str(path) for path in Path("texts/notes").rglob("*.*")) == [
        "texts/notes/a.txt", "texts/notes/c.jsonl.gz", "texts/notes/old/b.txt"]  # fmt: skip
    source = find_source(f"{outside}/notes/**/*.txt", "only")
    bring(source, in_place=False)
    assert source.source == "texts/only"
    assert sorted(path.name for path in Path("texts/only").rglob("*.txt")) == ["a.txt", "b.txt"]


def test_in_place_makes_links_which_follow_the_text(outside):
    source = find_source(str(outside / "diary.txt"), None)
    bring(source, in_place=True)
    (outside / "diary.txt").write_text("a new day")
    assert Path("texts/diary.txt").is_symlink()
    assert Path("texts/diary.txt").read_text() == "a new day"
    require_room(source, {})
    bring(source, in_place=False)  # a copy in place of the link
    assert not Path("texts/diary.txt").is_symlink()
    assert (outside / "diary.txt").read_text() == Path("texts/diary.txt").read_text() == "a new day"


def test_a_copy_follows_a_text_that_has_changed_unless_somebody_has_changed_the_copy(outside):
    copies = bring(find_source(f"{outside}/notes", None), in_place=False)
    (outside / "notes" / "a.txt").write_text("longer")
    (outside / "notes" / "old" / "b.txt").unlink()
    source = find_source(f"{outside}/notes", None)
    require_room(source, copies)
    for before in ({}, {**copies, "texts/notes/a.txt": "0" * 64}):  # not copied by `learn`, or changed since then
        with pytest.raises(InputError, match=r"texts/notes/a.txt is another text than .*: choose another --name"):
            require_room(source, before)
    bring(source, in_place=False)
    assert Path("texts/notes/a.txt").read_text() == "longer"
    assert not Path("texts/notes/old/b.txt").exists()


def test_a_file_of_another_text_is_never_replaced(outside):
    Path("texts/diary.txt").write_text("mine")
    Path("texts/notes").mkdir()
    Path("texts/notes/z.txt").write_text("mine")
    for given, words in (
        ("diary.txt", "is another text than"),
        ("notes", "texts/notes/z.txt is not in the text notes"),
    ):
        with pytest.raises(InputError, match=words):
            require_room(find_source(f"{outside}/{given}", None), {})
        require_room(find_source(f"{outside}/{given}", "other"), {})


@pytest.mark.parametrize(
    ("given", "name", "words"),
    [
        ("missing.txt", None, "missing.txt not found: give a file, a folder, a glob in quotes, or a URL"),
        ("texts", None, "contains no texts"),
        ("texts/*.md", None, "matches no file"),
        ("../home/*.md", None, "matches no file"),
        ("", None, "SOURCE is empty: give a file, a folder"),
        (" ", "notes", "SOURCE is empty"),
        *((folder, None, f"{folder} contains this project: ") for folder in (".", "../project", "..", "/")),
        ("../home/diary.txt", "a/b", "--name 'a/b': use letters"),
        ("../home/diary.txt", "..", "--name '..': use letters"),
    ],
)
def test_a_source_or_a_name_that_cannot_be_used_is_refused(outside, given, name, words):
    with pytest.raises(InputError, match=words):
        find_source(given, name)
