"""Embeddings in files of others: each format damaged, opened, read, and converted."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from random import Random

import pyarrow
import pyarrow.parquet  # before trials have their memory limited

from blip3o_dit.data.convert import convert_files
from tests.fuzz.formats import Make, read_embeddings
from tests.fuzz.judge import Trial
from tests.fuzz.mutators import mutate_bytes, mutate_json, mutate_safetensors
from tests.helpers.array_files import WRITERS, arrays, write_as

FORMS = tuple(form for form in WRITERS if "pickle" not in form and form != "pt")


def arrays_maker(folder: Path, seed: int) -> Make:
    """One file of a format is damaged; the others of its folder are whole."""
    whole = {form: _contents_of(form, folder / "whole" / str(i)) for i, form in enumerate(FORMS)}
    others = tuple(content for files in whole.values() for content in files.values())
    pyarrow.set_cpu_count(1)

    def make(number: int) -> Trial:
        rng = Random(f"{seed}/arrays/{number}")
        target = folder / "damaged"
        shutil.rmtree(target, ignore_errors=True)
        files = whole[rng.choice(FORMS)]
        damaged = rng.choice(sorted(files))
        for name, content in files.items():
            (target / name).parent.mkdir(parents=True, exist_ok=True)
            (target / name).write_bytes(_spoiled(name, content, rng, others) if name == damaged else content)
        path = target / damaged if len(files) == 1 else target
        size = sum(file.stat().st_size for file in target.iterdir())

        def act() -> None:
            read_embeddings(path)
            convert_files([path], folder / "out" / "store", overwrite=True)

        return Trial(act, size, folder, outputs=(folder / "out",))

    return make


def _spoiled(name: str, content: bytes, rng: Random, others: tuple[bytes, ...]) -> bytes:
    if name.endswith(".json") and rng.random() < 0.7:
        return mutate_json(json.loads(content), rng)
    if name.endswith(".safetensors") and rng.random() < 0.8:
        return mutate_safetensors(content, rng)
    return mutate_bytes(content, rng, others=others)


def _contents_of(form: str, folder: Path) -> dict[str, bytes]:
    folder.mkdir(parents=True)
    path = write_as(form, folder, *arrays())
    files = [path] if path.is_file() else sorted(path.iterdir())
    return {file.name: file.read_bytes() for file in files}
