"""A generation that was stopped goes on with the same command; its output is the uninterrupted one's."""

from __future__ import annotations

import json
import os
import shutil
import signal
from collections.abc import Callable
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import pytest
import torch

from blip3o_dit.cli import generate as command
from blip3o_dit.cli.main import main
from blip3o_dit.data.store import EmbeddingStore, StoreWriter
from blip3o_dit.inference import generated_store
from blip3o_dit.inference.pipeline import BLIP3oInference
from blip3o_dit.inference.unfinished import Unfinished
from blip3o_dit.model.blip3o_dit import BLIP3oDiTModel
from blip3o_dit.training.config import TrainingConfig
from blip3o_dit.utils import kept_state
from blip3o_dit.utils.durations import in_words
from blip3o_dit.utils.errors import WriteError
from tests.conftest import randomize, tiny_config
from tests.helpers.inference_jobs import stop_and_go_on
from tests.helpers.processes import launch
from tests.helpers.stores import write_linear_store

SAMPLE = 9 * (12 + 8) * 4  # bytes
OUTPUTS = ["store", "out.pkl", "out.npz"]
WORDS = ["--num_inference_steps", "1", "--batch_size", "4", "--device", "cpu", "--dtype", "float32"]


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model, 30 samples, and what an uninterrupted generation makes of them, in shards of 12."""
    root = tmp_path_factory.mktemp("unfinished")
    model = BLIP3oDiTModel(tiny_config())
    randomize(model)
    model.set_statistics(
        condition=(torch.full((12,), 3.0), torch.ones(12)), target=(torch.zeros(8), torch.ones(8))
    )
    model.save_pretrained(root / "model")
    write_linear_store(root / "data", samples=30)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(generated_store, "MAX_SHARD_BYTES", 12 * SAMPLE)
        for name in OUTPUTS:
            assert run(root, root / name) == 0
    return root


@pytest.fixture(autouse=True)
def _keep_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Everything is kept, as in a run that takes long."""
    monkeypatch.setattr(generated_store, "MAX_SHARD_BYTES", 12 * SAMPLE)
    monkeypatch.setattr(kept_state, "KEEP_EVERY", 0.0)
    monkeypatch.setattr(kept_state, "KEEP_SHARE", 0)


def run(root: Path, output: Path, *words: str) -> int:
    return main(["generate", str(root / "model"), str(root / "data"), str(output), *WORDS, *words])


def contents(output: Path) -> dict[str, bytes]:
    files = output.rglob("*") if output.is_dir() else [output]
    return {str(file.relative_to(output)): file.read_bytes() for file in files if file.is_file()}


class Batches:
    """Counts the batches that are generated, and does something instead of one."""

    def __init__(
        self, patch: pytest.MonkeyPatch, *, before: int, do: Callable[[], Any] = lambda: None
    ) -> None:
        self.count, self.before, self.do = 0, before, do
        whole = BLIP3oDiTModel.generate

        def generate(model: BLIP3oDiTModel, *arguments: Any, **options: Any) -> torch.Tensor:
            if self.count == self.before:
                self.do()
            self.count += 1
            return whole(model, *arguments, **options)

        patch.setattr(BLIP3oDiTModel, "generate", generate)


def interrupt() -> None:
    raise KeyboardInterrupt


@pytest.mark.parametrize("output", OUTPUTS)
@pytest.mark.parametrize("done", [1, 3, 5, 7])
def test_an_interrupted_generation_goes_on(
    root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, output: str, done: int, capsys: Any
) -> None:
    """8 batches in 3 shards: in a shard, at its end, in the last one."""
    with monkeypatch.context() as patch:
        Batches(patch, before=done, do=interrupt)
        assert run(root, tmp_path / output) == 75
    assert capsys.readouterr().err.splitlines()[-1] == (
        f"stopped: {tmp_path / output}: what is generated is kept: the same command goes on"
    )
    with pytest.raises((FileNotFoundError, ValueError)):
        EmbeddingStore(tmp_path / output)
    with monkeypatch.context() as patch:
        batches = Batches(patch, before=-1)
        assert run(root, tmp_path / output) == 0
    assert batches.count == 8 - done
    out, err = capsys.readouterr()
    left = 30 - 4 * done
    assert f"generating {left} of 30 samples, the others are there, 1 network call each: about 1 s" in err
    assert "r2" in json.loads(out)
    assert contents(tmp_path / output) == contents(root / output)
    assert [file.name for file in tmp_path.iterdir()] == [output]


