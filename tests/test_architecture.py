"""The direction of imports, and what importing costs."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

SOURCE = Path(__file__).parent.parent / "src" / "blip3o_dit"

# Package -> what it may import of this project, besides itself and what is at the bottom.
ALLOWED: dict[str, set[str]] = {
    "utils": set(),
    "flow": set(),
    "metrics": set(),
    "data": set(),
    "ridge": {"data"},
    "model": {"flow", "ridge"},
    "inference": {"model", "flow", "data", "metrics"},
    "training": {"model", "flow", "data", "metrics", "ridge"},
    "evaluation": {"inference", "model", "flow", "data", "metrics", "ridge"},
    "extraction": {"data"},
    "cli": {"inference", "training", "evaluation", "extraction", "model", "flow", "data", "metrics"},
}
BOTTOM = {"utils"}
# What a run was asked to do lies beside its weights, for whoever opens them: its own imports point down.
READ_BY_ALL = {"blip3o_dit.training.config"}
FILES = sorted(SOURCE.rglob("*.py"))


def imports(file: Path) -> set[str]:
    names: set[str] = set()
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            names |= {node.module} | {f"{node.module}.{alias.name}" for alias in node.names}
    return names


def package_of(file: Path) -> str:
    return file.relative_to(SOURCE).with_suffix("").parts[0]


@pytest.mark.parametrize("file", FILES, ids=lambda f: str(f.relative_to(SOURCE)))
def test_imports_point_down(file: Path) -> None:
    package = package_of(file)
    if package == "__init__":
        return
    names = {name for name in imports(file) if name.startswith("blip3o_dit.")}
    ours = {name.split(".")[1] for name in names if not name.startswith(tuple(READ_BY_ALL))}
    ours &= set(ALLOWED)
    assert ours <= ALLOWED[package] | {package} | BOTTOM
    foreign = " ".join(imports(file))
    if package != "training":
        assert "transformers.Trainer" not in foreign and "TrainingArguments" not in foreign
    if package != "extraction":
        assert not any(name in foreign for name in ("CLIPVision", "AutoImageProcessor", "timm", "open_clip"))


def test_every_package_is_in_the_table() -> None:
    assert {package_of(file) for file in FILES} - {"__init__"} <= set(ALLOWED)


def test_importing_the_package_is_light() -> None:
    code = (
        "import sys, blip3o_dit; heavy = {'torch', 'transformers', 'numpy'} & set(sys.modules); "
        "assert not heavy, heavy; assert 'BLIP3oInference' in dir(blip3o_dit)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=SOURCE.parent.parent)


def test_public_names_resolve() -> None:
    import blip3o_dit

    for name in blip3o_dit.__all__:
        assert getattr(blip3o_dit, name)
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = blip3o_dit.nothing
