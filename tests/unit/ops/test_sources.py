"""The text that SOURCE names, its name, and its copies in texts/."""

import os
import shutil
from pathlib import Path

import pytest

from pipeline.ops.sources import bring, bring_weights, find_source, find_weights, name_of, require_room
from pipeline.system.errors import InputError
from tests.small_models import save_published


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
        "....txt": "text",
        "😀.txt": "text",
        "*.md": "project",
        "../*.md": outside.parent.name,
        "/a/[bc]/**/*.md": "a",
    }
    assert {given: name_of(given) for given in names} == names
    for file, name in (("[2024] diary.txt", "2024-diary"), ("who?.txt", "who"), ("To: you.txt", "To-you")):
        (outside / file).touch()
        assert find_source(f"{outside}/{file}", None).name == find_source(f"../home/{file}", None).name == name


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


def test_only_the_readme_of_the_projects_own_texts_is_left_out(outside):
    for name in ("texts", "notes"):  # a folder of the same name elsewhere
        (outside / name).mkdir(exist_ok=True)
        (outside / name / "README.md").write_text("mine")
        for given in (f"{outside}/{name}", f"{outside}/{name}/*.md"):
            assert outside / name / "README.md" in find_source(given, None).files.values()
    Path("texts/own").mkdir()
    Path("texts/own/README.md").write_text("mine")
    assert [*find_source("texts", None).files] == ["texts/own/README.md"]


def test_a_path_may_have_any_characters(outside, monkeypatch):
    for given in ("~draft.txt", "Re: letter.txt", "what?.txt"):
        Path(given).write_text(given)
        source = find_source(given, None)
        assert (source.origin, [*source.files]) == (given, [given])
        bring(source, in_place=False)
        assert Path(source.source).read_text() == given
    for folder in ("a[b]", "a*b", "a?"):
        (outside / folder / "texts").mkdir(parents=True)
        (outside / folder / "one.txt").write_text("1")
        monkeypatch.chdir(outside / folder)
        for given in ("*.txt", "../*/one.txt"):
            assert outside / folder / "one.txt" in find_source(given, None).files.values()


def test_a_folder_of_weights_that_does_not_exist_is_named(outside):
    for given in ("~nobody-has-this-name/gpt2", "https://example.com/gpt2", "missing", ""):
        with pytest.raises(InputError, match=rf"^--init {given} not found: give the folder of a GPT-2"):
            find_weights(given)


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
    Path("texts/notes/poem.txt").write_text("the only copy")  # while `learn` asks
    with pytest.raises(InputError, match=r"texts/notes/poem.txt is not in the text notes"):
        bring(source, False, copies)
    Path("texts/notes/poem.txt").unlink()
    bring(source, False, copies)
    assert Path("texts/notes/a.txt").read_text() == "longer"
    assert not Path("texts/notes/old/b.txt").exists()


def test_hidden_files_beside_the_copies_are_left_alone(outside):
    copies = bring(find_source(f"{outside}/notes", None), in_place=False)
    hidden = [Path("texts/notes/.DS_Store"), Path("texts/notes/old/.git/config")]
    for path in hidden:
        path.parent.mkdir(exist_ok=True)
        path.write_text("of another program")
    bring(find_source(f"{outside}/notes", None), False, copies)
    assert all(path.exists() for path in hidden)


def test_a_link_of_an_earlier_call_whose_original_is_gone_is_removed_or_replaced(outside):
    copies = bring(find_source(f"{outside}/notes", None), in_place=True)
    (outside / "notes" / "a.txt").unlink()
    copies = bring(find_source(f"{outside}/notes", None), True, copies)
    assert not Path("texts/notes/a.txt").is_symlink()
    (outside / "notes").rename(outside / "letters")  # all links are broken
    bring(find_source(f"{outside}/letters", "notes"), True, copies)
    assert Path("texts/notes/old/b.txt").read_text() == "notes/old/b.txt"
    Path("texts/other").mkdir()
    Path("texts/other/c.jsonl.gz").symlink_to("nowhere")  # of the user
    with pytest.raises(InputError, match=r"texts/other/c.jsonl.gz is another text than"):
        bring(find_source(f"{outside}/letters", "other"), True, copies)


