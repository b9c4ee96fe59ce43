"""What is at a path that a user gave, and what is said when something else was expected there.

A few bytes of a file and the names in a folder are looked at, of JSON no more than a configuration is read.
Nothing is unpickled, and neither torch nor NumPy is imported.
"""

from __future__ import annotations

import os
import re
import shlex
import stat
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from itertools import islice
from pathlib import Path
from typing import Any

from blip3o_dit.utils.file_kinds import PICTURE_SUFFIXES, READ_AT_ONCE, file_kind
from blip3o_dit.utils.json_files import printable, read_json, short_repr, show_names

# What may be expected at a path, and how that is said.
EMBEDDINGS, STORE, MODEL, CHECKPOINT, RUN, PICTURES, DECODER = (
    *("embeddings", "store", "model", "checkpoint", "run", "pictures", "decoder"),
)
_WANTED = {
    EMBEDDINGS: "embeddings (a store, .pkl, .pt, .npz, .npy, .safetensors, parquet, or a saved Hugging Face "
    "dataset)",
    STORE: "an embedding store",
    MODEL: "a model folder with config.json",
    CHECKPOINT: "a checkpoint folder",
    RUN: "the folder of a run, with training_log.jsonl",
    PICTURES: "pictures",
    DECODER: "a decoder's folder",
}
# What the configuration of a decoder (`decoder/folder.py`) says it is
DECODER_TYPE = "blip3o-dit-decoder"
# What is found, by groups to which the same is said.
TRAINED = frozenset(("model", "checkpoint", "run"))
MADE_HERE = TRAINED | {"store", "unfinished", "decoder"}
_OF_PICTURES = frozenset(("picture", "pictures", "tar_of_pictures"))
_OF_TOKENS = frozenset(
    (
        *("store", "pickle", "pickle in a zip", "npz", "npy", "safetensors", "parquet"),
        *("saved_dataset", "arrays", "tables"),
    )
)
_ALWAYS = {
    "packed": "unpack it first",
    "zip": "unpack it first",
    "pointer": "`git lfs pull` fetches the file itself",
    "page": "such as the one that asks for a login: download the file itself",
    "arrow": "write it as parquet",
    "unfinished": "repeat the command that was writing it",
    "npy": "give the folder that has eva.npy and clip.npy, or both files to `blip3o-dit convert`",
}
# Names by which folders of others are known.
_FOREIGN_FOLDERS = {
    ".zarray": "a zarr array",
    ".zgroup": "a zarr group",
    "zarr.json": "a zarr group",
    "data.mdb": "an LMDB database",
    "checkpoint.index": "a TensorFlow checkpoint",
    "adapter_config.json": "an adapter, which is no whole model",
    "model_index.json": "a pipeline of diffusers",
}
_STORE_FORMAT = b'"blip3o-dit embedding store"'
_CHECKPOINT = re.compile(r"checkpoint-\d+")
_UNFINISHED = re.compile(r"extraction\.json|shard-\d+\.entry\.json|store\.partial")
# Names looked at in a folder, and folders looked into, at most.
_MOST_NAMES, _MOST_FOLDERS = 10_000, 100


@dataclass(frozen=True)
class Found:
    """What is at a path: its kind, in words what it is, and what to do whatever was expected there."""

    kind: str
    what: str
    way: str = ""


def refusal(path: str | Path, wanted: str) -> ValueError | FileNotFoundError:
    """The error, of one line, for a path at which something else is than one of the kinds above."""
    path = Path(path)
    found = recognise(path)
    way = _way(path, wanted, found)
    message = f"{path}: expected {_WANTED[wanted]}, found {found.what}{f': {way}' if way else ''}"
    not_there = found.kind == "nothing" or wanted == MODEL
    return FileNotFoundError(message) if not_there else ValueError(message)


def instead_of(file: Path) -> str:
    """What stands in place of a file of numbers, as after a download: ", a web page ..."; mostly nothing."""
    kind, what = file_kind(file)
    return f", {what}: {_ALWAYS[kind]}" if kind in ("pointer", "page") else ""


