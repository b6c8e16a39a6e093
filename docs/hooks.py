"""MkDocs shows files outside of docs/ to which pages link, so that the same links work on GitHub and in the site.

A file PATH of the repository becomes the page or file repository/PATH of the site: Markdown as a page, a picture as it
is, and any other text as a page with a code block. A link to a folder becomes plain text.
"""

import posixpath
import re
from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

ROOT = Path(__file__).resolve().parents[1]
LINK = re.compile(r"(?P<before>\[(?P<text>[^\[\]]*)\]\()(?P<path>[^\s()#:]+)(?P<anchor>#[^\s()]*)?\)")
PICTURES = {".png", ".svg", ".gif", ".jpg"}
AS_CODE = "---\ntitle: {path}\nsearch:\n  exclude: true\n---\n\n# {path}\n\n~~~~~~~~{language}\n{text}\n~~~~~~~~\n"


def in_repository(src_uri: str) -> str:
    """The path in the repository of a file of the site."""
    return src_uri.removeprefix("repository/") if src_uri.startswith("repository/") else f"docs/{src_uri}"


def in_site(path: str) -> str:
    """The source of the page or file that shows a file of the repository."""
    if path.startswith("docs/"):
        return path.removeprefix("docs/")
    is_code = Path(path).suffix not in {".md", *PICTURES}
    return f"repository/{path}.md" if is_code else f"repository/{path}"


def target_of(src_uri: str, link: str) -> str:
    """The path in the repository to which a page of the site links."""
    return posixpath.normpath(posixpath.join(posixpath.dirname(in_repository(src_uri)), link))


def shown(path: str, config: MkDocsConfig) -> File:
    """The file of the site that shows a file of the repository."""
    name = in_site(path)
    if name == f"repository/{path}":
        return File.generated(config, name, abs_src_path=str(ROOT / path))
    text = (ROOT / path).read_text(encoding="utf-8")
    language = {".yaml": "yaml", ".py": "python", ".toml": "toml"}.get(Path(path).suffix, "text")
    return File.generated(config, name, content=AS_CODE.format(path=path, language=language, text=text))


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the files of the navigation, and those to which pages link, also from added pages."""
    named = re.findall(r"'repository/(.+?)'", str(config.nav))
    for path in named:
        files.append(shown(path, config))
    unread = list(files.documentation_pages())
    while unread:
        page = unread.pop()
        if not page.src_uri.endswith(".md") or in_site(in_repository(page.src_uri)) != page.src_uri:
            continue  # code
        for link in LINK.finditer(page.content_string):
            path = target_of(page.src_uri, link["path"])
            if (ROOT / path).is_file() and in_site(path) not in files.src_uris:
                files.append(file := shown(path, config))
                unread.append(file)
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Make each link to a file of the repository one to the page that shows it."""
    src_uri = page.file.src_uri
    if in_site(in_repository(src_uri)) != src_uri:
        return markdown  # code

    def in_this_site(link: re.Match[str]) -> str:
        path = target_of(src_uri, link["path"])
        if (ROOT / path).is_dir():
            return link["text"]
        target = posixpath.relpath(in_site(path), posixpath.dirname(src_uri))
        return f"{link['before']}{target}{link['anchor'] or ''})"

    return LINK.sub(in_this_site, markdown)
