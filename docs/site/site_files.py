"""A hook of MkDocs: pages and files of the site that are not in docs/.

README.md is the first page. CONTRIBUTING.md, CHANGELOG.md and what any page links to elsewhere in the repository
(results, figures, examples) are copied to the same place in the site, and links lead there.
"""

from __future__ import annotations

import posixpath
import re
from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

ROOT = Path(__file__).resolve().parents[2]
PAGES = {"README.md": "index.md", "CONTRIBUTING.md": "CONTRIBUTING.md", "CHANGELOG.md": "CHANGELOG.md"}
LINK = re.compile(r"(?<=\]\()(?!\w+:|#)([^)#\s]+)")  # of a link or an image to a file, without the place in it


def on_files(files: Files, config: MkDocsConfig) -> Files:
    todo = [*PAGES, *(f"docs/{file.src_uri}" for file in files.documentation_pages())]
    done = set(todo)
    while todo:
        path = todo.pop()
        if not path.startswith("docs/"):
            files.append(File.generated(config, _place(path), abs_src_path=str(ROOT / path)))
        if path.endswith(".md"):
            for target in map(str, _targets(path)):
                if target not in done and (ROOT / target).is_file():
                    done.add(target)
                    todo.append(target)
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    source = next((path for path, place in PAGES.items() if place == page.file.src_uri), None)
    if source is None:
        source = page.file.src_uri if (ROOT / page.file.src_uri).exists() else f"docs/{page.file.src_uri}"
    here = posixpath.dirname(page.file.src_uri)

    def moved(match: re.Match) -> str:
        return posixpath.relpath(_place(_resolve(source, match[1])), here or ".")

    return LINK.sub(moved, markdown)


def on_page_content(html: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Docstrings mark names with Sphinx's roles, of which the site shows the name."""
    return re.sub(r":(?:func|meth|class|mod|data):(?=<code>)", "", html)


def _targets(path: str) -> list[str]:
    return [_resolve(path, link) for link in LINK.findall((ROOT / path).read_text())]


def _resolve(path: str, link: str) -> str:
    """The path from the root that ``link`` in the file ``path`` leads to."""
    return posixpath.normpath(posixpath.join(posixpath.dirname(path), link))


def _place(path: str) -> str:
    """Where a file of the repository is in the site."""
    return PAGES.get(path) or path.removeprefix("docs/")