def test_it_goes_on_again_and_again(root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for _ in range(7):
        with monkeypatch.context() as patch:
            Batches(patch, before=1, do=interrupt)
            assert run(root, tmp_path / "store") == 75
    assert run(root, tmp_path / "store") == 0
    assert contents(tmp_path / "store") == contents(root / "store")


@pytest.mark.parametrize("output", OUTPUTS)
def test_nothing_is_left_where_nothing_was_generated(
    root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, output: str, capsys: Any
) -> None:
    Batches(monkeypatch, before=0, do=interrupt)
    assert run(root, tmp_path / "new" / output) == 130
    assert capsys.readouterr().err.splitlines()[-1] == "stopped: interrupted"
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("output", OUTPUTS)
def test_a_killed_generation_goes_on(root: Path, tmp_path: Path, output: str) -> None:
    """What it holds while it works, its lock too, is that of a dead process."""

    def killed() -> None:
        with pytest.MonkeyPatch.context() as patch:
            Batches(patch, before=5, do=lambda: os.kill(os.getpid(), signal.SIGKILL))
            run(root, tmp_path / output)

    process = get_context("fork").Process(target=killed)
    process.start()
    process.join()
    assert process.exitcode == -signal.SIGKILL
    assert Unfinished(tmp_path / output).has_samples()
    assert run(root, tmp_path / output) == 0
    assert contents(tmp_path / output) == contents(root / output)
    assert [file.name for file in tmp_path.iterdir()] == [output]


@pytest.mark.parametrize("output", OUTPUTS)
def test_a_full_disk_loses_nothing(
    root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, output: str, capsys: Any
) -> None:
    written: list[Path] = []
    whole = kept_state.save_tensors

    def save(tensors: Any, file: Path, *more: Any) -> None:
        written.append(file)
        if len(written) == 5:
            raise WriteError(f"{file}: expected to write it whole, found: No space left on device")
        whole(tensors, file, *more)

    with monkeypatch.context() as patch:
        patch.setattr(kept_state, "save_tensors", save)
        assert run(root, tmp_path / output) == 74
    assert "No space left on device" in capsys.readouterr().err.splitlines()[-1]
    with monkeypatch.context() as patch:
        batches = Batches(patch, before=-1)
        assert run(root, tmp_path / output) == 0
    assert batches.count == 4
    assert contents(tmp_path / output) == contents(root / output)


def begun(root: Path, output: Path) -> None:
    with pytest.MonkeyPatch.context() as patch:
        Batches(patch, before=5, do=interrupt)
        assert run(root, output) == 75


OTHERS = [
    (["--seed", "1"], "seed is 0 there, 1 here"),
    (["--num_inference_steps", "2"], "num_inference_steps is 1 there, 2 here"),
    (["--solver", "heun"], "solver is 'euler' there, 'heun' here"),
    (["--guidance_scale", "2"], "guidance_scale is 1.0 there, 2.0 here"),
    (["--guidance_interval", "0.1", "1"], "guidance_interval is [0.0, 1.0] there, [0.1, 1.0] here"),
    (["--dtype", "bfloat16"], "dtype is 'float32' there, 'bfloat16' here"),
    (["--quantize", "int8"], "quantize is None there, 'int8' here"),
    (["--num_samples", "7"], "num_samples is None there, 7 here; samples is 30 there, 7 here"),
    (["data"], "(other data)"),
    (["model"], "(another model)"),
]


@pytest.mark.parametrize("output", ["store", "out.npz"])
def test_another_request_is_refused_before_the_model_is_loaded(
    root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, output: str, capsys: Any
) -> None:
    """Into an unfinished output and into a finished one."""
    begun(root, tmp_path / output)
    eva, clip = EmbeddingStore(root / "data").fetch(range(30))
    sizes = {"num_tokens": 9, "condition_dim": 12, "target_dim": 8}
    with StoreWriter(tmp_path / "data", **sizes) as writer:
        writer.append(eva + 1, clip, [{"key": str(number)} for number in range(30)])
    other = BLIP3oDiTModel(tiny_config())
    randomize(other, seed=1)
    other.save_pretrained(tmp_path / "model")
    monkeypatch.setattr(command, "_load", None)
    for place, kind in ((tmp_path, "an unfinished"), (root, "a finished")):
        before = contents(place / output)
        for words, message in OTHERS:
            model = tmp_path / "model" if words == ["model"] else root / "model"
            data = tmp_path / "data" if words == ["data"] else root / "data"
            more = words if len(words) > 1 else []
            capsys.readouterr()
            assert main(["generate", str(model), str(data), str(place / output), *WORDS, *more]) == 2
            (line,) = capsys.readouterr().err.splitlines()
            assert f"{output}: holds {kind} generation with another request" in line
            assert message in line and "(--overwrite)" in line
        assert contents(place / output) == before


@pytest.mark.parametrize("output", OUTPUTS)
def test_overwrite_begins_another_request_anew_and_goes_on_with_the_same(
    root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, output: str, capsys: Any
) -> None:
    begun(root, tmp_path / output)
    with monkeypatch.context() as patch:
        batches = Batches(patch, before=3, do=interrupt)
        assert run(root, tmp_path / output, "--seed", "1", "--overwrite") == 75
    assert "begun anew: what there is belongs to another request" in capsys.readouterr().err
    with monkeypatch.context() as patch:
        batches = Batches(patch, before=-1)
        assert run(root, tmp_path / output, "--seed", "1", "--overwrite") == 0
    assert batches.count == 5
    assert run(root, tmp_path / "fresh" / output, "--seed", "1") == 0
    assert contents(tmp_path / output) == contents(tmp_path / "fresh" / output)


@pytest.mark.parametrize("output", OUTPUTS)
def test_a_finished_one_says_so_before_the_model_is_loaded(
    root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, output: str, capsys: Any
) -> None:
    assert run(root, tmp_path / output) == 0
    first = capsys.readouterr().out
    before = contents(tmp_path / output)
    with monkeypatch.context() as patch:
        patch.setattr(command, "_load", None)
        for batch_size in ("4", "2"):
            assert run(root, tmp_path / output, "--batch_size", batch_size) == 0
            out, err = capsys.readouterr()
            assert out == first and json.loads(out)
            assert err == f"{tmp_path / output}: this generation is finished already\n"
    assert contents(tmp_path / output) == before
    with monkeypatch.context() as patch:
        batches = Batches(patch, before=-1)
        assert run(root, tmp_path / output, "--overwrite") == 0
    assert batches.count == 8


def test_an_old_store_stays_until_the_new_one_is_whole(
    root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_linear_store(tmp_path / "store", samples=4)
    with monkeypatch.context() as patch:
        Batches(patch, before=5, do=interrupt)
        assert run(root, tmp_path / "store", "--overwrite") == 75
    assert EmbeddingStore(tmp_path / "store").num_samples == 4
    assert run(root, tmp_path / "store", "--overwrite") == 0
    assert contents(tmp_path / "store") == contents(root / "store")


def test_a_damaged_shard_is_generated_again(root: Path, tmp_path: Path, capsys: Any) -> None:
    begun(root, tmp_path / "store")
    shard = tmp_path / "store" / "store.partial" / "shard-00000.safetensors"
    data = bytearray(shard.read_bytes())
    data[-1] ^= 1
    shard.write_bytes(data)
    assert run(root, tmp_path / "store") == 0
    assert "shard 0 is generated again" in capsys.readouterr().err
    assert contents(tmp_path / "store") == contents(root / "store")


def test_a_damaged_state_is_generated_again(root: Path, tmp_path: Path) -> None:
    begun(root, tmp_path / "out.npz")
    (tmp_path / "out.npz.parts" / "state.safetensors").write_bytes(b"no such thing")
    assert run(root, tmp_path / "out.npz") == 0
    assert contents(tmp_path / "out.npz") == contents(root / "out.npz")


def test_another_batch_size_goes_on_with_a_warning(root: Path, tmp_path: Path, capsys: Any) -> None:
    begun(root, tmp_path / "store")
    assert run(root, tmp_path / "store", "--batch_size", "3") == 0
    assert "batch_size is 4 there, 3 here: last bits may differ" in capsys.readouterr().err
    found, expected = EmbeddingStore(tmp_path / "store"), EmbeddingStore(root / "store")
    torch.testing.assert_close(found.fetch(range(30))[1], expected.fetch(range(30))[1], rtol=1e-3, atol=1e-3)


def test_a_folder_of_somebody_elses_is_not_touched(root: Path, tmp_path: Path, capsys: Any) -> None:
    (tmp_path / "out.npz.parts").mkdir()
    (tmp_path / "out.npz.parts" / "mine").write_text("mine")
    assert run(root, tmp_path / "out.npz") == 2
    assert "expected no folder of this name, or an unfinished generation's" in capsys.readouterr().err
    assert (tmp_path / "out.npz.parts" / "mine").read_text() == "mine"


def test_no_other_store_is_written_over_what_is_kept(root: Path, tmp_path: Path) -> None:
    begun(root, tmp_path / "store")
    with pytest.raises(ValueError, match="found an unfinished generation: repeat its command"):
        StoreWriter(tmp_path / "store", num_tokens=9, condition_dim=12, target_dim=8)


def test_from_python_too(root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    inference = BLIP3oInference(root / "model", device="cpu", dtype=torch.float32)
    options: dict[str, Any] = dict(batch_size=4, num_inference_steps=1, progress=False)
    with monkeypatch.context() as patch:
        Batches(patch, before=2, do=interrupt)
        with pytest.raises(KeyboardInterrupt):
            inference.generate_from_dataset(root / "data", output_path=tmp_path / "out.npz", **options)
    with pytest.raises(ValueError, match="seed is 0 there, 1 here"):
        inference.generate_from_dataset(root / "data", output_path=tmp_path / "out.npz", seed=1, **options)
    inference.generate_from_dataset(root / "data", output_path=tmp_path / "out.npz", **options)
    assert contents(tmp_path / "out.npz") == contents(root / "out.npz")


@pytest.mark.slow
def test_several_processes_go_on(root: Path, tmp_path: Path) -> None:
    """24 samples in 6 batches; two processes have done two each, or one of two samples a condition."""
    write_linear_store(tmp_path / "data", samples=24)
    shutil.copytree(root / "model", tmp_path / "model")
    config = TrainingConfig(embeddings_path=str(tmp_path / "data"), output_dir="x", eval_split=0.5)
    (tmp_path / "model" / "training_config.json").write_bytes(config.to_json())
    (tmp_path / "one").mkdir()
    assert stop_and_go_on(tmp_path / "model", tmp_path / "data", tmp_path / "one") == [2, 4, 2, 4, 2, 6]
    found = launch(stop_and_go_on, 2, tmp_path / "model", tmp_path / "data", tmp_path / "two")
    assert found == [[2, 1, 2, 1, 2, 2]] * 2
    one, two = (EmbeddingStore(tmp_path / name / "store").fetch(range(24)) for name in ("one", "two"))
    assert all(torch.equal(a, b) for a, b in zip(one, two, strict=True))
    assert contents(tmp_path / "one" / "out.npz") == contents(tmp_path / "two" / "out.npz")
    files = [tmp_path / name / "report" / "metrics.json" for name in ("one", "two")]
    scores = [[method["metrics"] for method in json.loads(f.read_text())["methods"]] for f in files]
    assert scores[0] == scores[1]


@pytest.mark.parametrize(
    ("seconds", "words"),
    [(0.1, "1 s"), (99, "99 s"), (100, "2 min"), (5000, "83 min"), (9000, "2.5 h"), (200_000, "2 days")],
)
def test_durations_in_words(seconds: float, words: str) -> None:
    assert in_words(seconds) == words
