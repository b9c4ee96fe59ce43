"""img2dataset's folders: shards of tars or files, each with a table and a JSON file about its downloads."""

from __future__ import annotations

import os
from collections.abc import Collection

TFRECORD = ".tfrecord"


def is_about_shard(table: str, files: Collection[str], folders: Collection[str]) -> bool:
    """Whether a parquet file is the table beside `00000.tar`, `00000.tfrecord` or the folder `00000`.

    It repeats what the shard's JSON members say and lists the downloads that failed. With
    `output_format=parquet` it is alone, and holds the pictures.
    """
    stem = os.path.splitext(table)[0]
    return stem in folders or f"{stem}.tar" in files or stem + TFRECORD in files


def holds_shards(files: Collection[str], folders: Collection[str]) -> bool:
    """Whether the sub-folders are shards of files, which are no classes."""
    return any(f"{folder}_stats.json" in files for folder in folders)


def refuse_tfrecords(where: str, count: int) -> None:
    raise ValueError(
        f"{where}: expected pictures, found {count} {TFRECORD} files, which only TensorFlow reads: "
        "run img2dataset with --output_format webdataset, files or parquet"
    )
