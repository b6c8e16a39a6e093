"""Troubleshooting lists messages that the code has."""

import ast
import re
from pathlib import Path

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs/guides/troubleshooting.md").read_text(encoding="utf-8")
OTHERS = ("No matching distribution found for torch", "command not found")  # pip's and the shell's
SCRIPTS = ("app.py", "setup.py", "requirements/install.py")
MESSAGES = [text for cell in re.findall(r"^\| (.*?) \|", PAGE, re.MULTILINE) for text in re.findall(r"`(.+?)`", cell)]


def messages_in(source):
    """The strings of Python source, with … for what varies in them."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Constant) and isinstance(node.value, str):
            yield node.value
        elif isinstance(node, ast.JoinedStr):
            yield "".join(part.value if isinstance(part, ast.Constant) else "…" for part in node.values)


def test_each_message_is_one_of_the_code():
    files = [*(ROOT / "pipeline").rglob("*.py"), *(ROOT / "webapp").rglob("*.py"), *map(ROOT.joinpath, SCRIPTS)]
    known = [text for file in files for text in messages_in(file.read_text(encoding="utf-8"))]
    known.append((ROOT / "Makefile").read_text(encoding="utf-8"))
    written = "\n".join(known).replace("`", "").replace("…", "")
    assert len(MESSAGES) > 50
    for message in MESSAGES:
        for part in re.split("…", message):
            assert part.strip(" :,") in written or message.startswith(OTHERS), message
