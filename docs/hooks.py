"""Makes a site of the README and docs/ (`make docs`), whose links are those that work in the repository.

The README is the first page. A file outside docs/ that a page links to, and a script in it, becomes a page that shows
it; of a notebook, its text, code and pictures.
"""

import json
import os
import re
from pathlib import Path, PurePosixPath
from typing import Any

from mkdocs.structure.files import File

ROOT = Path(__file__).parents[1]
LINK = re.compile(r"\]\((?!https?:|mailto:|#)([^)#\s]+)")
LANGUAGES = {".py": "python", ".yaml": "yaml", ".yml": "yaml", ".cff": "yaml", ".sh": "sh", ".toml": "toml"}


def on_files(files: Any, config: Any) -> Any:
    """Add the README, and what pages link to outside docs/."""
    files.append(File.generated(config, "index.md", content=(ROOT / "README.md").read_text()))
    waiting = [page.src_uri for page in files.documentation_pages()]
    while waiting:
        page = waiting.pop()
        for target in LINK.findall(files.get_file_from_path(page).content_string):
            place = placed(in_repository(page, target))
            if files.get_file_from_path(place) is None and place.startswith("source/"):
                files.append(File.generated(config, place, content=shown(ROOT / in_repository(page, target))))
                waiting += [place] if target.endswith(".md") else []
    return files


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    here, written_in = page.file.src_uri, home(page.file.src_uri)
    if here.startswith("source/") and not written_in.endswith(".md"):
        return markdown
    return LINK.sub(lambda link: f"]({relative(placed(in_repository(here, link[1])), here)}", markdown)


def home(page: str) -> str:
    """The file of the repository that a page is made of."""
    if page == "index.md":
        return "README.md"
    if page.startswith("source/"):
        return page.removeprefix("source/") if (ROOT / page.removeprefix("source/")).is_file() else page[7:-3]
    return f"docs/{page}"


def in_repository(page: str, target: str) -> str:
    return os.path.normpath(PurePosixPath(home(page)).parent / target)


def placed(path: str) -> str:
    """Where the site has a file of the repository."""
    if path == "README.md":
        return "index.md"
    if path.startswith("docs/") and not path.endswith(".py"):
        return path.removeprefix("docs/")
    return f"source/{path}" if path.endswith(".md") else f"source/{path}.md"


def relative(path: str, page: str) -> str:
    return os.path.relpath(path, PurePosixPath(page).parent)


def shown(path: Path) -> str:
    """A page with the content of a file."""
    if path.suffix == ".md":
        return path.read_text()
    title = f"# {path.relative_to(ROOT)}\n\n"
    if path.suffix == ".ipynb":
        return title + "\n\n".join(of_cells(json.loads(path.read_text())["cells"]))
    return title + fenced(path.read_text(), LANGUAGES.get(path.suffix, "text"))


def of_cells(cells: list[dict[str, Any]]) -> list[str]:
    found = []
    for cell in cells:
        text = "".join(cell["source"])
        found.append(text if cell["cell_type"] == "markdown" else fenced(text, "python"))
        for output in cell.get("outputs", []):
            data = output.get("data", {})
            plain = "".join(output.get("text", data.get("text/plain", [])))
            picture = "".join(data.get("image/png", "")).replace("\n", "")
            found.append(f"![](data:image/png;base64,{picture})" if picture else fenced(plain, "text"))
    return found


def fenced(text: str, language: str) -> str:
    fence = "`" * (3 + max((len(run) - 2 for run in re.findall(r"```+", text)), default=0))
    return f"{fence}{language}\n{text.rstrip()}\n{fence}\n"
