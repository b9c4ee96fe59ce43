"""A store's manifest: the list of its shards and how the tokens were made. Written, read and checked."""

from __future__ import annotations

import json
import os
import stat
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from blip3o_dit.data.checks import check_square
from blip3o_dit.data.choices import DTYPE_NAMES, STORE_DTYPES
from blip3o_dit.data.int8_tokens import width_on_disk
from blip3o_dit.data.kept_vectors import check_kept_widths
from blip3o_dit.utils.atomic import ASIDE, finish_publishing, write_atomically
from blip3o_dit.utils.json_files import is_plain_name, read_json, short_repr
from blip3o_dit.utils.recognise import STORE, instead_of, refusal

MANIFEST = "manifest.json"
# Where a store is written before its files move into the folder around it.
STORE_ASIDE = f"store{ASIDE}"
FORMAT = "blip3o-dit embedding store"
FORMAT_VERSION = 1
# A manifest of so many, at up to 350 bytes each, is read whole.
MAX_SHARDS = 340_000
MAX_MANIFEST_BYTES = 2**27
# Shards whose sizes are looked at when a store is opened.
MAX_SIZES_ASKED = 20_000
DTYPES: dict[str, torch.dtype] = {name: getattr(torch, name) for name in DTYPE_NAMES}
ON_DISK: dict[str, torch.dtype] = {name: getattr(torch, name) for name in STORE_DTYPES}

_MANIFEST_COUNTS = ("num_samples", "num_tokens", "condition_dim", "target_dim")
_SHARD_FIELDS = {
    "file": str,
    "num_samples": int,
    "bytes": int,
    "sha256": str,
    "table": str,
    "table_sha256": str,
}


def write_manifest(
    folder: Path,
    sizes: tuple[int, int, int],
    dtype: str,
    shards: Sequence[Mapping[str, Any]],
    about: Mapping[str, Any],
) -> None:
    """Make the folder a store: the manifest, written last and atomically.

    Args:
        sizes: (tokens, condition width, target width). shards: what `write_shard` returned, in order.
        about: how the tokens were made, any JSON values.
    """
    num_tokens, condition_dim, target_dim = sizes
    manifest = {
        "format": FORMAT,
        "format_version": FORMAT_VERSION,
        "num_samples": sum(shard["num_samples"] for shard in shards),
        "num_tokens": num_tokens,
        "condition_dim": condition_dim,
        "target_dim": target_dim,
        "dtype": dtype,
        **about,
        "shards": list(shards),
    }
    content = json.dumps(manifest, indent=2).encode()
    if len(content) > MAX_MANIFEST_BYTES:
        raise ValueError(
            f"{folder / MANIFEST}: expected at most {MAX_MANIFEST_BYTES} bytes to write, found {len(content)}"
        )
    write_atomically(folder / MANIFEST, content)


def read_manifest(path: Path, *, check_files: bool = True) -> dict[str, Any]:
    """The manifest of the store at `path`, checked, and that its shards are there in the right sizes.

    Raises:
        FileNotFoundError, ValueError: one line naming the file, what was expected and what was found.
    """
    file = path / MANIFEST
    if not path.is_dir():
        raise refusal(path, STORE)
    finish_publishing(path / STORE_ASIDE, path, MANIFEST)
    if not file.is_file():
        raise refusal(path, STORE)
    manifest = checked_manifest(file, read_json(file, most=MAX_MANIFEST_BYTES))
    if check_files:
        _check_shard_files(path, manifest["shards"])
    return manifest


def checked_manifest(file: Path, manifest: Any) -> dict[str, Any]:
    """The manifest that was read from `file`. Raises ValueError for anything but a store's."""
    if not isinstance(manifest, dict) or manifest.get("format") != FORMAT:
        raise ValueError(f"{file}: expected format {FORMAT!r}, found another file")
    if manifest.get("format_version") != FORMAT_VERSION:
        raise ValueError(
            f"{file}: expected format version {FORMAT_VERSION}, "
            f"found {short_repr(manifest.get('format_version'))}"
        )
    _check_fields(file, manifest, dict.fromkeys(_MANIFEST_COUNTS, int) | {"shards": list, "dtype": str})
    if manifest["dtype"] not in ON_DISK:
        raise ValueError(
            f"{file}: dtype: expected one of {tuple(ON_DISK)}, found {short_repr(manifest['dtype'])}"
        )
    _check_encoders(file, manifest.get("encoders", {}))
    check_kept_widths(file, manifest.get("kept", {}))
    check_square(file, manifest["num_tokens"])
    sizes = manifest["num_tokens"], manifest["condition_dim"], manifest["target_dim"]
    bytes_per_sample = sample_bytes(sizes, manifest["dtype"])
    for shard in manifest["shards"]:
        check_shard_entry(file, shard)
        # The sizes say how much memory a batch takes: no more than the shards have.
        if shard["num_samples"] * bytes_per_sample > shard["bytes"]:
            raise ValueError(
                f"{file}: {short_repr(shard['file'])}: "
                f"expected at least {bytes_per_sample} bytes for each of "
                f"{shard['num_samples']} samples, found {shard['bytes']}"
            )
    total = sum(shard["num_samples"] for shard in manifest["shards"])
    if total != manifest["num_samples"] or total < 1:
        raise ValueError(f"{file}: num_samples is {manifest['num_samples']}, its shards hold {total}")
    return manifest


