"""Where images come from: folders, list files, webdataset tars, parquet and Hugging Face datasets."""

from __future__ import annotations

import csv
import hashlib
import json
import os
import tarfile
from bisect import bisect_right
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import accumulate
from pathlib import Path, PurePosixPath
from typing import Any

from blip3o_dit.utils.json_files import one_line, printable, short_repr

IMAGE_SUFFIXES = frozenset(
    [".jpg", ".jpeg", ".jfif", ".jpe", ".png", ".webp", ".gif", ".bmp", ".tif", ".tiff", ".ppm", ".pgm"]
)
LIST_SUFFIXES = frozenset({".txt", ".tsv", ".csv", ".jsonl"})
PATH_NAMES = ("path", "image", "file_name", "file", "filename")
CAPTION_NAMES = ("caption", "text")
IMAGE_COLUMNS = ("image", "img", "picture", "jpg", "png", "path")


@dataclass(frozen=True, slots=True)
class ImageRef:
    """One image, not read yet. Small and picklable.

    `key` is unique in its list. `location` is for people. `offset` and `size` say which bytes of `file` it
    is (size -1: all of them), `row` and `column` which cell of a table file.
    """

    key: str
    caption: str | None
    file: str
    member: str = ""
    offset: int = 0
    size: int = -1
    row: int = -1
    column: str = ""
    label: str | None = None

    @property
    def location(self) -> str:
        return f"{self.file}:{self.member}" if self.member else self.file

    def read(self) -> bytes:
        """The image's bytes. Raises OSError, or ValueError with the reason."""
        if self.row >= 0:
            return _read_cell(self.file, self.row, self.column)
        with open(self.file, "rb") as file:
            file.seek(self.offset)
            data = file.read(self.size)
        if 0 <= self.size != len(data):
            raise ValueError(f"expected {self.size} bytes, found {len(data)}")
        return data


class ImageList(list[ImageRef]):
    """The images of a source, and what was looked at and is none."""

    def __init__(self, refs: Sequence[ImageRef], root: Path) -> None:
        super().__init__(refs)
        self.root = root
        self.skipped: list[dict[str, str]] = []
        self.ignored: dict[str, int] = {}

    def digest(self) -> str:
        """SHA-256 over keys, captions, labels and sizes."""
        digest = hashlib.sha256()
        for ref in self:
            file = Path(ref.file)
            size = ref.size if ref.size >= 0 else file.stat().st_size if file.is_file() else -1
            digest.update(json.dumps([ref.key, ref.caption, ref.label, size]).encode() + b"\n")
        return digest.hexdigest()


def list_images(
    path: str | Path,
    *,
    image_column: str | None = None,
    caption_column: str | None = None,
    progress: bool = False,
) -> ImageList:
    """Every image at `path`, in an order that does not depend on the file system.

    * a folder: images below it by their suffix, captions from a .txt beside them; hidden files ignored.
    * .txt or .tsv: one `path<TAB>caption` a line. .csv: a header with path (or image, file_name) and
      caption (or text), perhaps key and label. .jsonl: objects with these names. Relative to the list file.
    * a .tar or a folder of them (webdataset): an image and a .txt or .json by stem, read in place.
    * a .parquet or a folder of them, or a dataset saved by Hugging Face datasets: needs pyarrow.

    Raises:
        FileNotFoundError, ValueError: one line naming what was expected and what was found.
    """
    path = Path(path)
    if path.is_dir():
        refs = _list_folder(path, image_column, caption_column)
    elif not path.exists():
        raise FileNotFoundError(f"{path}: expected pictures, found nothing there")
    elif path.suffix.lower() == ".tar":
        refs = _list_tar(path)
    elif path.name.lower().endswith((".tar.gz", ".tgz", ".tar.bz2", ".tar.xz", ".tar.zst")):
        raise ValueError(f"{path}: expected a plain .tar, found a compressed one: it has no random access")
    elif path.suffix.lower() in (".parquet", ".arrow"):
        refs = _list_table(path, image_column, caption_column)
    elif path.suffix.lower() in LIST_SUFFIXES:
        refs = _list_file(path)
    else:
        raise ValueError(
            f"{path}: expected a folder, a list ({', '.join(sorted(LIST_SUFFIXES))}), .tar or .parquet, "
            f"found {path.suffix or 'no suffix'}"
        )
    if not refs:
        raise ValueError(f"{path}: expected at least one picture, found none")
    _check_unique(path, refs)
    return ImageList(refs, path)