def recognise(path: Path) -> Found:
    """What is at a path. Raises OSError where it may not be read."""
    try:
        mode = os.stat(path).st_mode
    except (FileNotFoundError, NotADirectoryError, ValueError):  # of names that no file can have
        return _nothing(path)
    if stat.S_ISDIR(mode):
        return _folder(path)
    if not stat.S_ISREG(mode):
        return Found("device", "a pipe" if stat.S_ISFIFO(mode) else "a device")
    kind, what = file_kind(path)
    return Found(kind, what, _ALWAYS.get(kind, ""))


def _way(path: Path, wanted: str, found: Found) -> str:
    """The command, or whatever else helps."""
    name, kind = shlex.quote(str(path)), found.kind
    wants_tokens, wants_model = wanted in (EMBEDDINGS, STORE), wanted in (MODEL, CHECKPOINT, RUN)
    if kind in ("json", "safetensors", "picture") and _is_part_of(path.absolute().parent, wanted):
        return f"give its folder, {path.parent if path.parent.name else path.absolute().parent}"
    if wants_tokens and kind in _OF_PICTURES:
        return f"`blip3o-dit extract {name}` makes embeddings of pictures"
    if wants_tokens and kind in TRAINED:
        return f"`blip3o-dit inspect {name}` says which embeddings it learned from"
    if wanted == STORE and kind in _OF_TOKENS:
        return f"`blip3o-dit convert {name} STORE` makes one of it"
    if wanted == DECODER and kind in _OF_TOKENS:
        return f"`blip3o-dit train-decoder {name} IMAGES --output_dir DECODER` trains one"
    if kind == "decoder":
        return f"`blip3o-dit decode {name} STORE OUT` makes pictures with it"
    if wants_model and kind in _OF_TOKENS:
        return f"`blip3o-dit train --embeddings_path {name} --output_dir RUN` trains a model"
    if wants_model and kind in _OF_PICTURES:
        return "`blip3o-dit extract` makes embeddings of pictures, and `blip3o-dit train` a model of these"
    if wanted == PICTURES and kind in _OF_TOKENS | TRAINED:
        return f"`blip3o-dit inspect {name}` says what is in it"
    return found.way


def _is_part_of(folder: Path, wanted: str) -> bool:
    """Whether what is wanted is the folder of a file that was given."""
    kind = _folder(folder).kind
    return kind == "store" if wanted in (EMBEDDINGS, STORE) else wanted != PICTURES and kind in TRAINED


# What is not there


def _nothing(path: Path) -> Found:
    if path.is_symlink():
        return Found("nothing", "a link to what is not there")
    text = str(path)
    if re.match(r"[a-z][a-z0-9+.-]+:/", text):
        return Found("nothing", "an address", "download it, and give the path")
    there = path
    while not os.path.lexists(there) and there != there.parent:
        there, missing = there.parent, there.name
    if there.is_file():
        return Found("nothing", f"nothing there, as {there} is a file")
    return Found("nothing", "nothing there", _did_you_mean(path, there, missing))


def _did_you_mean(path: Path, there: Path, missing: str) -> str:
    """An existing path with a name like the first one that is missing; else what a hub's id needs."""
    home = path.expanduser() if str(path).startswith("~") else path
    if home != path and home.exists():
        return f"did you mean {home}?"
    names = {name.lower(): name for name in _names(there)}
    alike = get_close_matches(missing.strip().lower(), names, n=1, cutoff=0.7)
    if alike:
        whole = there.joinpath(names[alike[0]], *path.parts[len(there.parts) + 1 :])
        return f"did you mean {whole if whole.exists() else there / names[alike[0]]}?"
    if there == Path(".") and len(path.parts) == 2:
        return "what is on the hub is downloaded to a folder first"
    return ""


# Folders


def _folder(path: Path) -> Found:
    names = _names(path)
    found = _made_here(path, names) or _foreign(names)
    if found is None:
        below = _kinds_below(path, names)
        found = _several(below) or _by_names(names)
        if found is None and "pictures" in below:
            found = Found("pictures", "a folder of pictures")
    if found is None:
        found = Found("folder", f"a folder with other files, {show_names(names)}")
    place = {Path("."): "the current folder", Path("/"): "the root of the file system"}.get(path)
    return found if place is None else Found(found.kind, f"{place}, {found.what}", found.way)


def _made_here(path: Path, names: Sequence[str]) -> Found | None:
    return _store(path, names) or _model(path, names) or _unfinished_run(path, names)


