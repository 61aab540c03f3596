"""Brings into the site what docs/ links to outside itself: recipes, the kernels' page, the changelog.

The links in docs/ are those that hold in the repository (`../recipes/two_folders.py`). In the site a recipe
is a file beside the pages, two Markdown files are pages, and any other file is named without a link.
"""

import re
from pathlib import Path

from mkdocs.structure.files import File

ROOT = Path(__file__).resolve().parent.parent
PAGES = {"daq_lightning/numerics/backends/README.md": "kernels.md", "CHANGELOG.md": "changelog.md"}
LINK = re.compile(r"\[([^\]]*)\]\(\.\./([^)#\s]+)(#[^)\s]*)?\)")


def on_files(files, config):
    for source, page in PAGES.items():
        files.append(File.generated(config, page, content=(ROOT / source).read_text(encoding="utf-8")))
    for recipe in sorted((ROOT / "recipes").iterdir()):
        if recipe.is_file():
            files.append(File.generated(config, f"recipes/{recipe.name}", abs_src_path=str(recipe)))
    return files


def on_page_markdown(markdown, page, config, files):
    def linked(match):
        words, target, anchor = match[1], match[2], match[3] or ""
        if not (ROOT / target).exists():
            raise FileNotFoundError(f"{page.file.src_uri} links to {target}, which is not in the repository")
        if target in PAGES:
            return f"[{words}]({PAGES[target]}{anchor})"
        return f"[{words}]({target})" if target.startswith("recipes/") else words

    return LINK.sub(linked, markdown)
