"""The formats by name: each makes input `number` below a scratch folder, from (seed, number) alone."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from tests.fuzz import array_formats, checkpoints, command_lines, formats, sources

MAKERS: dict[str, Callable[[Path, int], formats.Make]] = {
    "pickle": formats.pickle_maker,
    "manifest": formats.manifest_maker,
    "shard": formats.shard_maker,
    "table": formats.table_maker,
    "arrays": array_formats.arrays_maker,
    "config": formats.config_maker,
    "training_config": formats.training_config_maker,
    "model": formats.model_maker,
    "checkpoint": checkpoints.checkpoint_maker,
    "pictures": formats.pictures_maker,
    "source": sources.source_maker,
    "cli": command_lines.command_line_maker,
}
