"""blip3o-dit demo: what the page says of pictures and samples, and the page itself in Chromium."""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from blip3o_dit.cli.main import main
from blip3o_dit.data.store import EmbeddingStore
from blip3o_dit.data.towers import TOWERS_FILE
from blip3o_dit.decoder.folder import save_decoder
from blip3o_dit.demo.answers import MEAN, TRUE, Answer, Demo
from blip3o_dit.demo.config import DemoConfig
from blip3o_dit.demo.opening import open_demo
from blip3o_dit.extraction.image_decoding import UnreadableImageError
from blip3o_dit.inference.pipeline import BLIP3oInference
from tests.helpers.extracted import extracted_store
from tests.helpers.painted import random_decoder
from tests.helpers.training import train_model

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
HOSTILE = '<img src="http://example.org/x.png">${1 + 1}'
COUNT = 9


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Pictures, their store, a model trained on it, and a decoder."""
    root = tmp_path_factory.mktemp("demo")
    (root / "images").mkdir()
    generator = np.random.default_rng(0)
    for number in range(COUNT):
        colours = generator.integers(0, 256, (4, 4, 3), dtype=np.uint8)
        Image.fromarray(colours.repeat(16, axis=0).repeat(16, axis=1)).save(root / f"images/{number:02d}.png")
        (root / f"images/{number:02d}.txt").write_text(HOSTILE)
    train_model(extracted_store(root), root / "model")
    save_decoder(random_decoder(num_tokens=16, channels=48, picture_size=16), root / "decoder")
    return root


@pytest.fixture(scope="module")
def inference(root: Path) -> BLIP3oInference:
    return BLIP3oInference(root / "model", device="cpu", dtype=torch.float32)


@pytest.fixture(scope="module")
def demo(root: Path, inference: BLIP3oInference) -> Demo:
    return open_demo(
        inference, DemoConfig(embeddings_path=str(root / "store"), decoder=str(root / "decoder"))
    )


def picture(root: Path, number: int = 4) -> bytes:
    return (root / f"images/{number:02d}.png").read_bytes()


def captions(answer: Answer) -> dict[str, list[str]]:
    """By the first two words over a row."""
    return {" ".join(over.split()[:2]): [below for _, below in row] for over, row in answer.rows.items()}


def altered(root: Path, folder: Path, change: Callable[[dict[str, Any]], Any]) -> BLIP3oInference:
    """The model with another record of its towers."""
    shutil.copytree(root / "model", folder, ignore=shutil.ignore_patterns("checkpoint-*", "checksums.json"))
    record = json.loads((folder / TOWERS_FILE).read_text())
    change(record["encoders"])
    (folder / TOWERS_FILE).write_text(json.dumps(record))
    return BLIP3oInference(folder, device="cpu", dtype=torch.float32)


def test_a_picture_has_the_tokens_of_the_store(root: Path, demo: Demo) -> None:
    """Conditions, true tokens and nearest sample of a dropped picture are those that extraction gave it."""
    dropped, stored = demo.picture(picture(root)), demo.sample(4)
    eva, clip = EmbeddingStore(root / "store").fetch([4])
    for found, expected in ((dropped.condition, eva), (dropped.true, clip), (stored.true, clip)):
        assert found is not None and abs(found - expected).max() < 0.01 * expected.std()  # it holds float16
    assert torch.equal(stored.condition, eva)
    answer = demo.answer(dropped, seed=0, draws=2)
    assert captions(answer)["Nearest in"][0].startswith(("04.png, cosine ", "0"))
    assert answer.rows[f"Nearest in the store to the {TRUE}"][0][1] == "04.png, cosine 1.000"
    own = demo.answer(stored, seed=0, draws=2)
    assert own.rows[f"Nearest in the store to the {TRUE}"][0][1] == "this sample, cosine 1.000"
    assert own.title == f"04.png: {HOSTILE}" and answer.title == "Your picture"


def test_an_answer_has_every_row_and_its_figures(demo: Demo, inference: BLIP3oInference) -> None:
    asked = demo.sample(2)
    answer = demo.answer(asked, seed=5, draws=3)
    assert asked.true is not None
    rows = captions(answer)
    assert list(rows) == ["Tokens as", "The same", "How far", "Nearest in"] and len(answer.rows) == 5
    assert rows["The same"] == [TRUE, MEAN, "draw 1", "draw 2", "draw 3"]
    assert [below.split(",")[0] for below in rows["Tokens as"]] == ["picture", *rows["The same"]]
    # By hand, from what `generate` makes of this sample
    eva, index = asked.condition, [2]
    drawn = [
        inference.model.generate(eva, seed=5, sample_index=index, sample_number=number) for number in range(3)
    ]
    assert torch.equal(drawn[0], inference.generate(eva, seed=5, sample_index=index))
    draws = torch.cat(drawn)
    mean, length = draws.mean(dim=0), asked.true.square().sum(dim=-1).mean().sqrt()
    error = (mean - asked.true[0]).square().sum(dim=-1).mean().sqrt() / length
    spread = ((1 + 1 / 3) / 2 * (draws - mean).square().sum(dim=(0, 2)).mean()).sqrt() / length
    cosine = torch.cosine_similarity(mean, asked.true[0], dim=-1).mean()
    assert rows["How far"] == [
        f"spread of the draws, {100 * spread:.0f} %",
        f"error of their mean, {100 * error:.0f} %",
    ]
    assert f"it is {100 * error:.0f} % away, at a cosine of {cosine:.3f}." in answer.figures
    other = demo.answer(asked, seed=6, draws=3)
    pixels = [
        np.asarray(each.rows["Tokens as colours: like colours, like tokens"][3][0])
        for each in (answer, other)
    ]
    assert not np.array_equal(*pixels)


def test_what_is_not_there_is_left_out_and_said(
    root: Path, tmp_path: Path, inference: BLIP3oInference
) -> None:
    alone = open_demo(inference, DemoConfig())
    answer = alone.answer(alone.picture(picture(root)), seed=0, draws=2)
    assert [over.split()[0] for over in answer.rows] == ["Tokens", "How"]
    assert ["--decoder" in note for note in alone.notes] == [
        True,
        False,
    ] and "--embeddings_path" in alone.notes[1]
    with pytest.raises(ValueError, match=r"^expected a picture, found none$"):
        alone.sample(0)
    others = altered(root, tmp_path / "b", lambda towers: towers["clip"].update(grid=8))
    assert "with grid 8, found random clip tower, seed 3 with 16" in open_demo(others, DemoConfig()).notes[1]
    without_clip = altered(root, tmp_path / "a", lambda towers: towers["clip"].update(name="owner/clip"))
    one_sided = open_demo(without_clip, DemoConfig())
    assert (
        "No true tokens of your pictures: its tower owner/clip is on the hub: name it" in one_sided.notes[1]
    )
    answer = one_sided.answer(one_sided.picture(picture(root)), seed=0, draws=2)
    assert answer.figures.endswith("which no tower here tells.")
    assert captions(answer)["Tokens as"] == ["picture", MEAN, "draw 1", "draw 2"]


def test_a_store_does_without_towers(root: Path, tmp_path: Path) -> None:
    """Nothing is fetched from a hub that was not named; pictures alone cannot do without."""
    moved = altered(root, tmp_path / "a", lambda towers: towers["eva"].update(name="owner/eva"))
    with pytest.raises(ValueError, match=r"^its tower owner/eva is on the hub: name it with --eva$"):
        open_demo(moved, DemoConfig())
    demo = open_demo(moved, DemoConfig(embeddings_path=str(root / "store"), split="eval"))
    assert [note.split(":")[0] for note in demo.notes] == ["No tokens as pictures", "No pictures of yours"]
    assert demo.gallery is not None and 0 < len(demo.gallery.offered) < COUNT
    assert demo.sample(1).index == demo.gallery.offered[1]
    with pytest.raises(ValueError, match="expected a sample of the store: no tower is here"):
        demo.picture(picture(root))
    with pytest.raises(ValueError, match=r"^sample: expected 0 to \d, found 99$"):
        demo.sample(99)
    named = open_demo(moved, DemoConfig(eva="random eva tower, seed 3"))
    assert named.picture(picture(root)).true is not None


def test_samples_without_pictures_are_shown_by_their_tokens(
    root: Path, tmp_path: Path, demo: Demo, inference: BLIP3oInference
) -> None:
    store = Path(shutil.copytree(root / "store", tmp_path / "store"))
    manifest = json.loads((store / "manifest.json").read_text())
    (store / "manifest.json").write_text(json.dumps(manifest | {"pictures": str(tmp_path / "gone")}))
    other = open_demo(inference, DemoConfig(embeddings_path=str(store)))
    assert demo.gallery is not None and other.gallery is not None
    assert other.sample(3).views == {} and list(demo.sample(3).views) == ["picture"]
    own, pictured = (np.asarray(gallery.thumbnails([3])[0]) for gallery in (other.gallery, demo.gallery))
    assert own.shape == (96, 96, 3) and pictured.shape == (224, 224, 3)


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"", "empty file"),
        (b"a text", "not a picture, or of an unknown format"),
        (lambda whole: whole[: len(whole) // 2], "damaged: "),
        (b"P6 40000 40000 255 " + bytes(99), "too large: "),
    ],
    ids=["empty", "text", "cut", "huge"],
)
def test_what_is_no_picture_is_one_line(root: Path, demo: Demo, data: Any, reason: str) -> None:
    with pytest.raises(UnreadableImageError, match=f"^({reason})"):
        demo.picture(data(picture(root)) if callable(data) else data)


@pytest.mark.parametrize(
    ("how", "message"),
    [
        (dict(seed=None, draws=2), "seed: expected an integer, found None"),
        (dict(seed=0, draws=1), "draws: expected an integer >= 2, found 1"),
    ],
)
def test_other_numbers_are_refused(demo: Demo, how: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=f"^{message}$"):
        demo.answer(demo.sample(0), **how)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["MODEL", "--split", "eval"], "--split: expected --embeddings_path beside it, found none"),
        (["MODEL", "--pictures", "x"], "--pictures: expected --embeddings_path beside it, found none"),
        (
            ["MODEL", "--port", "0", "--decoder", "store"],
            "store: expected a decoder's folder, found an embedding store",
        ),
        (["MODEL", "--port", "0", "--embeddings_path", "model"], "model: expected embeddings (a store, "),
        (["none", "--port", "0"], "none: expected a model folder"),
        (["MODEL", "--port", "TAKEN"], "expected a free one (0 takes any), found TAKEN: "),
        (["MODEL", "--port", "70000"], "expected a free one (0 takes any), found 70000: "),
    ],
)
def test_a_mistake_is_one_line(
    root: Path, words: list[str], message: str, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    pytest.importorskip("gradio")
    monkeypatch.chdir(root)
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = str(taken.getsockname()[1])
        words = [word.replace("MODEL", "model").replace("TAKEN", port) for word in words]
        assert main(["demo", "--device", "cpu", *words]) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith("error: ") and message.replace("TAKEN", port) in error


def test_a_missing_extra_is_one_line(monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    monkeypatch.setattr("blip3o_dit.cli.demo.find_spec", lambda name: None)
    assert main(["demo", "model"]) == 2
    said = "error: demo: expected the package gradio, found none: pip install gradio"
    assert capsys.readouterr().err.splitlines()[-1] == said


def test_control_c_ends_it_with_a_line(root: Path, caplog: Any, capsys: Any) -> None:
    """Also while a page is open; before that, another site's name for this machine gets no answer."""
    pytest.importorskip("gradio")
    found: list[Any] = []

    def visit() -> None:
        opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
        while not (said := [line for line in caplog.messages if line.startswith("http://127.0.0.1:")]):
            time.sleep(0.05)
        address = said[0].split()[0]
        try:
            found.append(opener.open(address, timeout=20).read().decode())
            request = urllib.request.Request(address, headers={"Host": "example.org"})
            with pytest.raises(urllib.error.HTTPError, match="400"):
                opener.open(request, timeout=20)
            found.append(opener.open(f"{address}gradio_api/heartbeat/x", timeout=20))
        finally:
            os.kill(os.getpid(), signal.SIGINT)

    caplog.set_level("INFO", logger="blip3o_dit")
    visitor = threading.Thread(target=visit)
    visitor.start()
    status = main(["demo", str(root / "model"), "--port", "0", "--device", "cpu"])
    visitor.join()
    assert status == 130 and len(found) == 2 and "gradio_config" in found[0]
    *before, last = capsys.readouterr().err.splitlines()
    assert last == "stopped: interrupted" and before[-1].endswith("control-C ends it")