def sample_bytes(sizes: tuple[int, int, int], dtype: str) -> int:
    """Of a sample's tokens in a store of this dtype: sizes are tokens, condition width, target width."""
    tokens, *widths = sizes
    return tokens * sum(width_on_disk(width, dtype) for width in widths) * ON_DISK[dtype].itemsize


def check_shard_entry(file: Path, shard: Any) -> None:
    """Refuse (ValueError) what `write_shard` did not return; `file` is where it was read from."""
    if _is_shard_entry(shard):
        return
    _check_fields(file, shard, _SHARD_FIELDS)
    for name in (shard["file"], shard["table"]):
        if not is_plain_name(name):
            raise ValueError(f"{file}: expected a plain file name, found {short_repr(name)}")


def _is_shard_entry(shard: Any) -> bool:
    """What passes, told of hundreds of thousands in a third of the time that saying what does not takes."""
    if type(shard) is not dict:
        return False
    file, table, count, size = map(shard.get, ("file", "table", "num_samples", "bytes"))
    return (
        type(file) is type(table) is type(shard.get("sha256")) is type(shard.get("table_sha256")) is str
        and type(count) is type(size) is int
        and 1 <= count < 2**48
        and 1 <= size < 2**48
        and is_plain_name(file)
        and is_plain_name(table)
    )


def _check_encoders(file: Path, encoders: Any) -> None:
    """What is said of the towers is shown to people, side by side."""
    if not isinstance(encoders, dict) or not all(
        isinstance(encoders.get(side, {}), dict) for side in ("eva", "clip")
    ):
        raise ValueError(f"{file}: encoders: expected an object for each side, found {short_repr(encoders)}")


def _check_fields(file: Path, values: Any, kinds: Mapping[str, type]) -> None:
    for name, kind in kinds.items():
        value = values.get(name) if isinstance(values, dict) else None
        in_range = not isinstance(value, int) or 1 <= value < 2**48
        if not isinstance(value, kind) or isinstance(value, bool) or not in_range:
            raise ValueError(
                f"{file}: {name}: expected {'a positive ' if kind is int else 'a '}"
                f"{kind.__name__}, found {short_repr(value)}"
            )


def _check_shard_files(folder: Path, shards: Sequence[Mapping[str, Any]]) -> None:
    """Refuse (ValueError) a store that lacks a shard, or has one of another size.

    Of very many, whose sizes a file server would take minutes to tell, the names are looked for, and each
    one's size when it is first read.
    """
    if len(shards) <= MAX_SIZES_ASKED:
        for shard in shards:
            check_shard_file(folder, shard)
        return
    there = set(os.listdir(folder))
    for shard in shards:
        if shard["file"] not in there:
            check_shard_file(folder, shard)


def check_shard_file(folder: Path, shard: Mapping[str, Any]) -> None:
    """Refuse (ValueError) a shard that is not there in the size that its manifest entry tells."""
    place, size = os.path.join(folder, shard["file"]), shard["bytes"]
    try:
        about = os.stat(place)  # of thousands: Path takes several times as long
    except (FileNotFoundError, NotADirectoryError):
        about = None
    if about is None or not stat.S_ISREG(about.st_mode):
        raise ValueError(f"{place}: expected a shard, found no file")
    found = about.st_size
    if found != size:
        file = Path(place)
        raise ValueError(
            f"{file}: expected {size} bytes, found {found}{instead_of(file) or ': truncated or altered'}"
        )


def check_shard_count(folder: Path, samples: int, shard_size: int) -> None:
    """Refuse (ValueError) so many samples in shards of this size that no manifest could list them."""
    shards = -(-samples // shard_size)
    if shards > MAX_SHARDS:
        raise ValueError(
            f"{folder}: shard_size: expected at least {-(-samples // MAX_SHARDS)} for {samples} samples "
            f"(a store has at most {MAX_SHARDS} shards), found {shard_size}"
        )
