"""Webdataset tars: members of one sample share their name up to the first dot; the rest is their field.

Only headers, captions and labels are read, nothing is unpacked. Of each sample one field is the image.
"""

from __future__ import annotations

import posixpath
import tarfile
from collections import Counter
from collections.abc import Iterator
from copy import copy
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from typing import IO, Any, NamedTuple

from blip3o_dit.extraction.sources.collector import Collector
from blip3o_dit.extraction.sources.formats import image_suffixes, kind_of, suffix_of, what_is_missing
from blip3o_dit.extraction.sources.image_ref import ImageRef
from blip3o_dit.extraction.sources.reading import (
    MAX_IMAGE_BYTES,
    STREAM_ERRORS,
    stream_opener,
)
from blip3o_dit.extraction.sources.text import (
    CAPTION_NAMES,
    LABEL_NAMES,
    MAX_TEXT_BYTES,
    NO_OBJECT,
    decode_text,
    first_value,
    parse_object,
    text_or_none,
    valid_text,
)
from blip3o_dit.utils.json_files import one_line

TAR_SUFFIXES = (".tar", ".tar.gz", ".tgz", ".tar.bz2", ".tar.xz")
UNREAD_TARS = (".tar.zst", ".tar.lz4", ".tar.z")

# Which field is the image: the first of these that a sample has.
_FIRST_FIELDS = ("jpg", "jpeg", "png", "webp", "avif")
_LAST_FIELDS = ("image.*", "img.*", "image", "img")
# Which are its caption; json comes after them, for its caption and its label.
_CAPTION_FIELDS = ("txt", "caption", "text", "caption.txt", "text.txt")
_LABEL_FIELDS = ("cls",)

_TAR_ERRORS = (tarfile.TarError, *STREAM_ERRORS, OSError, ValueError, OverflowError)


def is_tar(name: str) -> bool:
    return name.lower().endswith(TAR_SUFFIXES)


def stem_of_tar(name: str) -> str:
    """The name without its suffix, which begins the keys of its samples."""
    suffix = next(suffix for suffix in TAR_SUFFIXES if name.lower().endswith(suffix))
    return name[: -len(suffix)]


class _Image(NamedTuple):
    """A member that may be a sample's image; `fault` is why it cannot be read in place."""

    name: str
    size: int
    offset: int
    fault: str | None


@dataclass(slots=True)
class _Sample:
    """What a tar holds under one key: what may be its image, by field, and other fields that are known."""

    images: dict[str, list[_Image]] = field(default_factory=dict)
    caption: str | None = None
    caption_rank: int = len(_CAPTION_FIELDS) + 1
    label: str | None = None
    others: list[str] = field(default_factory=list)


def list_tar(found: Collector, name: str) -> None:
    """Add the samples of one tar; one that cannot be read to its end is skipped as a whole."""
    reader = _TarReader(_wanted_fields(found.options.image_field))
    member = None
    try:
        for tar, member in _members(found.path(name)):
            found.bar.update()
            reader.note(tar, member)
    except _TAR_ERRORS as error:
        if isinstance(error, OSError) and error.errno is not None:
            found.unreadable(name, error)
        else:
            found.skip(name, f"not a whole tar: {one_line(error)}")
        return
    found.ignored.update(reader.ignored)
    found.notes.update(reader.notes)
    if member is None:
        found.ignored["tars without a member"] += 1
    for key, sample in reader.samples.items():
        _add_sample(found, name, key, sample, reader.wanted)


def _wanted_fields(image_field: str | None) -> tuple[str, ...]:
    """Of "jpg;png": both, without a dot that may stand before them."""
    parts = (image_field or "").lower().split(";")
    return tuple(part.strip().lstrip(".") for part in parts if part.strip(" ."))


def _members(file: str) -> Iterator[tuple[tarfile.TarFile, tarfile.TarInfo]]:
    """Every member that is no folder; links, last, as what they lead to."""
    opener = stream_opener(file)
    with (opener or _open)(file) as stream:
        with tarfile.open(fileobj=stream, mode="r:") as tar:
            links = []
            for member in _headers(tar):
                if member.islnk() or member.issym():
                    links.append(member)
                elif not member.isdir():
                    yield tar, member
            _check_end(stream, tar.offset)
        if not links:
            return
        stream.seek(0)
        with tarfile.open(fileobj=stream, mode="r:") as tar:
            wanted = {_target_of(link) for link in links}
            targets = {_normal(m.name): m for m in _headers(tar) if m.isfile() and _normal(m.name) in wanted}
            yield from ((tar, _resolved(link, targets)) for link in links)


def _headers(tar: tarfile.TarFile) -> Iterator[tarfile.TarInfo]:
    for member in tar:
        yield member
        tar.members = []  # type: ignore[attr-defined]  # tarfile would keep every header it has read


def _normal(name: str) -> str:
    return posixpath.normpath(name)


def _target_of(link: tarfile.TarInfo) -> str:
    folder = posixpath.dirname(link.name) if link.issym() else ""
    return _normal(posixpath.join(folder, link.linkname))


def _resolved(link: tarfile.TarInfo, targets: dict[str, tarfile.TarInfo]) -> tarfile.TarInfo:
    """The member that a link leads to, under the link's name; the link itself when that is not in the tar."""
    target = targets.get(_target_of(link))
    if target is not None:
        target = copy(target)
        target.name = link.name
    return target or link


def _open(file: str) -> IO[bytes]:
    return open(file, "rb")


