"""python -m tests.licences: docs/licences.md, the licences of what is needed, from installed metadata."""

from __future__ import annotations

import re
import sys
from importlib.metadata import Distribution, PackageNotFoundError, distribution
from pathlib import Path

from packaging.requirements import Requirement

ROOT = Path(__file__).parent.parent
PAGE = ROOT / "docs" / "licences.md"
PACKAGE = "blip3o-dit"
HEAD = """# Licences of what is needed

What `pip install '.[wandb,parquet,ode,lowmem,onnx,demo]'` brings, and what that needs in turn, by the
packages' own metadata; `python -m tests.licences` writes this page anew. torch's builds for a GPU also bring
NVIDIA's libraries, which have NVIDIA's licence, and Triton (MIT). No code of other projects is copied into
this one, which is MIT; no weights are included.

| package | licence |
|---|---|
"""
EXTRAS = ("wandb", "parquet", "ode", "lowmem", "onnx", "demo")
# Of packages whose metadata says nothing: by the text in them.
BY_THEIR_TEXT = {"torchao": "BSD-3-Clause"}


def needed() -> dict[str, Distribution]:
    """What the package and these extras need, and what that needs, by name, as far as it is installed."""
    found: dict[str, Distribution] = {}
    waiting = [(PACKAGE, extra) for extra in ("", *EXTRAS)]
    seen: set[tuple[str, str]] = set()
    while waiting:
        name, extra = waiting.pop()
        if (name, extra) in seen:
            continue
        seen.add((name, extra))
        try:
            package = distribution(name)
        except PackageNotFoundError:
            continue
        found[name] = package
        for line in package.requires or []:
            requirement = Requirement(line)
            if requirement.marker is None or requirement.marker.evaluate({"extra": extra}):
                for of in ("", *requirement.extras):
                    waiting.append((plain(requirement.name), of))
    del found[PACKAGE]
    return found


def plain(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def licence(package: Distribution) -> str:
    """The expression; else the classifiers; else the first line of the text that stands in its place."""
    about = package.metadata
    if about.get("License-Expression"):
        return str(about["License-Expression"])
    classified = [
        line.split(" :: ")[-1] for line in about.get_all("Classifier") or [] if line.startswith("License ::")
    ]
    said = str(about.get("License") or "").strip().splitlines()
    text = said[0] if said else BY_THEIR_TEXT.get(plain(about["Name"]), "")
    return ", ".join(dict.fromkeys(classified)) or text


def page() -> str:
    rows = (f"| {name} | {licence(package)} |\n" for name, package in sorted(needed().items()))
    return HEAD + "".join(rows)


if __name__ == "__main__":
    PAGE.write_text(page())
    sys.stdout.write(f"{PAGE}\n")
