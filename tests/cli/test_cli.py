"""Command lines: every flag reaches the run, mistakes are one line and a non-zero exit."""

from __future__ import annotations

import json
import pickle
import re
import subprocess
import sys
from dataclasses import fields
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from blip3o_dit.cli.command import command_parser, run_command, user_message
from blip3o_dit.cli.main import COMMANDS, main
from blip3o_dit.cli.train import main as train_main
from blip3o_dit.data.store import EmbeddingStore
from blip3o_dit.training.config import DEBUG_DEFAULTS, NOTED, TrainingConfig
from blip3o_dit.training.resolve import resolve_config
from tests.helpers.stores import write_linear_store

ROOT = Path(__file__).parents[2]
SMALL = ["--model_dim=32", "--num_layers=1", "--num_heads=2", "--max_steps=2", "--logging_steps=1"]


def documented_pickle(path: Path, samples: int = 6) -> Path:
    generator = np.random.default_rng(0)
    content = {
        "eva_blip3o_embeddings": generator.normal(size=(samples, 4, 10)).astype(np.float32),
        "clip_blip3o_embeddings": generator.normal(size=(samples, 4, 6)).astype(np.float32),
        "captions": [f"caption {i}" for i in range(samples)],
        "keys": [f"key {i}" for i in range(samples)],
        "config": {"grid": 2},
    }
    path.write_bytes(pickle.dumps(content))
    return path


YES_NO_OR_DEFAULT = ("cuda_graphs", "async_checkpoints", "auto_micro_batch")
NOT_WITH_OTHERS = ("fp16", "selective_checkpointing", "cuda_graphs")


def test_each_flag_reaches_its_field() -> None:
    words: list[str] = []
    expected = {}
    needs_a_model = {"init_from", "init_statistics", "extend_epochs", "extend_steps"}  # test_resolve.py
    for option in fields(TrainingConfig):
        if option.name in needs_a_model or option.name in NOTED:
            continue
        if isinstance(option.default, bool) or option.name in YES_NO_OR_DEFAULT:
            value = not option.default and option.name not in (
                "fp16",
                "selective_checkpointing",
                "cuda_graphs",
            )
            words.append(f"--{option.name}" if value else f"--no_{option.name}")
        elif option.metadata["choices"]:
            value = option.metadata["choices"][-1]
            words += [f"--{option.name}", value]
        elif isinstance(option.default, float):
            value = 0.5 if option.name == "sigma_max" else 0.25
            words += [f"--{option.name}", str(value)]
        elif option.name.startswith(("wandb", "embeddings", "output", "report", "group", "send")):
            value = "text"
            words += [f"--{option.name}", "text"]
        else:
            value = 4
            words += [f"--{option.name}", "4"]
        expected[option.name] = value
    given = vars(command_parser("train").parse_args(words))
    apart = ("optimizer", "early_stop")  # --memory split excludes muon, --no_calibrate an early stop
    together = {name: given[name] for name in expected if name not in apart}
    for settings in (together, *({name: given[name]} for name in apart)):
        config = resolve_config(settings, debug=False, resume=None)
        assert {name: getattr(config, name) for name in settings} == {n: expected[n] for n in settings}


def test_debug_is_small_and_explicit_flags_win() -> None:
    config = resolve_config({"model_dim": 64}, debug=True, resume=None)
    assert config.model_dim == 64
    assert config.max_steps == DEBUG_DEFAULTS["max_steps"]


