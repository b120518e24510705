"""Lays out the site's pages in a folder, for Sphinx: those of docs, filled, and those made.

python docs/_build/pages.py build/docs
"""

import pathlib
import re
import shutil
import sys

import figures
import reference

DOCS = reference.ROOT / "docs"
# Pages that lie outside docs/, where readers of the repository look for them.
ELSEWHERE = {"contributing.md": "CONTRIBUTING.md", "changelog.md": "CHANGELOG.md"}
CODE = re.compile(r"(?<![\[`])`([\w.]+)`(?![\]`])")


def linked(text, targets):
    """The page with each public name in `code` leading to its reference; fences are left alone."""
    lines, fence = [], None
    for line in text.split("\n"):
        mark = re.match(r" *(`{3,})", line)
        if mark and fence in (None, mark[1]):
            fence = None if fence else mark[1]
        elif not fence and not line.startswith("#"):
            line = CODE.sub(
                lambda m: f"[{m[0]}](#{targets[m[1]]})" if m[1] in targets else m[0], line
            )
        lines.append(line)
    return "\n".join(lines)


def written():
    """{file: Markdown} of the pages that somebody wrote."""
    found = {str(path.relative_to(DOCS)): path.read_text() for path in DOCS.rglob("*.md")}
    for page, source in ELSEWHERE.items():
        found[page] = (reference.ROOT / source).read_text().replace("](docs/", "](")
    return found


def main(folder):
    folder = pathlib.Path(folder)
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(DOCS, folder, ignore=shutil.ignore_patterns("*.md", "*.py", "__pycache__"))
    targets = reference.targets()
    for name, text in {**written(), **reference.pages()}.items():
        page = folder / name
        page.parent.mkdir(parents=True, exist_ok=True)
        page.write_text(linked(figures.filled(text), targets))


if __name__ == "__main__":
    main(*sys.argv[1:])
