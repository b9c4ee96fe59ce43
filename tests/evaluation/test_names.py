"""Any name: keys, labels, captions and paths as strangers make them, wherever they are shown."""

from __future__ import annotations

import base64
import io
import json
import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import numpy as np
import pytest
import yaml

from blip3o_dit.cli.command import user_message
from blip3o_dit.cli.main import main
from blip3o_dit.data.safe_unpickler import load_pickle
from blip3o_dit.data.store import EmbeddingStore, StoreWriter
from blip3o_dit.evaluation import plots, report
from blip3o_dit.utils.json_files import escaped
from tests.helpers.stores import write_linear_store
from tests.helpers.training import train_model

NAMES = [
    "$x$ and $\\frac{1}{0}$",
    "$",
    "_hidden",
    "50%",
    "%s {0} {{ x }} {% raw %}",
    "<script>alert(1)</script>",
    "\"&amp;'",
    "| a | b |",
    "`x` [y](z) *w* # !",
    "\x1b[31mred\x07",
    "\x00\x01\x7f\x9f",
    "a\nb\r\n\tc",
    b"caf\xe9.png".decode(errors="surrogateescape"),
    "\udfff\ud800",
    "\u202eturned\u2066",
    "\u05e9\u05dc\u05d5\u05dd",
    "\u732b \U0001f600",
    "\ufffe\uffff",
    "x" * 10_000,
    "",
    " ",
]
# What a folder can be called; safetensors opens no file below one that is not UTF-8, as the second is.
FOLDER = "m$x$_\x1b[31m<script>|50%é"
LATIN_1 = FOLDER + b"\xe9".decode(errors="surrogateescape")
FAST = ["--num_inference_steps", "1", "--device", "cpu"]
QUICK = ["--curve_calls", "1", "--bootstrap", "4", "--draws", "2", "--draw_samples", "8"]


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A store whose keys and captions are all of these, and a trained model, in folders of such a name."""
    root = tmp_path_factory.mktemp("names")
    plain = write_linear_store(root / "plain", samples=2 * len(NAMES))
    eva, clip = plain.fetch(range(2 * len(NAMES)))
    records = [{"key": f"{name}{end}", "caption": name} for end in ("", "/2") for name in NAMES]
    store = root / f"store{FOLDER}"
    with StoreWriter(store, num_tokens=9, condition_dim=12, target_dim=8, dtype="float32") as writer:
        writer.append(eva, clip, records)
    train_model(EmbeddingStore(store), root / FOLDER, max_steps=2)
    return root


@contextmanager
def ascii_output(monkeypatch: pytest.MonkeyPatch) -> Iterator[io.BytesIO]:
    """Standard output as under PYTHONIOENCODING=ascii."""
    written = io.BytesIO()
    with monkeypatch.context() as patch:
        stream = io.TextIOWrapper(written, encoding="ascii", write_through=True)
        patch.setattr(sys, "stdout", stream)
        yield written
        stream.detach()


@pytest.fixture(scope="module")
def page(root: Path) -> Path:
    """The folder of an evaluation of two models."""
    out = root / f"out{LATIN_1}"
    words = ["evaluate", str(root / FOLDER), str(root / f"store{FOLDER}"), "--output_dir", str(out)]
    more = ["--compare", str(root / FOLDER / "checkpoint-2"), "--shown", "2"]
    errors = io.StringIO()
    with pytest.MonkeyPatch.context() as patch, ascii_output(patch) as written:
        patch.setattr(sys, "stderr", errors)  # where progress bars are drawn, too
        assert main([*words, *more, *FAST, *QUICK]) == 0
    assert_printable(written.getvalue().decode("ascii"))
    assert_printable(errors.getvalue().replace("\r", ""))
    return out


def assert_printable(text: str) -> None:
    text.encode()
    assert all(line.isprintable() for line in text.split("\n"))


def images_of(page: str) -> list[str]:
    return [base64.b64decode(found).decode() for found in re.findall(r"svg\+xml;base64,([^\"]+)", page)]


def assert_sound_page(text: str) -> None:
    assert_printable(text)
    assert "<script" not in text
    for svg in images_of(text):
        ElementTree.fromstring(svg)


def test_the_report_of_such_a_store(page: Path) -> None:
    text = (page / "report.html").read_text(encoding="utf-8")
    assert_sound_page(text)
    assert len(images_of(text)) == 5
    assert "m$x$_\\x1b[31m&lt;script&gt;|50%" in text


def test_the_model_card_of_such_a_store(page: Path) -> None:
    text = (page / "README.md").read_text(encoding="utf-8")
    assert_printable(text)
    front, _, body = text.removeprefix("---\n").partition("\n---\n")
    assert yaml.safe_load(front)["model-index"][0]["name"] == escaped(FOLDER)
    assert "# m\\$x\\$\\_\\\\x1b\\[31m\\<script\\>\\|50%" in body
    assert not re.search(r"(?<!\\)<script", body)
    tables = re.findall(r"(?:^\|.*\n)+", body, flags=re.MULTILINE)
    assert len(tables) == 3 and all("\\x1b" in table for table in tables)
    for table in tables:
        assert len({len(re.findall(r"(?<!\\)\|", row)) for row in table.splitlines()}) == 1


def test_the_figures_of_such_a_store(page: Path) -> None:
    content = (page / "metrics.json").read_text(encoding="ascii")
    assert FOLDER in json.loads(content)["data"]["path"]


@pytest.mark.parametrize("output", ["store", "out.pkl", "out.npz"])
def test_generation_keeps_the_names(
    root: Path,
    tmp_path: Path,
    output: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    path = tmp_path / f"{FOLDER if output == 'store' else LATIN_1}{output}"
    words = ["generate", str(root / FOLDER), str(root / f"store{FOLDER}"), str(path), *FAST]
    with ascii_output(monkeypatch) as written:
        assert main(words) == 0
    assert "r2" in json.loads(written.getvalue())
    assert_printable(capsys.readouterr().err.rpartition("\r")[2])
    if output == "store":
        found = [(record["key"], record["caption"]) for record in EmbeddingStore(path).records()]
    elif output == "out.pkl":
        content: Any = load_pickle(path)
        found = list(zip(content["keys"], content["captions"], strict=True))
    else:
        with np.load(path) as file:
            found = list(zip(*(json.loads(bytes(file[name])) for name in ("keys", "captions")), strict=True))
    assert found == [(f"{name}{end}", name) for end in ("", "/2") for name in NAMES]


def test_a_store_is_not_written_where_safetensors_writes_none(
    root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["generate", str(root / FOLDER), str(root / f"store{FOLDER}"), str(tmp_path / LATIN_1), *FAST]
    assert main(words) == 2
    assert "expected a name in UTF-8" in capsys.readouterr().err.splitlines()[-1]
    assert not list(tmp_path.iterdir())


def test_plots_show_every_name() -> None:
    """As labels of curves, methods, maps and samples at once; each plot is whole XML and warns of nothing."""
    points = [{"solver": "euler", "network_calls": 1, "energy_score": {"value": 1.0}}]
    methods = [
        {
            "name": name,
            "spread_error": [{"spread": 1.0, "error": 1.0}],
            "maps": {"cosine": [0.5] * 4, "r2": [0.5] * 4},
        }
        for name in NAMES
    ]
    drawn = [
        plots.spread_plot(methods[:7]),
        plots.spread_plot(methods[7:14]),
        plots.curve_plot({method["name"]: points for method in methods[14:]}, (NAMES[0], 1.0)),
        *plots.position_plots(methods[:2]),
    ]
    for plot in drawn:
        assert_sound_page(plot)
    svgs = [ElementTree.fromstring(image) for plot in drawn[:3] for image in images_of(plot)]
    shown = [element.text for svg in svgs for element in svg.iter("{http://www.w3.org/2000/svg}text")]
    assert {"$x$ and $\\frac{1}{0}$", "$", " _hidden", "\u732b \U0001f600, euler"} <= {*shown}


@pytest.mark.parametrize("name", NAMES, ids=range(len(NAMES)))
def test_text_of_the_page_and_the_card(name: str) -> None:
    assert_printable(escaped(name))
    assert "\n" not in escaped(name) and "\n" not in report.markdown(name)
    assert not re.search(r"(?<!\\)[<|`$]", report.markdown(name))
    if name.isprintable():
        assert (
            re.sub(r"\\(.)", r"\1", report.markdown(name).replace("\\\\", "\0")).replace("\0", "\\") == name
        )


@pytest.mark.parametrize("name", NAMES, ids=range(len(NAMES)))
def test_errors_are_one_line_that_a_terminal_does_not_obey(name: str) -> None:
    for error in (ValueError(f"{name}: expected"), FileNotFoundError(2, "No such file", name)):
        assert user_message(error) and user_message(error).isprintable()