@pytest.fixture(scope="module")
def address(demo: Demo) -> Iterator[str]:
    """The page, served by a thread."""
    pytest.importorskip("gradio")
    from blip3o_dit.demo.page import listening, server_of

    with listening(0) as place, server_of(demo) as server:
        thread = threading.Thread(target=server.run, kwargs={"sockets": [place]})
        thread.start()
        yield "http://{}:{}/".format(*place.getsockname())
        server.should_exit = True
        thread.join()


@contextmanager
def browser_page(width: int, asked: list[str]) -> Iterator[Any]:
    """A page of Chromium so wide; what it asks for is listed."""
    api = pytest.importorskip("playwright.sync_api")
    if CHROMIUM is None:
        pytest.skip("no Chromium on this machine")
    with api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        page = browser.new_page(viewport={"width": width, "height": 900})
        page.on("request", lambda request: asked.append(request.url))
        yield page
        browser.close()


def test_the_page_in_a_real_browser(root: Path, address: str, tmp_path: Path, capfd: Any) -> None:
    """Drop a picture, pick a sample, drop what is none: nothing is asked for elsewhere, or printed."""
    asked: list[str] = []
    (tmp_path / "notes.txt").write_text("no picture")
    with browser_page(390, asked) as page:
        page.goto(address)
        page.set_input_files("input[type=file]", str(root / "images" / "04.png"))
        page.wait_for_selector("h2:has-text('Your picture')")
        shown = page.inner_text("body")
        for said in ("draw 4, cosine", "decoded to pictures", "spread of the draws", "04.png, cosine 1.000"):
            assert said in shown
        sizes = page.eval_on_selector_all(".said img", "images => images.map(image => image.naturalWidth)")
        assert len(sizes) == 7 + 6 + 2 + 6 + 6 and min(sizes) == 16
        assert page.evaluate("document.documentElement.scrollWidth") == 390
        page.screenshot(path=tmp_path / "page.png", full_page=True)
        page.get_by_label("Thumbnail 2 of 5").click()
        page.wait_for_selector("h2:has-text('02.png')")
        assert (
            HOSTILE in page.inner_text("h2") and page.locator("img[src^=http\\:\\/\\/example]").count() == 0
        )
        page.get_by_label("Seed of the noise").fill("")
        page.get_by_role("button", name="Generate").click()
        page.wait_for_selector(".wrong:has-text('seed: expected an integer, found None')")
        page.set_input_files("input[type=file]", str(tmp_path / "notes.txt"))
        page.wait_for_selector(".wrong:has-text('not a picture, or of an unknown format')")
        assert page.locator(".said img").count() == 0
    assert len(asked) > 10 and all(each.startswith((address, "data:", "blob:")) for each in asked)
    assert np.asarray(Image.open(tmp_path / "page.png").convert("L")).std() > 10
    assert "Traceback" not in "".join(capfd.readouterr())