def _list_folder(path: Path, image_column: str | None, caption_column: str | None) -> list[ImageRef]:
    files = sorted(_walk(path), key=lambda file: os.fsencode(file.relative_to(path).as_posix()))
    if (path / "dataset_info.json").is_file() or (path / "state.json").is_file():
        tables = [file for file in files if file.suffix == ".arrow"]
        return [ref for table in tables for ref in _list_table(table, image_column, caption_column)]
    tars = [file for file in files if file.suffix.lower() == ".tar"]
    tables = [file for file in files if file.suffix.lower() == ".parquet"]
    pictures = [file for file in files if file.suffix.lower() in IMAGE_SUFFIXES]
    kinds = {"tars": tars, "parquet files": tables, "pictures": pictures}
    found = [f"{len(members)} {kind}" for kind, members in kinds.items() if members]
    if len(found) > 1:
        raise ValueError(f"{path}: expected one kind of source, found {', '.join(found)}")
    if tars:
        return [ref for tar in tars for ref in _list_tar(tar)]
    if tables:
        return [ref for table in tables for ref in _list_table(table, image_column, caption_column)]
    texts = {file.with_suffix("") for file in files if file.suffix.lower() == ".txt"}
    return [
        ImageRef(
            key=file.relative_to(path).as_posix(),
            caption=_read_caption(file.with_suffix(".txt")) if file.with_suffix("") in texts else None,
            file=str(file),
        )
        for file in pictures
    ]


def _walk(path: Path) -> Iterator[Path]:
    """Files below the folder; hidden ones left out, linked folders not entered (they may form loops)."""
    for folder, folders, files in os.walk(path):
        folders[:] = [name for name in folders if not name.startswith(".")]
        yield from (Path(folder, name) for name in files if not name.startswith("."))


def _read_caption(file: Path) -> str | None:
    """A caption file's text; None when it is missing or not text."""
    try:
        return file.read_text(encoding="utf-8").strip() or None
    except (OSError, UnicodeDecodeError):
        return None


def _list_file(path: Path) -> list[ImageRef]:
    reader = {".csv": _csv_rows, ".jsonl": _json_rows}.get(path.suffix.lower(), _text_rows)
    seen: dict[str, int] = {}
    given: dict[str, int] = {}
    refs = []
    for number, row in reader(path):
        name = next((row[n] for n in PATH_NAMES if row.get(n)), None)
        if not isinstance(name, str):
            raise ValueError(f"{path}: line {number}: expected a path under one of {PATH_NAMES}, found none")
        caption = next((row[n] for n in CAPTION_NAMES if row.get(n)), None)
        if row.get("key"):
            key = str(row["key"])
            if key in given:
                raise ValueError(
                    f"{path}: line {number}: key {short_repr(key)} is on line {given[key]} already"
                )
            given[key] = number
        else:
            seen[name] = seen.get(name, 0) + 1
            key = name if seen[name] == 1 else f"{name}#{seen[name]}"
        file = str(path.parent / name)
        label = row.get("label")
        refs.append(ImageRef(key=key, caption=_text_or_none(caption), file=file, label=_text_or_none(label)))
    return refs


def _lines(path: Path) -> Iterator[tuple[int, str]]:
    try:
        with open(path, encoding="utf-8-sig", newline="") as file:
            for number, line in enumerate(file, start=1):
                if line.strip():
                    yield number, line.rstrip("\r\n")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: expected UTF-8 text: {error}") from error


