"""Command lines: a valid one for each command, with some words replaced by hostile ones."""

from __future__ import annotations

import argparse
import contextlib
import importlib
import io
import os
import pickle
import shutil
import tempfile
from pathlib import Path
from random import Random
from unittest import mock

from PIL import Image

from blip3o_dit.cli.command import INPUT_OUTPUT, command_parser
from blip3o_dit.cli.main import COMMANDS, main
from blip3o_dit.utils import addresses
from tests.data.test_safe_unpickler import HOSTILE
from tests.fuzz.formats import Make, documented, write_decoder, write_model, write_store
from tests.fuzz.judge import Trial
from tests.helpers.painted import painted_store

# Values of a flag that asks for work in proportion are kept small: ten billion steps are slow by right.
NUMBERS = ("-1", "0", "1", "2", "3", "1.5", "nan", "-inf", "inf", "x", "", "1e308", "-1e-300", "٣", "1_0")
LARGE = (*NUMBERS, str(2**31), str(2**63), str(10**30), "9" * 5000)
UNBOUNDED = frozenset(
    ("num_samples", "batch_size", "seed", "shown", "samples", "eval_batch_size", "max_pixels")
)
WORDS = ("", "x", "auto", "cuda", "cpu", "--", "-", "--seed", "--frobnicate", "\ud800", "a\nb", "é" * 300)

# The default towers are on the hub, and worker processes are processes: both by right.
ALWAYS = {"extract": ("--towers-from-scratch", "--workers=0"), "train": ("--num_workers=0",)}

# How often each command is taken: the slow ones less.
WEIGHTS = {
    "convert": 30,
    "merge": 10,
    "append": 10,
    "verify": 10,
    "export-embeddings": 10,
    "inspect": 25,
    "plot": 2,
    "generate": 25,
    "train": 4,
    "evaluate": 4,
    "calibrate": 2,
    "extract": 4,
    "distill": 2,
    "train-decoder": 2,
    "decode": 10,
}


def command_line_maker(folder: Path, seed: int) -> Make:
    places = _Places(folder)
    flags = {name: _flags(name) for name in COMMANDS}

    def make(number: int) -> Trial:
        rng = Random(f"{seed}/cli/{number}")
        places.clear()
        name = rng.choices(list(WEIGHTS), list(WEIGHTS.values()))[0]
        words = _spoiled(places.valid(name), flags[name], places.hostile, rng)
        act = _Run([name, *words, *ALWAYS.get(name, ())])
        outputs = (folder,)
        return Trial(act, 1 << 20, folder, outputs, names_file=False, canary=places.canary, slack=2 << 30)

    return make


class _Run:
    """`main` with these words: status 0, or 2 with one line that says why; 74 where no network is there."""

    def __init__(self, words: list[str]) -> None:
        self.words = words

    def __call__(self) -> None:
        shown = io.StringIO()
        try:
            with contextlib.redirect_stderr(shown), mock.patch.object(addresses, "RETRY_AFTER", ()):
                status = main(self.words)
        except SystemExit as stopped:
            status = stopped.code  # type: ignore[assignment]
            if status in (0, 2):
                raise
        except Exception as error:
            raise type(error)(f"{error} from {self.words!r:.600}") from error
        last = shown.getvalue().rstrip("\n").rsplit("\n", 1)[-1]
        if status not in (0, 2, INPUT_OUTPUT) or (status and "error: " not in last):
            raise AssertionError(f"{self.words!r:.600}: status {status!r}, last line {last!r:.300}")
        if status and len(last) > 2000:
            raise AssertionError(f"{self.words!r:.600}: {len(last)} characters")


