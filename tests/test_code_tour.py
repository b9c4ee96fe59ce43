"""docs/code-tour.md names what is there: every module in its tree, every function on its walks."""

from __future__ import annotations

import ast
import re
from pathlib import Path

ROOT = Path(__file__).parent.parent
SOURCE = ROOT / "src" / "blip3o_dit"
TOUR = (ROOT / "docs" / "code-tour.md").read_text()
TREE = re.search(r"```text\n(.*?)```", TOUR, flags=re.DOTALL)
STOPS = re.findall(r"`([\w/]+\.py): ([\w.]+)`", TOUR)


def names_in(file: Path) -> set[str]:
    """Functions, classes and constants of a module; methods and fields as Class.name."""
    found: set[str] = set()

    def add(body: list[ast.stmt], prefix: str) -> None:
        for node in body:
            if isinstance(node, ast.FunctionDef | ast.ClassDef):
                found.add(prefix + node.name)
            if isinstance(node, ast.ClassDef):
                add(node.body, f"{prefix}{node.name}.")
            targets = node.targets if isinstance(node, ast.Assign) else [getattr(node, "target", None)]
            found.update(prefix + target.id for target in targets if isinstance(target, ast.Name))

    add(ast.parse(file.read_text()).body, "")
    return found


def modules_of_tree() -> list[str]:
    assert TREE is not None
    folder, listed = "", []
    for line in TREE[1].splitlines():
        name = line.split()[0] if line.strip() else ""
        if name.endswith("/"):
            folder = name
        elif name.endswith((".py", ".jinja")):
            listed.append((folder if line.startswith("    ") else "") + name)
    return listed


def test_the_tree_lists_every_module_once() -> None:
    there = {str(file.relative_to(SOURCE)) for file in SOURCE.rglob("*.py")}
    there = {name for name in there if not name.endswith("__init__.py")}
    listed = [name for name in modules_of_tree() if name.endswith(".py")]
    assert sorted(listed) == sorted(there)


def test_every_line_of_the_tree_says_what_the_file_is() -> None:
    assert TREE is not None
    assert all(len(line.split()) > 3 for line in TREE[1].splitlines() if ".py" in line)


def test_every_stop_is_there() -> None:
    assert len(STOPS) >= 30
    missing = [stop for stop in STOPS if stop[1] not in names_in(SOURCE / stop[0])]
    assert not missing


def test_the_first_screen_of_the_readme_links_it() -> None:
    first_screen = (ROOT / "README.md").read_text().splitlines()[:40]
    assert any("docs/code-tour.md" in line for line in first_screen)