def _check_end(stream: IO[bytes], offset: int) -> None:
    """tarfile takes any block that is no header for the end, and what is behind it would be lost."""
    stream.seek(offset)
    behind = offset
    while block := stream.read(2**20):
        if block.strip(b"\0"):
            raise tarfile.ReadError(f"expected its end at byte {behind}, found more (tars joined by cat?)")
        behind += len(block)


class _TarReader:
    """Collects the members of one tar by sample, in any order."""

    def __init__(self, wanted: tuple[str, ...]) -> None:
        self.wanted = wanted
        self.samples: dict[str, _Sample] = {}
        self.ignored: Counter[str] = Counter()
        self.notes: Counter[str] = Counter()

    def note(self, tar: tarfile.TarFile, member: tarfile.TarInfo) -> None:
        key, part = _field_of(member.name)
        base = posixpath.basename(member.name)
        if base.startswith(".") or not part:
            self.ignored[kind_of(base)] += 1
        elif part in self.wanted or _is_image_field(part):
            image = _Image(valid_text(member.name), member.size, member.offset_data, _fault(member, part))
            self.samples.setdefault(key, _Sample()).images.setdefault(part, []).append(image)
        elif part == "json" or part in (*_CAPTION_FIELDS, *_LABEL_FIELDS):
            sample = self.samples.setdefault(key, _Sample())
            sample.others.append(part)
            if not _note_text(sample, part, _text_of(tar, member)):
                self.notes[NO_OBJECT] += 1
        else:
            self.ignored[_kind_of_field(part)] += 1


def _field_of(name: str) -> tuple[str, str]:
    """Key and field: the name up to the first dot of its last part, and the rest in lower case."""
    folder, base = posixpath.split(name.removeprefix("./"))
    stem, _, part = base.partition(".")
    return posixpath.join(folder, stem), part.lower()


def _kind_of_field(part: str) -> str:
    return f".{part}" if len(part) < 32 else kind_of(part)


def _is_image_field(part: str) -> bool:
    return suffix_of("x." + part) in image_suffixes() or part in _LAST_FIELDS


def _text_of(tar: tarfile.TarFile, member: tarfile.TarInfo) -> str:
    file = tar.extractfile(member) if member.isfile() else None
    return decode_text(file.read(MAX_TEXT_BYTES))[0].strip() if file else ""


def _note_text(sample: _Sample, part: str, text: str) -> bool:
    """A caption or label, whatever the order of the members; False for a JSON text without an object."""
    if part in _LABEL_FIELDS:
        sample.label = text_or_none(text)
        return True
    values: dict[str, Any] = {"caption": text}
    rank = _CAPTION_FIELDS.index(part) if part != "json" else len(_CAPTION_FIELDS)
    if part == "json":
        found = parse_object(text)
        if found is None:
            return False
        values = found
        if sample.label is None:
            sample.label = text_or_none(first_value(values, LABEL_NAMES))
    caption = text_or_none(first_value(values, CAPTION_NAMES))
    if caption is not None and rank < sample.caption_rank:
        sample.caption, sample.caption_rank = caption, rank
    return True


def _add_sample(found: Collector, name: str, key: str, sample: _Sample, wanted: tuple[str, ...]) -> None:
    """Its image, if it has one that can be read; its other pictures are counted."""
    if not sample.images:
        found.ignored.update(map(_kind_of_field, sample.others))
        return
    key = valid_text(f"{stem_of_tar(name)}/{key}")
    part = _choice(sample.images, wanted)
    images = sample.images[part] if part else [image for images in sample.images.values() for image in images]
    if part is None:
        fields = ", ".join(sample.images)
        wanted_field = found.options.image_field or "jpg, png, ..."
        reason: str | None = f"expected a field {wanted_field}, found {fields}: see --image_field"
    else:
        others = {
            _kind_of_field(other): len(sample.images[other]) for other in sample.images if other != part
        }
        found.ignored.update(others)
        reason = images[0].fault if len(images) == 1 else f"{len(images)} members with the field {part}"
    if reason is not None:
        found.skip(name, reason, key=key, location=f"{valid_text(found.path(name))}:{images[0].name}")
        return
    image = images[0]
    found.refs.append(
        ImageRef(
            key=key,
            caption=sample.caption,
            label=sample.label,
            folder=found.folder,
            name=name,
            size=image.size,
            member=image.name,
            offset=image.offset,
        )
    )


def _choice(images: dict[str, list[_Image]], wanted: tuple[str, ...]) -> str | None:
    """The field that is the image. Those with several dots ("seg.png") are not, unless they are asked for."""
    if wanted:
        return next((part for part in wanted if part in images), None)
    plain = sorted(part for part in images if "." not in part and part not in _LAST_FIELDS)
    for pattern in (*_FIRST_FIELDS, *plain, *_LAST_FIELDS):
        part = next((part for part in sorted(images) if fnmatchcase(part, pattern)), None)
        if part is not None:
            return part
    return None


def _fault(member: tarfile.TarInfo, part: str) -> str | None:
    """The reason why this member cannot be read in place."""
    if member.islnk() or member.issym():
        return f"a link to {valid_text(member.linkname)}, which is not in the tar"
    if not member.isfile():
        return "not a regular file"
    if member.sparse is not None:
        return "stored with holes: pack the tar without --sparse"
    if member.size > MAX_IMAGE_BYTES:
        return f"too large: {member.size} bytes, expected at most {MAX_IMAGE_BYTES}"
    return what_is_missing(suffix_of("x." + part))