def _text_rows(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    for number, line in _lines(path):
        name, _, caption = line.partition("\t")
        yield number, {"path": name.strip(), "caption": caption.strip() or None}


def _csv_rows(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    try:
        with open(path, encoding="utf-8-sig", newline="") as file:
            reader = csv.DictReader(file)
            names = reader.fieldnames or []
            if not set(names) & set(PATH_NAMES):
                raise ValueError(
                    f"{path}: line 1: expected a header with one of {PATH_NAMES}, found {short_repr(names)}"
                )
            for row in reader:
                yield reader.line_num, dict(row)
    except (UnicodeDecodeError, csv.Error) as error:
        raise ValueError(f"{path}: not a readable CSV: {one_line(error)}") from error


def _json_rows(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    for number, line in _lines(path):
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise ValueError(f"{path}: line {number}: not readable JSON: {one_line(error)}") from error
        if not isinstance(row, dict):
            raise ValueError(f"{path}: line {number}: expected an object, found {type(row).__name__}")
        yield number, row


def _list_tar(path: Path) -> list[ImageRef]:
    """Members of one tar, by stem; only headers and captions are read, nothing is unpacked."""
    images: dict[str, tarfile.TarInfo] = {}
    captions: dict[str, str] = {}
    labels: dict[str, str] = {}
    try:
        with tarfile.open(path, "r:") as tar:
            for member in tar:
                name = PurePosixPath(member.name)
                suffix = name.suffix.lower()
                if not member.isfile() or name.name.startswith("."):
                    continue
                stem = str(name.with_suffix(""))
                if suffix in IMAGE_SUFFIXES:
                    images[str(name) if stem in images else stem] = member
                elif suffix in (".txt", ".json") and stem not in captions:
                    caption = _tar_caption(tar, member, suffix)
                    if caption:
                        captions[stem] = caption
                elif suffix == ".cls":
                    file = tar.extractfile(member)
                    labels[stem] = file.read(2**10).decode("utf-8", errors="replace").strip() if file else ""
                tar.members = []  # type: ignore[attr-defined]  # tarfile would keep every header it has read
    except (tarfile.TarError, EOFError, OSError) as error:
        raise ValueError(f"{path}: not a whole tar: {one_line(error)}") from error
    return [
        ImageRef(
            key=f"{path.stem}/{stem}",
            caption=captions.get(stem),
            file=str(path),
            member=member.name,
            offset=member.offset_data,
            size=member.size,
            label=_text_or_none(labels.get(stem)),
        )
        for stem, member in images.items()
    ]


def _tar_caption(tar: tarfile.TarFile, member: tarfile.TarInfo, suffix: str) -> str | None:
    file = tar.extractfile(member)
    text = file.read(2**20).decode("utf-8", errors="replace").strip() if file else ""
    if suffix == ".txt":
        return text or None
    try:
        values = json.loads(text)
    except (ValueError, RecursionError):
        return None
    found = [values[name] for name in CAPTION_NAMES if values.get(name)] if isinstance(values, dict) else []
    return str(found[0]) if found else None


def _list_table(path: Path, image_column: str | None, caption_column: str | None) -> list[ImageRef]:
    names, count, column_of = _open_table(str(path))
    image = image_column or next((name for name in IMAGE_COLUMNS if name in names), None)
    if image is None or image not in names:
        wanted = image_column or f"one of {IMAGE_COLUMNS}"
        raise ValueError(f"{path}: expected an image column ({wanted}), found {list(names)}")
    caption = caption_column or next((name for name in CAPTION_NAMES if name in names), None)
    if caption_column and caption_column not in names:
        raise ValueError(f"{path}: expected a caption column {caption_column}, found {list(names)}")
    captions = column_of(caption) if caption else [None] * count
    labels = column_of("label") if "label" in names else [None] * count
    return [
        ImageRef(
            key=f"{path.stem}/{row}",
            caption=_text_or_none(captions[row]),
            file=str(path),
            member=f"row {row}",
            row=row,
            column=image,
            label=_text_or_none(labels[row]),
        )
        for row in range(count)
    ]


def _text_or_none(value: Any) -> str | None:
    return None if value is None or value == "" else str(value)


def _open_table(file: str) -> tuple[Sequence[str], int, Callable[[str], list[Any]]]:
    """Column names, number of rows, and a function that reads one column."""
    arrow = _pyarrow()
    try:
        if file.endswith(".parquet"):
            parquet = arrow.parquet.ParquetFile(file)
            count = parquet.metadata.num_rows
            return parquet.schema_arrow.names, count, lambda c: parquet.read([c]).column(0).to_pylist()
        table = _arrow_table(file)
        return table.schema.names, table.num_rows, lambda c: table.column(c).to_pylist()
    except (arrow.ArrowException, OSError) as error:
        raise ValueError(f"{file}: not a readable table: {error}") from error


def _read_cell(file: str, row: int, column: str) -> bytes:
    """One cell of an image column: bytes, a struct with bytes or path, or a path beside the file."""
    if file.endswith(".parquet"):
        starts = _group_starts(file)
        group = bisect_right(starts, row) - 1
        cell = _group_column(file, group, column)[row - starts[group]].as_py()
    else:
        cell = _arrow_table(file).column(column)[row].as_py()
    if isinstance(cell, dict):
        cell = cell.get("bytes") or cell.get("path")
    if isinstance(cell, str):
        return (Path(file).parent / cell).read_bytes()
    if not isinstance(cell, bytes):
        raise ValueError(f"row {row}: expected image bytes, found {type(cell).__name__}")
    return cell


@lru_cache(maxsize=8)
def _group_starts(file: str) -> list[int]:
    metadata = _pyarrow().parquet.ParquetFile(file).metadata
    counts = [metadata.row_group(group).num_rows for group in range(metadata.num_row_groups)]
    return list(accumulate(counts, initial=0))


@lru_cache(maxsize=2)  # images are read in order: decode a row group once, not once per row
def _group_column(file: str, group: int, column: str) -> Any:
    return _pyarrow().parquet.ParquetFile(file).read_row_group(group, [column]).column(0)


@lru_cache(maxsize=4)
def _arrow_table(file: str) -> Any:
    """A memory-mapped Arrow stream or file, as Hugging Face datasets writes them."""
    arrow = _pyarrow()
    source = arrow.memory_map(file)
    try:
        return arrow.ipc.open_stream(source).read_all()
    except arrow.ArrowInvalid:
        return arrow.ipc.open_file(source).read_all()


def _pyarrow() -> Any:
    try:
        import pyarrow
        import pyarrow.ipc
        import pyarrow.parquet
    except ImportError:
        raise ValueError(
            "parquet and Hugging Face datasets: expected the package pyarrow, found none: "
            "pip install 'blip3o-dit[parquet]'"
        ) from None
    return pyarrow


def _check_unique(path: Path, refs: Sequence[ImageRef]) -> None:
    seen: dict[str, str] = {}
    for ref in refs:
        if ref.key in seen:
            both = f"{printable(seen[ref.key])} and {printable(ref.location)}"
            raise ValueError(f"{path}: key {short_repr(ref.key)} belongs to both {both}")
        seen[ref.key] = ref.location
