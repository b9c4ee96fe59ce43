"""Errors of reading: what is tried again, what is a skipped image, what stops a run, which continues."""

from __future__ import annotations

import errno
import json
import os
import signal
import tarfile
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from blip3o_dit.cli.main import main
from blip3o_dit.extraction import extractor as engine
from blip3o_dit.extraction import reading_errors
from blip3o_dit.extraction.extract import extract
from blip3o_dit.extraction.reading_errors import Source
from blip3o_dit.extraction.resume import SKIPPED_FILE, read_entry
from blip3o_dit.extraction.sources.image_ref import ImageRef
from blip3o_dit.extraction.sources.listing import list_images
from blip3o_dit.utils.errors import ReadError
from tests.helpers.extraction import content, settings, write_images

read_file = ImageRef.read


@pytest.fixture(autouse=True)
def no_waiting(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reading_errors, "RETRY_AFTER", (0.0, 0.0, 0.0))


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_images(tmp_path_factory.mktemp("in") / "pictures")


@pytest.fixture(scope="module")
def whole(images: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("whole") / "store"
    extract(settings(images, output), progress=False)
    return output


@pytest.fixture
def failing(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Let reading the image b/09.png fail, `times` times."""

    def install(number: int | None, times: int = 10**6, key: str = "b/09.png") -> None:
        calls: Counter[str] = Counter()

        def read(ref: ImageRef) -> bytes:
            calls[ref.key] += 1
            if ref.key == key and calls[key] <= times:
                raise OSError(number, os.strerror(number)) if number else OSError("corrupt block")
            return read_file(ref)

        monkeypatch.setattr(ImageRef, "read", read)

    return install


def after_unit(number: int, act: Callable[[], Any], monkeypatch: pytest.MonkeyPatch) -> None:
    write_entry = engine.write_entry

    def acting(output: Path, unit: int, *rest: Any) -> None:
        write_entry(output, unit, *rest)
        if unit == number:
            act()

    monkeypatch.setattr(engine, "write_entry", acting)


def finished_units(output: Path) -> list[int]:
    return [unit for unit in range(4) if read_entry(output, unit) is not None]


def skipped(store: Path) -> dict[str, str]:
    lines = (store / SKIPPED_FILE).read_text().splitlines()
    return {image["key"]: image["reason"] for image in map(json.loads, lines)}


def test_a_folder_that_is_away_for_a_moment_is_waited_for(
    images: Path, whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    away = images.with_name("away")
    after_unit(1, lambda: images.rename(away), monkeypatch)
    waited: list[float] = []

    def comes_back(seconds: float) -> None:
        waited.append(seconds)
        if len(waited) == 2:
            away.rename(images)

    monkeypatch.setattr(reading_errors.time, "sleep", comes_back)
    extract(settings(images, tmp_path / "store"), progress=False)
    assert len(waited) == 2
    assert content(tmp_path / "store") == content(whole)


def test_a_folder_that_stays_away_stops_the_run_which_continues_to_the_same_bytes(
    images: Path, whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    away = images.with_name("away")
    with monkeypatch.context() as patch:
        after_unit(1, lambda: images.rename(away), patch)
        words = ["extract", str(images), "--output", str(tmp_path / "store"), "--towers-from-scratch"]
        words += ["--batch_size=4", "--shard_size=6", "--workers=0", "--device=cpu"]
        assert main(words) == 74
    error = capsys.readouterr().err.splitlines()[-1]
    assert "ENOENT" in error and "continue with the same command" in error
    assert finished_units(tmp_path / "store") == [0, 1]
    away.rename(images)
    assert main(words) == 0
    assert content(tmp_path / "store") == content(whole)


@pytest.mark.parametrize("number", [errno.EIO, errno.ESTALE, errno.ETIMEDOUT, errno.EMFILE, errno.ENETDOWN])
def test_a_reading_error_is_tried_again_and_then_stops_the_run(
    images: Path, whole: Path, tmp_path: Path, failing: Callable[..., None], number: int
) -> None:
    failing(number)
    with pytest.raises(
        ReadError, match=rf"b/09\.png: cannot be read: {errno.errorcode[number]}, .*same command"
    ):
        extract(settings(images, tmp_path / "store"), progress=False)
    assert finished_units(tmp_path / "store") == [0]
    failing(number, times=3)
    extract(settings(images, tmp_path / "store"), progress=False)
    assert content(tmp_path / "store") == content(whole)


@pytest.mark.parametrize("number", [errno.ENOENT, errno.EACCES, errno.ENOTDIR, None])
def test_what_is_wrong_with_one_file_is_a_skipped_image(
    images: Path, tmp_path: Path, failing: Callable[..., None], number: int | None
) -> None:
    failing(number)
    extract(settings(images, tmp_path / "store"), progress=False)
    found = errno.errorcode[number] if number else "corrupt block"
    assert skipped(tmp_path / "store")["b/09.png"].startswith(f"cannot be read: {found}")


def test_the_folder_may_come_back_between_a_read_and_the_look_at_it(
    images: Path, failing: Callable[..., None]
) -> None:
    failing(errno.ENOENT, times=1)
    ref = next(ref for ref in list_images(images) if ref.key == "b/09.png")
    assert Source.of([ref]).read(ref) == read_file(ref)


def test_a_folder_below_that_is_away_is_no_list_of_missing_images(images: Path) -> None:
    refs = list_images(images)
    source = Source.of(refs)
    below = [ref for ref in refs if ref.key.startswith("b/")]
    source.read(below[0])
    (images / "b").rename(images / "c")
    try:
        with pytest.raises(ReadError):
            source.read(below[1])
    finally:
        (images / "c").rename(images / "b")


def test_a_missing_archive_is_no_missing_image(images: Path, tmp_path: Path) -> None:
    for name in ("0.tar", "1.tar"):
        with tarfile.open(tmp_path / name, "w") as tar:
            tar.add(images / "a" / "01.png", "x.png")
    refs = list_images(tmp_path)
    source = Source.of(refs)
    (tmp_path / "1.tar").unlink()
    source.read(refs[0])
    with pytest.raises(ReadError, match="ENOENT"):
        source.read(refs[1])


def test_a_source_that_is_away_when_the_run_begins(tmp_path: Path) -> None:
    refs = list_images(write_images(tmp_path / "pictures", count=3, broken={}))
    (tmp_path / "pictures").rename(tmp_path / "away")
    with pytest.raises(FileNotFoundError, match=r"a/00\.png: expected a file that can be opened"):
        Source.of(refs)


def test_a_disk_that_fails_while_it_is_listed(images: Path, tmp_path: Path, monkeypatch: Any) -> None:
    def failing(*_: Any, **__: Any) -> None:
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr("blip3o_dit.extraction.extract.list_images", failing)
    with pytest.raises(ReadError, match=r"pictures: cannot be read: EIO.*same command"):
        extract(settings(images, tmp_path / "store"), progress=False)


def test_images_that_were_skipped_when_they_were_listed_are_in_the_list(tmp_path: Path) -> None:
    write_images(tmp_path / "pictures", count=6, broken={})
    listed = tmp_path / "pictures" / "list.txt"
    names = [f"a/{index:02d}.png" for index in range(5)]
    listed.write_text("\n".join([*names, "a/missing.png"]) + "\n")
    extract(settings(listed, tmp_path / "store"), progress=False)
    assert list(skipped(tmp_path / "store")) == ["a/missing.png"]
    listed.write_text("\n".join([*names, *(f"{index}.png" for index in range(6))]) + "\n")
    with pytest.raises(ValueError, match=r"found 6 .*--max_skipped 1"):
        extract(settings(listed, tmp_path / "other"), progress=False)


def test_too_many_skipped_images_stop_the_run_until_they_are_accepted(
    images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    broken = {f"b/{index:02d}.png": b"broken" for index in range(10, 16)}
    many = write_images(tmp_path / "many", broken=broken)
    config = settings(many, tmp_path / "store")
    with pytest.raises(
        ValueError, match=r"at most 0\.05 of 22 .* found 6 \(6 not a picture.*--max_skipped 1"
    ):
        extract(config, progress=False)
    assert finished_units(tmp_path / "store") == [0, 1]
    extract(settings(many, tmp_path / "store", max_skipped=1.0), progress=False)
    assert skipped(tmp_path / "store").keys() == broken.keys()
    with pytest.raises(ValueError, match="found 1"):
        extract(settings(images, tmp_path / "none", max_skipped=0.0), progress=False)
    with pytest.raises(ValueError, match="max_skipped: expected a share"):
        settings(images, tmp_path, max_skipped=float("nan"))


def test_images_that_could_not_be_read_are_tried_again(
    images: Path, whole: Path, tmp_path: Path, failing: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> None:
    failing(errno.ENOENT)
    with monkeypatch.context() as patch:
        after_unit(2, lambda: signal.raise_signal(signal.SIGINT), patch)
        with pytest.raises(KeyboardInterrupt):
            extract(settings(images, tmp_path / "store"), progress=False)
    failing(errno.ENOENT, times=0)
    extract(settings(images, tmp_path / "store", retry_skipped=True), progress=False)
    assert content(tmp_path / "store") == content(whole)


def test_a_decoding_process_that_is_lost_is_one_line(
    images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ImageRef, "read", lambda ref: os.kill(os.getpid(), signal.SIGKILL))
    with pytest.raises(ReadError, match=r"^--workers 1: a decoding process was lost .*/dev/shm"):
        extract(settings(images, tmp_path / "store", workers=1), progress=False)
