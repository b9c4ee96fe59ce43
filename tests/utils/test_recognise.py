"""What is at a path is recognised and said in one line, whatever was expected there, by every command."""

from __future__ import annotations

import io
import os
import pickle
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from blip3o_dit.cli.main import main
from blip3o_dit.data.manifest import FORMAT, MANIFEST, STORE_ASIDE
from blip3o_dit.decoder.folder import save_decoder
from blip3o_dit.extraction.resume import SETTINGS_FILE
from blip3o_dit.model.config import CONFIG_FILE, BLIP3oDiTConfig
from blip3o_dit.training.checkpoint import OPTIMIZER_TENSORS, PROGRESS_FILE
from blip3o_dit.training.config import TRAINING_CONFIG_FILE
from blip3o_dit.training.curves import LOG_FILE
from blip3o_dit.utils import recognise
from blip3o_dit.utils.file_kinds import file_kind
from blip3o_dit.utils.recognise import EMBEDDINGS, MODEL, PICTURES, STORE, refusal
from tests.helpers.painted import random_decoder
from tests.helpers.stores import write_linear_store
from tests.helpers.training import train_model

POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 123456\n"
PAGE = b"<!DOCTYPE html>\n<html><body>Sign in</body></html>"


def picture(kind: str) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (8, 8)).save(buffer, kind)
    return buffer.getvalue()


def packed(kind: str, name: str = "a.txt") -> bytes:
    buffer = io.BytesIO()
    if kind == "zip":
        with zipfile.ZipFile(buffer, "w") as archive:
            archive.writestr(name, "x")
    else:
        with tarfile.open(fileobj=buffer, mode="w") as tar:
            for each in ("readme.txt", name):
                tar.addfile(tarfile.TarInfo(each))
    return buffer.getvalue()


