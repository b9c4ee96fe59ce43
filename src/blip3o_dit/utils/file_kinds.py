"""What kind of file this is, by its first bytes. Nothing is unpacked, unpickled or imported."""

from __future__ import annotations

import os
import re
from pathlib import Path

READ_AT_ONCE = 4096
PICTURE_SUFFIXES = (
    *(".jpg", ".jpeg", ".png", ".webp", ".gif", ".bmp", ".tif", ".tiff", ".ppm", ".pgm", ".avif", ".heic"),
    *(".heif", ".jxl"),
)

# The beginning of a file, its kind, and its name. A picture's name is what a person calls the format.
_MAGIC = (
    (b"\x89PNG", "picture", "a PNG picture"),
    (b"\xff\xd8\xff", "picture", "a JPEG picture"),
    (b"GIF87a", "picture", "a GIF picture"),
    (b"GIF89a", "picture", "a GIF picture"),
    (b"II*\0", "picture", "a TIFF picture"),
    (b"MM\0*", "picture", "a TIFF picture"),
    (b"II+\0", "picture", "a TIFF picture"),
    (b"MM\0+", "picture", "a TIFF picture"),
    (b"8BPS", "picture", "a Photoshop picture"),
    (b"\xff\x0a", "picture", "a JPEG XL picture"),
    (b"\0\0\0\x0cJXL ", "picture", "a JPEG XL picture"),
    (b"\0\0\0\x0cjP  ", "picture", "a JPEG 2000 picture"),
    (b"%PDF", "document", "a PDF document"),
    (b"{\\rtf", "document", "an RTF document"),
    (b"\xd0\xcf\x11\xe0\xa1\xb1\x1a\xe1", "document", "an Office document"),
    (b"\x1aE\xdf\xa3", "film", "a Matroska or WebM film"),
    (b"OggS", "film", "an Ogg recording"),
    (b"ID3", "film", "an MP3 recording"),
    (b"fLaC", "film", "a FLAC recording"),
    (b"\x89HDF\r\n\x1a\n", "foreign", "an HDF5 file"),
    (b"SQLite format 3", "foreign", "an SQLite file"),
    (b"MATLAB 5.0", "foreign", "a MATLAB file"),
    (b"GGUF", "foreign", "GGUF weights"),
    (b"ARROW1", "arrow", "an Arrow or Feather file"),
    (b"PAR1", "parquet", "a parquet table"),
    (b"\x93NUMPY", "npy", "one NumPy array"),
    (b"\x1f\x8b", "packed", "a gzip file"),
    (b"\x28\xb5\x2f\xfd", "packed", "a zstd file"),
    (b"\xfd7zXZ\0", "packed", "an xz file"),
    (b"BZh", "packed", "a bzip2 file"),
    (b"\x04\x22\x4d\x18", "packed", "an lz4 file"),
    (b"7z\xbc\xaf", "packed", "a 7z file"),
    (b"Rar!", "packed", "a RAR file"),
    (b"version https://git-lfs", "pointer", "a Git LFS pointer instead of the file"),
    (b"\x7fELF", "foreign", "a program"),
)
# What stands after "RIFF" and a length, and in the first box of an ISO file.
_RIFF = {b"WEBP": ("picture", "a WebP picture"), b"AVI ": ("film", "an AVI film")}
_BRANDS = {b"avif": "an AVIF picture", b"avis": "an AVIF picture"} | dict.fromkeys(
    (b"heic", b"heix", b"hevc", b"mif1", b"msf1"), "a HEIC picture"
)
# What a pickle of a container begins with: protocols 2 and up, or the older ones.
_PICKLE = re.compile(
    rb"\x80[\x02-\x05]|[}\])]|\((?:[dl]p?\d*\n|[dltVSIFK}\]cX]|[\x80-\xff])|c[\w.]+\n[\w.]+\n"
)
_HEADERS_OF_A_TAR = 32


def file_kind(path: Path) -> tuple[str, str]:
    """The kind of a file that is there, and in words what it is. Raises OSError when it cannot be read."""
    with open(path, "rb") as file:
        start = file.read(READ_AT_ONCE)
    if not start:
        return "empty", "an empty file"
    size = path.stat().st_size
    found = next(((kind, what) for magic, kind, what in _MAGIC if start.startswith(magic)), None)
    return found or _by_structure(path, start, size) or _by_text(start) or _by_pickle(start)