def test_a_text_of_the_project_is_found_by_any_spelling_and_never_replaced_by_a_link(outside):
    Path("texts/mine.txt").write_text("the only copy")
    (outside / "link").symlink_to(Path.cwd())
    for given in ("link/texts/mine.txt", "link/texts/m*.txt", "link/texts/**/mine.txt"):
        source = find_source(f"{outside}/{given}", None)
        assert (source.source, source.copies) == (given.removeprefix("link/"), {})
    (outside / "mine.txt").symlink_to(Path("texts/mine.txt").absolute())  # this path is not in texts/
    for in_place in (True, False):
        assert bring(find_source(f"{outside}/mine.txt", None), in_place) == {}  # it is no copy
        assert not Path("texts/mine.txt").is_symlink()
        assert Path("texts/mine.txt").read_text() == "the only copy"


def test_weights_of_the_project_are_found_by_any_spelling(outside):
    save_published(Path("weights/mine"), vocab_size=300)
    (outside / "link").symlink_to(Path.cwd())
    weights = find_weights(f"{outside}/link/weights/mine")
    assert (weights.init, weights.copies) == ("weights/mine", {})
    (outside / "mine").symlink_to(Path("weights/mine").absolute())
    bring_weights(find_weights(f"{outside}/mine"), in_place=True)
    assert not any(path.is_symlink() for path in Path("weights/mine").iterdir())


def test_a_glob_that_covers_the_project_leaves_out_its_texts(outside):
    Path("a.md").write_text("a")
    for _ in range(2):
        source = find_source("**/*.md", "handbook")
        assert [*source.copies] == [Path("texts/handbook/a.md")]
        bring(source, in_place=False)
    Path("a.md").unlink()
    with pytest.raises(InputError, match=r"\*\*/\*.md matches no file outside of this project's texts/: give a file"):
        find_source("**/*.md", "handbook")


def test_a_text_in_a_linked_texts_is_found_by_its_real_path_and_not_copied_into_itself(outside):
    shutil.rmtree("texts")
    Path("texts").symlink_to(outside / "notes")
    for part in ("", "/a.txt", "/*.txt"):
        source = find_source(f"{outside}/notes{part}", None)
        assert (source.source, source.copies) == (f"texts{part}", {})
    (outside / "alias").symlink_to(outside / "notes")
    for given in (outside, outside / "alias"):
        with pytest.raises(InputError, match=f"^{given} contains this project or its texts/: give a file"):
            find_source(str(given), None)


def test_a_file_name_that_is_not_utf8_is_refused(outside):
    folder = outside / "old"
    folder.mkdir()
    try:
        (path := Path(os.fsdecode(os.fsencode(folder) + b"/caf\xe9.txt"))).write_text("a")
    except OSError:
        pytest.skip("this disk has no such names")
    for given in (str(folder), f"{folder}/*.txt", str(path)):
        with pytest.raises(InputError, match=r"the file name b'.*/old/caf\\xe9.txt' is not UTF-8: rename the file"):
            find_source(given, "old")


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
        ("../home/*.md", None, r"^../home/\*.md matches no file"),
        ("../home/notes/nothing[12]/**", None, r"^../home/notes/nothing\[12\]/\*\* matches no file"),
        ("/*.no-such-text", None, r"^/\*.no-such-text matches no file"),
        ("~nobody-has-this-name/a.txt", None, "^~nobody-has-this-name/a.txt not found"),
        ("", None, "SOURCE is empty: give a file, a folder"),
        (" ", "notes", "SOURCE is empty"),
        *(
            (folder, None, f"{folder} contains this project or its texts/: ")
            for folder in (".", "../project", "..", "/")
        ),
        ("../home/diary.txt", "a/b", "--name 'a/b': use letters"),
        ("../home/diary.txt", "..", "--name '..': use letters"),
    ],
)
def test_a_source_or_a_name_that_cannot_be_used_is_refused(outside, given, name, words):
    with pytest.raises(InputError, match=words):
        find_source(given, name)