# A name, its content, and what it is said to be.
FILES: dict[str, tuple[bytes, str]] = {
    "photo.png": (picture("PNG"), "a PNG picture"),
    "photo.jpg": (picture("JPEG"), "a JPEG picture"),
    "photo.webp": (picture("WEBP"), "a WebP picture"),
    "photo.gif": (picture("GIF"), "a GIF picture"),
    "photo.bmp": (picture("BMP"), "a BMP picture"),
    "photo.tif": (picture("TIFF"), "a TIFF picture"),
    "photo.ppm": (picture("PPM"), "a PNM picture"),
    "photo.avif": (b"\0\0\0\x1cftypavif" + bytes(40), "an AVIF picture"),
    "photo.heic": (b"\0\0\0\x1cftypheic" + bytes(40), "a HEIC picture"),
    "film.mp4": (b"\0\0\0\x1cftypisom" + bytes(40), "an MP4 film"),
    "paper.pdf": (b"%PDF-1.7\n%\xe2\xe3\n", "a PDF document"),
    "table.xlsx": (packed("zip", "[Content_Types].xml"), "an Office document"),
    "things.zip": (packed("zip"), "a zip file"),
    "photos.zip": (packed("zip", "a/b.JPG"), "a zip file of pictures"),
    "things.gz": (b"\x1f\x8b" + bytes(20), "a gzip file"),
    "things.h5": (b"\x89HDF\r\n\x1a\n" + bytes(64), "an HDF5 file"),
    "notes.txt": ("Grüße aus dem Süden\n".encode(), "a text file"),
    "notes.csv": (b"key,eva\na,1\n", "a text table such as CSV"),
    "notes.json": (b'{"a": 1}', "JSON"),
    "nothing.pkl": (b"", "an empty file"),
    "pointer.pkl": (POINTER, "a Git LFS pointer"),
    "page.safetensors": (PAGE, "a web page"),
    "bytes.bin": (bytes(range(1, 200)), "a file of an unknown kind"),
    "photos.tar": (packed("tar", "a/b.jpg"), "a tar of pictures"),
    "things.tar": (packed("tar"), "a tar archive"),
    "one.npy": (b"\x93NUMPY\x01\0" + bytes(60), "one NumPy array"),
}
# Folders and what is not there, and what these are said to be.
PLACES = {
    "images": "a folder of pictures",
    "classes": "a folder of pictures",
    "shards": "a folder of tars",
    "begun": "an unfinished extraction",
    "killed": "an unfinished store",
    "empty": "an empty folder",
    "mixed": "a folder with other files, ['a.doc']",
    "clip": "a model of another kind ('clip')",
    "run": "a run that is not finished",
    "model": "a trained model",
    "decoder": "a decoder of tokens to pictures",
    "model/checkpoint-2": "a checkpoint of a run",
    "model/model.safetensors": "a safetensors file",
    "store": "an embedding store",
    "store/manifest.json": "JSON",
    "documented.pkl": "a pickle",
    ".": "the current folder, a folder of stores: name one of them: ['store']",
    "/": "the root of the file system, ",
    "no/such": "nothing there",
    "stroe": "nothing there: did you mean store?",
    "model/chekpoint-2/x": "nothing there: did you mean model/checkpoint-2?",
    "notes.txt/x": "nothing there, as notes.txt is a file",
    "openai/clip": "nothing there",
    "https://example.org/x.pkl": "an address",
    "broken": "a link to what is not there",
    "\udcff": "nothing there",
    "/dev/null": "a device",
}
THINGS = {name: what for name, (_, what) in FILES.items()} | PLACES
TOKENS = {"store", "documented.pkl"}
PHOTOS = {name for name in FILES if name.startswith("photo.")}
READABLE = {"images", "classes", "shards", "photos.tar"} | PHOTOS
# What is listed as pictures are: the message is that of a list without any. The whole disk would be searched.
LISTS = {"notes.txt", "notes.csv", "notes.json", "things.tar", "empty", "mixed", "clip", ".", "/"}
# Words of a command with the path that is tried, and what it takes there or says of it in its own way.
OTHERS = {"model", "model/checkpoint-2"}
PLACES_OF_COMMANDS: dict[str, tuple[list[str], set[str]]] = {
    "inspect": (["inspect", "PATH", "--no-picture"], TOKENS | OTHERS | {"run", "decoder"}),
    "plot": (["plot", "PATH"], OTHERS | {"run"}),
    "generate MODEL": (["generate", "PATH", "store", "out"], OTHERS | {"clip"}),
    "generate DATA": (
        ["generate", "model", "PATH", "out", "--device=cpu"],
        TOKENS | READABLE | LISTS,
    ),
    "translate MODEL": (["translate", "PATH", "vectors.npy", "out.npy"], OTHERS | {"clip"}),
    "demo MODEL": (["demo", "PATH", "--port=0"], OTHERS | {"clip"}),
    "evaluate MODEL": (["evaluate", "PATH", "store"], OTHERS | {"clip"}),
    "evaluate DATA": (["evaluate", "model", "PATH"], TOKENS),
    "distill MODEL": (["distill", "PATH", "store", "--steps=1"], OTHERS | {"clip"}),
    "distill DATA": (["distill", "model", "PATH", "--steps=1", "--output_dir=out"], TOKENS),
    "train-decoder STORE": (["train-decoder", "PATH", "images", "--output_dir=out"], TOKENS),
    "train-decoder IMAGES": (["train-decoder", "store", "PATH", "--output_dir=out"], READABLE | LISTS),
    "decode DECODER": (["decode", "PATH", "store", "out"], {"decoder"}),
    "decode DATA": (["decode", "decoder", "PATH", "out"], TOKENS),
    "convert": (["convert", "PATH", "out"], TOKENS),
    "export": (["export", "PATH", "out.pt2"], OTHERS | {"clip"}),
    "export-embeddings": (["export-embeddings", "PATH", "out.npz"], TOKENS),
    "merge": (["merge", "store", "PATH", "out"], {"store"}),
    "append STORE": (["append", "PATH", "store"], {"store"}),
    "append MORE": (["append", "store", "PATH"], {"store"}),
    "verify": (["verify", "PATH"], {"store"}),
    "train": (["train", "--embeddings_path=PATH", "--output_dir=out"], TOKENS),
    "train --init_from": (
        ["train", "--embeddings_path=store", "--output_dir=out", "--init_from=PATH"],
        OTHERS | {"clip"},
    ),
    "train --resume_from_checkpoint": (
        ["train", "--resume_from_checkpoint=PATH"],
        {"model/checkpoint-2"},
    ),
}