def _by_structure(path: Path, start: bytes, size: int) -> tuple[str, str] | None:
    length = int.from_bytes(start[:8], "little")
    if start.startswith(b"PK\x03\x04"):
        return _kind_of_zip(start)
    if start[257:262] == b"ustar":
        return _kind_of_tar(path)
    if start.startswith(b"RIFF"):
        return _RIFF.get(start[8:12], ("film", "a WAVE or other RIFF file"))
    if start[4:8] == b"ftyp":
        return ("picture", _BRANDS[start[8:12]]) if start[8:12] in _BRANDS else ("film", "an MP4 film")
    if start.startswith(b"BM") and start[6:10] == bytes(4):
        return "picture", "a BMP picture"
    if re.match(rb"P[1-6]\s+(?:#|\d)", start):
        return "picture", "a PNM picture"
    if start[16:20] == b"\xde\xc0\xef\xbe":
        return "foreign", "an LMDB database"
    if start[8:9] == b"{" and length <= size:
        return "safetensors", "a safetensors file"
    if ".tfrecord" in path.name and 0 < length < 2**40 and 16 + length <= size:
        return "foreign", "a TFRecord file"
    return None


def _kind_of_zip(start: bytes) -> tuple[str, str]:
    """By the name of the first member."""
    name = start[30 : 30 + int.from_bytes(start[26:28], "little")]
    if name.endswith(b".npy"):
        return "npz", "an .npz file"
    if name.endswith((b"/data.pkl", b"/.format_version", b"/byteorder", b"/version")):
        return "pickle in a zip", "a file of torch.save"
    if name in (b"[Content_Types].xml", b"_rels/.rels") or name.startswith((b"word/", b"xl/", b"ppt/")):
        return "document", "an Office document"
    pictures = os.fsdecode(name).lower().endswith(PICTURE_SUFFIXES)
    return "zip", "a zip file of pictures" if pictures else "a zip file"


def _kind_of_tar(path: Path) -> tuple[str, str]:
    """By the names of its first members; of a header no more is believed than a name and a size."""
    with open(path, "rb") as file:
        for _ in range(_HEADERS_OF_A_TAR):
            header = file.read(512)
            name, digits = header[:100].rstrip(b"\0"), header[124:136].strip(b" \0")
            if os.fsdecode(name).lower().endswith(PICTURE_SUFFIXES):
                return "tar_of_pictures", "a tar of pictures"
            if not re.fullmatch(rb"[0-7]{1,11}", digits):
                break
            file.seek(-(-int(digits, 8) // 512) * 512, os.SEEK_CUR)
    return "packed", "a tar archive"


def _by_text(start: bytes) -> tuple[str, str] | None:
    """A file that begins with text which is no pickle's."""
    start = start.removeprefix(b"\xef\xbb\xbf")
    head = start.lstrip().lower()
    if head.startswith((b"<!doctype html", b"<html")):
        return "page", "a web page"
    if head.startswith(b"<svg") or (head.startswith(b"<?xml") and b"<svg" in head):
        return "foreign", "an SVG drawing"
    line = start.split(b"\n")[0].rstrip(b"\r")
    if len(line) == READ_AT_ONCE:
        line = line[:-3]  # half a character may be at its end
    if b"\0" in start or not _is_text(line) or _PICKLE.match(start):
        return None
    if head.startswith((b"{", b"[")):
        return "json", "JSON"
    table = b"," in line or b"\t" in line
    return "text", "a text table such as CSV" if table else "a text file"


def _is_text(line: bytes) -> bool:
    """UTF-8 that prints."""
    try:
        return line.decode().replace("\t", " ").replace("\n", " ").replace("\r", " ").isprintable()
    except UnicodeDecodeError:
        return False


def _by_pickle(start: bytes) -> tuple[str, str]:
    return ("pickle", "a pickle") if _PICKLE.match(start) else ("unknown", "a file of an unknown kind")