class _Places:
    """Everything a command line may name: sound and hostile inputs, and a folder for outputs."""

    def __init__(self, folder: Path) -> None:
        self.out, self.canary = folder / "out", folder / "canary"
        self.store, self.model = write_store(folder / "store"), write_model(folder / "model")
        (self.model / "training_log.jsonl").write_text('{"step": 1, "loss": 0.5}\n')
        painted, images = painted_store(folder / "painted", samples=8)
        self.painted = (painted.path, images)
        self.decoder = write_decoder(folder / "decoder")
        self.pickle, self.evil = folder / "data.pkl", folder / "evil.pkl"
        self.pickle.write_bytes(pickle.dumps(documented()))
        self.evil.write_bytes(HOSTILE["os.system by GLOBAL"](self.canary))
        self.pictures = folder / "pictures"
        self.pictures.mkdir()
        Image.new("RGB", (9, 9), "red").save(self.pictures / "a.png")
        os.environ["BLIP3O_DIT_CACHE"] = str(folder / "cache")
        os.environ["MPLCONFIGDIR"] = str(folder / "matplotlib")  # it lists the fonts once, by a program
        importlib.import_module("matplotlib.font_manager")
        (folder / "loop").symlink_to("loop")
        (folder / "gone").symlink_to("nowhere")
        os.mkfifo(folder / "pipe")
        near = (
            "store/manifest.json",
            "store/shard-00000.safetensors",
            "loop",
            "gone",
            "nowhere",
            "nowhere/x",
            "out",
        )
        near = (
            *near,
            "data.pkl",
            "store",
            "model",
            "decoder",
            "pictures",
            "data.pkl/x",
            "loop/x",
            "evil.pkl",
            "model/config.json",
        )
        odd = (
            "",
            ".",
            "/dev/null",
            "a\0b",
            "x" * 300,
            "no/such",
            "owner/name",
            "\ud800",
            "~",
            "-",
        )
        self.hostile = (*(str(folder / name) for name in near), *odd, "hf://x/y", "http://127.0.0.1:9/x")
        self.pipe = str(folder / "pipe")

    def clear(self) -> None:
        shutil.rmtree(self.out, ignore_errors=True)
        self.out.mkdir()
        tempfile.tempdir = str(self.out)
        os.chdir(self.out)

    def valid(self, name: str) -> list[str]:
        """Words of a command that works and is quick."""
        data, model, out = str(self.store), str(self.model), str(self.out / "result")
        small = ["--model_dim=8", "--num_heads=1", "--num_layers=1", "--max_steps=1", "--batch_size=2"]
        few = ["--curve_calls", "--bootstrap=2", "--draws=2", "--draw_samples=2", "--shown=0"]
        return {
            "convert": [str(self.pickle), out],
            "merge": [data, data, out],
            "append": [data, data],
            "verify": [data],
            "export-embeddings": [data, f"{out}.npz"],
            "inspect": [data, "--no-picture"],
            "plot": [model, "--output", f"{out}.png"],
            "generate": [model, data, out, "--num_inference_steps=1"],
            "train": ["--embeddings_path", data, "--output_dir", out, *small, "--dry_run"],
            "distill": [
                model,
                data,
                "--steps=1",
                "--train_steps=1",
                "--teacher_steps=1",
                "--output_dir",
                out,
            ],
            "evaluate": [model, data, "--output_dir", out, *few],
            "calibrate": [model, data, "--split=eval"],
            "train-decoder": [
                *map(str, self.painted),
                *("--output_dir", out, "--picture_size=12", "--steps=1", "--width=8", "--num_heads=1"),
            ],
            "decode": [str(self.decoder), data, out],
            "extract": [str(self.pictures), "--output", out],
        }[name]


def _flags(command: str) -> list[argparse.Action]:
    left_out = ("help", "compile")  # compiling takes a minute, by right
    return [
        action
        for action in command_parser(command)._actions
        if action.option_strings and action.dest not in left_out
    ]


def _spoiled(
    words: list[str], flags: list[argparse.Action], paths: tuple[str, ...], rng: Random
) -> list[str]:
    """One to three edits: a positional or a path replaced, a word gone or doubled, flags with odd values."""
    words = list(words)
    for _ in range(rng.choice((1, 1, 2, 3))):
        kind = rng.random()
        if kind < 0.35:
            places = [at for at, word in enumerate(words) if not word.startswith("-")]
            words[rng.choice(places)] = rng.choice(paths)
        elif kind < 0.42:
            del words[rng.randrange(len(words))]
        elif kind < 0.5:
            words.insert(rng.randrange(len(words) + 1), rng.choice((*WORDS, *words)))
        else:
            words += _flag(rng.choice(flags), paths, rng) if flags else [rng.choice(WORDS)]
        if not any(not word.startswith("-") for word in words):
            break
    return words


def _flag(action: argparse.Action, paths: tuple[str, ...], rng: Random) -> list[str]:
    option = rng.choice(action.option_strings)
    if action.nargs == 0:
        return [option]
    if (
        action.dest == "pictures"
        or action.type is Path
        or (action.type in (None, str) and not action.choices)
    ):
        pool = (*paths, *WORDS)
    elif action.choices:
        pool = (*map(str, action.choices), *WORDS)
    else:
        pool = LARGE if action.dest in UNBOUNDED else NUMBERS
    count = action.nargs if isinstance(action.nargs, int) else rng.randrange(3) if action.nargs else 1
    return [option, *(rng.choice(pool) for _ in range(count))]