def test_train_generate_convert(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = documented_pickle(tmp_path / "data.pkl")
    assert main(["convert", str(source), str(tmp_path / "store"), "--dtype", "float32"]) == 0
    store = EmbeddingStore(tmp_path / "store")
    assert (store.num_samples, store.num_tokens, store.condition_dim, store.target_dim) == (6, 4, 10, 6)
    assert store.records([2]) == [{"key": "key 2", "caption": "caption 2"}]
    run = [
        "train",
        "--embeddings_path",
        str(store.path),
        "--output_dir",
        str(tmp_path / "run"),
        *SMALL,
        "--device=cpu",
    ]
    assert main(run) == 0
    capsys.readouterr()
    out = tmp_path / "out.pkl"
    words = ["generate", str(tmp_path / "run"), str(source), str(out), "--num_inference_steps", "2"]
    assert main([*words, "--device", "cpu"]) == 0
    metrics = json.loads(capsys.readouterr().out)
    assert "cosine_similarity_mean" in metrics and out.is_file()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "--embeddings_path: expected a path, found none"),
        (["--embeddings_path", "nowhere.pkl", "--output_dir", "x"], "nowhere.pkl"),
        (["--embeddings_path", "{store}"], "--output_dir: expected a path, found none"),
        (["--embeddings_path", "{store}", "--output_dir", "x", "--num_heads", "3"], "num_heads=3"),
        (["--embeddings_path", "{store}", "--output_dir", "x", "--eval_split", "2.5"], "eval_split"),
        (["--embeddings_path", "{store}", "--output_dir", "x", "--resume_from_checkpoint", "no"], "no: "),
    ],
)
def test_mistakes_are_one_line(
    words: list[str],
    message: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    store = write_linear_store(tmp_path / "store", samples=6)
    assert train_main([word.format(store=store.path) for word in words]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and error.count("\n") == 1
    assert message in error
    assert not (tmp_path / "x").exists()


def test_unknown_and_abbreviated_flags_are_refused() -> None:
    for words in (["--learning_rat", "1"], ["--frobnicate"]):
        with pytest.raises(SystemExit) as stopped:
            train_main(words)
        assert stopped.value.code == 2


def test_a_bug_of_ours_is_not_dressed_up_as_a_mistake(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken() -> None:
        raise KeyError("ours")

    with pytest.raises(KeyError):
        run_command(broken)

    def mistaken() -> None:
        raise ValueError("two\nlines")

    assert run_command(mistaken) == 2
    monkeypatch.setenv("BLIP3O_DIT_TRACEBACK", "1")
    with pytest.raises(ValueError, match="two"):
        run_command(mistaken)


def test_one_line_messages() -> None:
    assert user_message(ValueError("a\n  b")) == "a b"
    assert (
        user_message(ValueError("s: there (overwrite=True replaces it)"))
        == "s: there (--overwrite replaces it)"
    )
    assert (
        user_message(FileNotFoundError(2, "No such file or directory", "x")) == "x: No such file or directory"
    )


def run_program(words: list[str], **options: Any) -> subprocess.CompletedProcess[str]:
    program = [sys.executable, "-m", "blip3o_dit", *words]
    return subprocess.run(program, capture_output=True, text=True, check=False, **options)


def test_version_and_the_bare_command() -> None:
    found = run_program(["--version"])
    assert (found.returncode, found.stdout.strip()) == (0, f"blip3o-dit {version('blip3o-dit')}")
    bare = run_program([])
    assert bare.returncode == 0
    assert all(f"  {name} " in bare.stdout for name in COMMANDS)
    assert bare.stdout == run_program(["--help"]).stdout


@pytest.mark.parametrize("words", [["frobnicate"], ["--frobnicate"], [""]])
def test_an_unknown_command_is_a_mistake(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        main(words)
    assert stopped.value.code == 2
    assert "error: " in capsys.readouterr().err


def test_a_reader_that_has_seen_enough_gets_no_message() -> None:
    code = (
        "import sys; from blip3o_dit.cli.command import run_command\n"
        "sys.exit(run_command(lambda: [sys.stdout.write('line\\n') for _ in range(10**5)]))"
    )
    program = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    assert program.stdout is not None and program.stderr is not None
    program.stdout.close()
    assert program.stderr.read() == b""
    assert program.wait() == 141


TRAIN = "--embeddings_path=x --output_dir=y"


@pytest.mark.parametrize(
    ("line", "module"),
    [
        (f"src/blip3o_dit/__main__.py train {TRAIN}", "argparse"),
        (f"src/blip3o_dit/__main__.py train {TRAIN}", "torch"),
        (f"train_blip3o_dit.py {TRAIN}", "blip3o_dit.cli.parser"),
        (f"train_blip3o_dit.py {TRAIN}", "safetensors"),
        ("extract_embeddings_production.py", "datetime"),  # numpy's, which then says that numpy is broken
    ],
)
def test_an_interrupt_is_one_line_while_libraries_are_imported(
    line: str, module: str, tmp_path: Path
) -> None:
    code = f"""
import os, runpy, signal, sys
signal.signal(signal.SIGINT, signal.default_int_handler)  # which a shell's background job is without
class Interrupt:
    def find_spec(self, name, *others):
        if name == {module!r}:
            os.kill(os.getpid(), signal.SIGINT)
sys.meta_path.insert(0, Interrupt())
sys.argv = {line.split()}
runpy.run_path(os.path.join({str(ROOT)!r}, sys.argv[0]), run_name="__main__")
"""
    words = [sys.executable, "-c", code]
    found = subprocess.run(words, cwd=tmp_path, capture_output=True, text=True, check=False)
    # Where the libraries come late, and where importing those before this one takes long.
    said = re.sub("^(.*: starting|loading torch and transformers)\n", "", found.stderr, flags=re.MULTILINE)
    assert (said, found.returncode) == ("stopped: interrupted\n", 130)