@pytest.fixture(scope="module")
def things(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("things")
    for name, (content, _) in FILES.items():
        (folder / name).write_bytes(content)
    for name in ("images/a.png", "classes/cat/a.png", "shards/0.tar", "mixed/a.doc", "begun/extraction.json"):
        (folder / name).parent.mkdir(parents=True)
        (folder / name).write_bytes(picture("PNG") if name.endswith("png") else packed("tar", "a.png"))
    for name in ("killed/store.partial", "empty", "clip"):
        (folder / name).mkdir(parents=True)
    (folder / "clip" / "config.json").write_text('{"model_type": "clip"}')
    (folder / "broken").symlink_to(folder / "gone")
    content = {side: np.ones((3, 4, 2), np.float32) for side in ("eva", "clip")}
    (folder / "documented.pkl").write_bytes(pickle.dumps(content))
    store = write_linear_store(folder / "store", samples=12)
    model = train_model(store, folder / "model", save_steps=2)
    save_decoder(random_decoder(), folder / "decoder")
    (folder / "run").mkdir()
    for name in (TRAINING_CONFIG_FILE, LOG_FILE):
        shutil.copy(model / name, folder / "run")
    shutil.copytree(model / "checkpoint-2", folder / "run" / "checkpoint-2")
    return folder


@pytest.mark.parametrize("place", PLACES_OF_COMMANDS)
def test_every_command_says_what_it_was_given(
    things: Path, place: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    if place == "demo MODEL":
        pytest.importorskip("gradio")
    monkeypatch.chdir(things)
    words, taken = PLACES_OF_COMMANDS[place]
    before = sorted(map(str, things.rglob("*")))
    wrong = []
    for name, what in THINGS.items():
        if name in taken:
            continue
        status = main([word.replace("PATH", name) for word in words])
        *_, error = capsys.readouterr().err.splitlines()
        if status != 2 or not error.startswith("error: ") or "expected" not in error or what not in error:
            wrong.append((name, what, error))
    assert not wrong
    assert sorted(map(str, things.rglob("*"))) == before


def test_extract_says_what_is_no_picture(
    things: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(things)
    wrong = []
    for name, what in THINGS.items():
        if name in READABLE | LISTS:
            continue
        status = main(["extract", name, "--output=out", "--towers-from-scratch", "--workers=0"])
        *_, error = capsys.readouterr().err.splitlines()
        if status != 2 or not error.startswith("error: ") or what not in error:
            wrong.append((name, what, error))
    assert not wrong


@pytest.mark.parametrize(
    ("name", "wanted", "way"),
    [
        ("photo.png", EMBEDDINGS, "`blip3o-dit extract photo.png` makes embeddings of pictures"),
        ("images", STORE, "`blip3o-dit extract images` makes embeddings of pictures"),
        ("model", EMBEDDINGS, "`blip3o-dit inspect model` says which embeddings it learned from"),
        ("documented.pkl", STORE, "`blip3o-dit convert documented.pkl STORE` makes one of it"),
        ("store", MODEL, "`blip3o-dit train --embeddings_path store --output_dir RUN` trains a model"),
        ("run", MODEL, "give one of its checkpoints, run/checkpoint-2"),
        ("model/config.json", MODEL, "give its folder, model"),
        ("store/manifest.json", EMBEDDINGS, "give its folder, store"),
        ("things.gz", EMBEDDINGS, "unpack it first"),
        ("pointer.pkl", EMBEDDINGS, "`git lfs pull` fetches the file itself"),
        ("begun", STORE, "repeat the command that was writing it"),
        ("model", PICTURES, "`blip3o-dit inspect model` says what is in it"),
    ],
)
def test_what_helps_is_said(
    things: Path, name: str, wanted: str, way: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(things)
    assert str(refusal(name, wanted)).endswith(f": {way}")


@pytest.mark.parametrize("content", [POINTER, PAGE], ids=["pointer", "page"])
@pytest.mark.parametrize("sealed", [True, False])
def test_what_was_downloaded_in_place_of_weights_and_shards_is_said(
    things: Path, content: bytes, sealed: bool, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    what = "a Git LFS pointer" if content == POINTER else "a web page"
    model, store = (Path(shutil.copytree(things / name, tmp_path / name)) for name in ("model", "store"))
    (model / "model.ema.safetensors").write_bytes(content)
    if not sealed:
        (model / "checksums.json").unlink()
    assert main(["generate", str(model), str(store), str(tmp_path / "out"), "--device=cpu"]) == 2
    assert what in capsys.readouterr().err
    (store / "shard-00000.safetensors").write_bytes(content)
    assert main(["inspect", str(store)]) == 2
    assert what in capsys.readouterr().err


@pytest.mark.parametrize(
    "old",
    [
        pickle.dumps(value, protocol)
        for protocol in range(6)
        for value in (
            {"a": [1]},
            [1, "x"],
            (1, 2),
            {},
            [],
            np.ones(3),
        )
    ],
)
def test_pickles_of_every_protocol_are_recognised(tmp_path: Path, old: bytes) -> None:
    (tmp_path / "x").write_bytes(old)
    assert file_kind(tmp_path / "x")[0] == "pickle"


def test_hostile_files_and_folders_are_recognised_quickly(tmp_path: Path) -> None:
    """Sizes that are lies, names without end, JSON that is no configuration."""
    huge = bytearray(packed("tar"))
    huge[124:136] = b"77777777777\0"
    (tmp_path / "lie.tar").write_bytes(huge)
    assert file_kind(tmp_path / "lie.tar") == ("packed", "a tar archive")
    (tmp_path / "deep").mkdir()
    (tmp_path / "deep" / "config.json").write_text("[" * 100_000)
    assert "cannot be read" in str(refusal(tmp_path / "deep", MODEL))
    (tmp_path / "list").mkdir()
    (tmp_path / "list" / "config.json").write_text('[{"model_type": "blip3o-dit"}]')
    assert "a model of another kind (None)" in str(refusal(tmp_path / "list", EMBEDDINGS))
    os.mkfifo(tmp_path / "pipe")
    assert "found a pipe" in str(refusal(tmp_path / "pipe", EMBEDDINGS))
    (tmp_path / "pipes").mkdir()
    for name in (CONFIG_FILE, MANIFEST):
        os.mkfifo(tmp_path / "pipes" / name)  # reading one waits for ever
    assert "a folder with a manifest.json that is not a store's" in str(refusal(tmp_path / "pipes", MODEL))


def test_the_names_are_those_that_are_written() -> None:
    assert f'"{FORMAT}"'.encode() == recognise._STORE_FORMAT
    assert recognise._UNFINISHED.fullmatch(SETTINGS_FILE) and recognise._UNFINISHED.fullmatch(STORE_ASIDE)
    names = (MANIFEST, CONFIG_FILE, PROGRESS_FILE, OPTIMIZER_TENSORS, TRAINING_CONFIG_FILE, LOG_FILE)
    source = Path(recognise.__file__).read_text()
    assert all(f'"{name}"' in source for name in (*names, BLIP3oDiTConfig.model_type))


def test_recognising_is_light() -> None:
    code = "import sys, blip3o_dit.utils.recognise as r; r.refusal('.', 'model'); "
    code += "heavy = {'torch', 'numpy', 'PIL', 'transformers'} & set(sys.modules); assert not heavy, heavy"
    subprocess.run([sys.executable, "-c", code], check=True)
