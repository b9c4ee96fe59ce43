"""Sources of pictures as strangers keep them: any names, encodings, layouts. Each file must be accounted for.

What a listing says is counted against what was put in: every file or member is an image, is skipped with a
reason, stands beside an image as its caption, or is counted as ignored. Else `_Lost` is raised: a finding.
"""

from __future__ import annotations

import io
import json
import os
import shutil
import tarfile
from collections.abc import Callable
from pathlib import Path
from random import Random

from blip3o_dit.extraction.sources.folders import CAPTION_SUFFIXES
from blip3o_dit.extraction.sources.formats import suffix_of
from blip3o_dit.extraction.sources.image_list import ImageList
from blip3o_dit.extraction.sources.listing import list_images
from blip3o_dit.extraction.sources.text import valid_text
from tests.fuzz.judge import Trial
from tests.fuzz.mutators import mutate_bytes

STEMS = (
    *(
        "a",
        "b",
        "c",
        "0001",
        "b.c",
        "é",
        "e\u0301",
        "caf\udce9",
        "caf\\xe9",
        "new\nline",
        "tab\t",
        " lead ",
        "-dash",
    ),
    *(
        "$HOME",
        "%s{0}",
        "x" * 120,
        ".hidden",
        "..",
        "...",
        "\U0001f600",
        "\x1b[2J",
        "train",
        "metadata",
        "a,b",
        '"q"',
    ),
)
SUFFIXES = (
    *(
        ".png",
        ".png",
        ".JPG",
        ".jpeg",
        ".webp",
        ".avif",
        ".heic",
        ".jxl",
        ".gif",
        ".tif",
        ".jp2",
        ".txt",
        ".txt",
    ),
    *(
        ".caption",
        ".json",
        ".TXT",
        ".text",
        "",
        ".md",
        ".pdf",
        ".0001",
        ".csv",
        ".npy",
        ".cls",
        ".seg.png",
        ".zip",
    ),
)
FOLDERS = ("", "", "d", "d/e", "train", "é", "caf\udce9", ".git", "a.png", "new\nline", "__MACOSX")
ENCODINGS = ("utf-8", "utf-8-sig", "utf-16", "latin-1", "cp1252", "utf-16-le")
CAPTIONS = (
    "a cat",
    "é “quoted”",
    "",
    " \n",
    "two\nlines",
    "$\\x00\x07",
    "a\tb",
    '{"caption": ["x", "y"], "label": 3}',
)


class _Lost(AssertionError):
    """A file that no line accounts for."""


def source_maker(folder: Path, seed: int) -> Callable[[int], Trial]:
    root = folder / "source"
    kinds = {"tree": _tree, "tar": _tar, "list": _list}

    def make(number: int) -> Trial:
        rng = Random(f"{seed}/source/{number}")
        shutil.rmtree(root, ignore_errors=True)
        root.mkdir()
        act = kinds[rng.choice(("tree", "tree", "tar", "list"))](root, rng)
        return Trial(act, 1 << 20, folder)

    return make


def _text(rng: Random) -> bytes:
    return rng.choice(CAPTIONS).encode(rng.choice(ENCODINGS), errors="replace")


def _name(rng: Random) -> str:
    return rng.choice(STEMS) + rng.choice(SUFFIXES)


def _read_all(images: ImageList) -> None:
    json.dumps([[image.key, image.caption, image.label] for image in images]).encode()
    assert len({image.key for image in images}) == len(images)
    for image in images:
        (image.key + (image.caption or "") + (image.label or "")).encode()
        try:
            image.read()
        except (OSError, ValueError):
            continue


# Trees


def _tree(root: Path, rng: Random) -> Callable[[], None]:
    for _ in range(rng.randrange(1, 14)):
        place = root / rng.choice(FOLDERS) / _name(rng)
        try:
            place.parent.mkdir(parents=True, exist_ok=True)
            _entry(root, place, rng)
        except (OSError, ValueError):
            continue  # there is one of that name, or a file where a folder was to be

    def act() -> None:
        images = list_images(root)
        _read_all(images)
        _check_tree(root, images)

    return act


def _entry(root: Path, place: Path, rng: Random) -> None:
    kind = rng.random()
    if kind < 0.04:
        place.symlink_to(rng.choice(("gone", "..", root, place.name, "/dev/null", "a.png")))
    elif kind < 0.07:
        os.mkfifo(place)
    elif not os.path.lexists(place):
        place.write_bytes(_text(rng) if rng.random() < 0.9 else rng.randbytes(20))