def _names(path: Path) -> list[str]:
    """Names in a folder, sorted; of very many some."""
    try:
        with os.scandir(path) as entries:
            return sorted(entry.name for entry in islice(entries, _MOST_NAMES))
    except (FileNotFoundError, NotADirectoryError):
        return []


def _store(path: Path, names: Sequence[str]) -> Found | None:
    if "manifest.json" in names and _STORE_FORMAT in _beginning(path / "manifest.json"):
        return Found("store", "an embedding store")
    unfinished = [name for name in names if _UNFINISHED.fullmatch(name)]
    if not unfinished:
        return None
    kind = "store" if unfinished == ["store.partial"] else "extraction"
    return Found("unfinished", f"an unfinished {kind}", _ALWAYS["unfinished"])


def _model(path: Path, names: Sequence[str]) -> Found | None:
    if not (path / "config.json").is_file() or "adapter_config.json" in names:
        return None
    try:
        config: Any = read_json(path / "config.json")
    except ValueError:
        return Found("folder", "a folder whose config.json cannot be read")
    type_ = config.get("model_type") if isinstance(config, dict) else None
    if type_ == DECODER_TYPE and "model.safetensors" in names:
        return Found("decoder", "a decoder of tokens to pictures")
    if type_ != "blip3o-dit":
        return Found("foreign", f"a model of another kind ({printable(short_repr(type_))})")
    if "progress.json" in names and "optimizer.safetensors" in names:
        return Found("checkpoint", "a checkpoint of a run")
    if not any(name.startswith("model") and ".safetensors" in name for name in names):
        return Found("folder", "a model folder without weights")
    flow = config.get("flow_matching")
    steps = flow.get("student_steps") if isinstance(flow, dict) else None
    known = steps if steps == "any" else short_repr(steps)
    return Found("model", f"a distilled model ({known} steps)" if steps else "a trained model")


def _unfinished_run(path: Path, names: Sequence[str]) -> Found | None:
    saved = [name for name in names if _CHECKPOINT.fullmatch(name) and (path / name).is_dir()]
    if not saved and "training_config.json" not in names and "training_log.jsonl" not in names:
        return None
    newest = max(saved, key=lambda name: int(name.partition("-")[2]), default=None)
    way = "it has no checkpoint yet" if newest is None else f"give one of its checkpoints, {path / newest}"
    return Found("run", "a run that is not finished", way)


def _foreign(names: Sequence[str]) -> Found | None:
    if "dataset_dict.json" in names or "state.json" in names:
        return Found("saved_dataset", "a saved Hugging Face dataset")
    what = next((what for name, what in _FOREIGN_FOLDERS.items() if name in names), None)
    return None if what is None else Found("foreign", what)


def _by_names(names: Sequence[str]) -> Found | None:
    if any(name.lower().endswith(PICTURE_SUFFIXES) for name in names):
        return Found("pictures", "a folder of pictures")
    if any(name.endswith((".tar", ".tar.gz", ".tgz")) for name in names):
        return Found("pictures", "a folder of tars")
    if any(name.endswith(".npy") for name in names):
        return Found("arrays", "a folder of NumPy arrays")
    if any(name.endswith((".parquet", ".arrow")) for name in names):
        return Found("tables", "a folder of tables")
    if "manifest.json" in names:
        return Found("folder", "a folder with a manifest.json that is not a store's")
    return None if names else Found("folder", "an empty folder")


def _kinds_below(path: Path, names: Sequence[str]) -> dict[str, list[str]]:
    """The folders in a folder, by their kinds."""
    kinds: dict[str, list[str]] = {}
    folders = (name for name in names if not name.startswith(".") and (path / name).is_dir())
    for name in islice(folders, _MOST_FOLDERS):
        inside = _names(path / name)
        found = _made_here(path / name, inside) or _by_names(inside)
        kind = "" if found is None else found.kind
        kinds.setdefault("model" if kind in TRAINED else kind, []).append(name)
    return kinds


def _several(below: Mapping[str, list[str]]) -> Found | None:
    """A folder of stores, or of models."""
    for kind, what in (("store", "stores"), ("model", "models")):
        if kind in below:
            return Found("folder", f"a folder of {what}", f"name one of them: {show_names(below[kind])}")
    return None


def _beginning(file: Path) -> bytes:
    if not file.is_file():  # a pipe would be waited for
        return b""
    with open(file, "rb") as opened:
        return opened.read(READ_AT_ONCE)