def _check_tree(root: Path, images: ImageList) -> None:
    """Every entry that is no folder, against what was said of it."""
    found = {image.file for image in images}
    skipped = len(images.skipped)
    there, beside, hidden_folders = 0, 0, 0
    pictures = set(map(valid_text, found)) | {str(entry["location"]) for entry in images.skipped}
    stems = {file[: len(file) - len(suffix_of(file))] for file in pictures}
    for place, folders, files in os.walk(root):
        hidden_folders += sum(name.startswith(".") for name in folders)
        linked = [name for name in folders if os.path.islink(os.path.join(place, name))]
        folders[:] = [name for name in folders if not name.startswith(".") and name not in linked]
        for name in files:
            file = os.path.join(place, name)
            there += 1
            suffix = suffix_of(name)
            if (
                suffix in CAPTION_SUFFIXES
                and not os.path.islink(file)
                and valid_text(file[: -len(suffix)]) in stems
            ):
                beside += os.path.isfile(file) and not name.startswith(".")
    said = len(found) + skipped + sum(images.ignored.values()) - hidden_folders
    if not there - beside <= said <= there:
        raise _Lost(f"{root}: {there} files, {beside} beside images, {said} accounted for")


# Tars


def _tar(root: Path, rng: Random) -> Callable[[], None]:
    names = [f"{rng.choice(FOLDERS)}/{_name(rng)}".lstrip("/") for _ in range(rng.randrange(1, 12))]
    buffer = io.BytesIO()
    options = {"format": rng.choice((tarfile.GNU_FORMAT, tarfile.PAX_FORMAT, tarfile.USTAR_FORMAT))}
    written = 0
    with tarfile.open(fileobj=buffer, mode="w", **options) as archive:  # type: ignore[call-overload]
        for name in names:
            info, data = tarfile.TarInfo(name), _text(rng)
            if rng.random() < 0.08:
                info.type, info.linkname = rng.choice((tarfile.LNKTYPE, tarfile.SYMTYPE)), rng.choice(names)
                data = b""
            info.size = len(data)
            try:
                archive.addfile(info, io.BytesIO(data))
            except (ValueError, UnicodeError):  # a name that this format cannot hold
                continue
            written += 1
    damaged = rng.random() < 0.4
    content = mutate_bytes(buffer.getvalue(), rng) if damaged else buffer.getvalue()
    (root / "s.tar").write_bytes(content)

    def act() -> None:
        images = list_images(root)
        _read_all(images)
        if not damaged:
            _check_tar(images, written)

    return act


def _check_tar(images: ImageList, members: int) -> None:
    """Members are images, ignored, or texts of a sample: at most six of each, and two of a skipped one."""
    said = len(images) + sum(images.ignored.values()) + len(images.skipped)
    texts = 12 * (len(images) + len(images.skipped))
    if not said <= members <= said + texts:
        raise _Lost(f"{images.root}: {members} members, {said} accounted for")


# Lists


def _list(root: Path, rng: Random) -> Callable[[], None]:
    for name in ("a.png", "é.png", "d/b.jpg", "a,b.png"):
        (root / name).parent.mkdir(exist_ok=True)
        (root / name).write_bytes(b"x")
    choices = (
        "a.png",
        "é.png",
        "d/b.jpg",
        "gone.png",
        "",
        "a,b.png",
        "~/x",
        "/etc",
        "https://x/y.png",
        "a\0b",
        "d",
    )
    rows = [(rng.choice(choices), rng.choice(CAPTIONS).split("\n")[0]) for _ in range(rng.randrange(1, 8))]
    suffix = rng.choice((".txt", ".tsv", ".csv", ".jsonl"))
    text = _list_text(rows, suffix, rng)
    encoding = rng.choice(ENCODINGS)
    data = text.encode(encoding, errors="replace")
    damaged = rng.random() < 0.4
    (root / f"l{suffix}").write_bytes(mutate_bytes(data, rng) if damaged else data)

    def act() -> None:
        images = list_images(root / f"l{suffix}")
        _read_all(images)
        if not damaged and suffix == ".jsonl" and len(images) + len(images.skipped) != len(rows):
            raise _Lost(f"{root}: {len(rows)} rows, {len(images)} images, {len(images.skipped)} skipped")

    return act


def _list_text(rows: list[tuple[str, str]], suffix: str, rng: Random) -> str:
    end = rng.choice(("\n", "\r\n", "\r"))
    if suffix == ".jsonl":
        names = rng.choice((("path", "caption"), ("file_name", "text"), ("Image", "TITLE"), ("x", "y")))
        ascii_only = rng.random() < 0.5
        return end.join(
            json.dumps(dict(zip(names, row, strict=True)), ensure_ascii=ascii_only) for row in rows
        )
    separator = rng.choice("\t,;|") if suffix != ".txt" else "\t"
    header = rng.choice((("path", "caption"), ("filepath", "title"), ("a", "b")))
    lines = [separator.join(f'"{cell}"' if rng.random() < 0.3 else cell for cell in row) for row in rows]
    return end.join([separator.join(header), *lines] if suffix == ".csv" or rng.random() < 0.3 else lines)
