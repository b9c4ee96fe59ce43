"""Continued runs equal uninterrupted ones; checkpoints are whole or not there; stopping, refusals, health."""

from __future__ import annotations

import json
import multiprocessing
import os
import shutil
import signal
import subprocess
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch.utils.data import DataLoader

from blip3o_dit.cli import command
from blip3o_dit.cli.train import _checkpoint
from blip3o_dit.data.store import EmbeddingStore
from blip3o_dit.inference.pipeline import BLIP3oInference
from blip3o_dit.model.loading import EMA_FILE
from blip3o_dit.training import anomalies
from blip3o_dit.training.anomalies import NonFiniteLossError
from blip3o_dit.training.checkpoint import checkpoints, keep_newest, newest_whole
from blip3o_dit.training.config import TrainingConfig
from blip3o_dit.training.curves import LOG_FILE, read_log
from blip3o_dit.training.resolve import resolve_config
from blip3o_dit.training.run import train
from blip3o_dit.training.stopping import outlive_stops
from blip3o_dit.training.trainer import BLIP3oTrainer
from blip3o_dit.utils import atomic
from blip3o_dit.utils.checksums import CHECKSUMS_FILE, seal, verify
from blip3o_dit.utils.errors import StoppedEarly, WriteError
from blip3o_dit.utils.json_files import read_json
from blip3o_dit.utils.stateless_random import DRAWS_VERSION
from tests.helpers.stores import write_linear_store
from tests.helpers.training import config_for, make_trainer, same

# 40 samples to train on, 5 steps a pass; steps 3 and 6 lie inside a pass and inside a logging interval of 4.
EVERY = dict(num_epochs=2, logging_steps=4, save_steps=3, eval_steps=4)


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> EmbeddingStore:
    return write_linear_store(tmp_path_factory.mktemp("data") / "store")


@pytest.fixture(scope="module")
def whole(store: EmbeddingStore, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return train(config_for(store, tmp_path_factory.mktemp("run") / "whole", **EVERY))


def logged(run: Path) -> list[dict[str, float]]:
    """The log without what is about time."""
    timed = ("samples_per_second", "steps_per_second", "seconds_per_step", "runtime", "mfu", "data_wait")
    return [{k: v for k, v in entry.items() if not k.endswith(timed)} for entry in read_log(run / LOG_FILE)]


def assert_same_run(a: Path, b: Path) -> None:
    for file in ("model.safetensors", EMA_FILE, "checkpoint-10/optimizer.safetensors"):
        assert same(load_file(a / file), load_file(b / file)), file
    names = ("optimizer.json", "progress.json")
    for name in names:
        assert (a / "checkpoint-10" / name).read_text() == (b / "checkpoint-10" / name).read_text(), name
    assert logged(a) == logged(b)


def continued(whole: Path, step: int, output: Path) -> Path:
    """A folder as a run leaves it that is killed after this step."""
    for checkpoint in checkpoints(whole):
        if int(checkpoint.name.split("-")[1]) <= step:
            shutil.copytree(checkpoint, output / checkpoint.name)
    shutil.copy(whole / LOG_FILE, output / LOG_FILE)
    return output / f"checkpoint-{step}"


@pytest.mark.parametrize("step", [3, 6, 9])
def test_a_run_continued_inside_a_pass_equals_the_uninterrupted_one(
    whole: Path, store: EmbeddingStore, tmp_path: Path, step: int
) -> None:
    checkpoint = continued(whole, step, tmp_path / "again")
    torch.manual_seed(123)  # the state of the process must not matter
    again = train(config_for(store, tmp_path / "again", **EVERY), resume=checkpoint)
    assert_same_run(whole, again)


@pytest.mark.parametrize(
    "changes", [dict(gradient_accumulation_steps=2, batch_size=4), dict(num_workers=1), dict(max_grad_norm=0)]
)
def test_accumulation_and_workers_continue_exactly_too(
    store: EmbeddingStore, tmp_path: Path, changes: dict[str, Any]
) -> None:
    settings = EVERY | changes
    first = train(config_for(store, tmp_path / "first", **settings))
    again = train(
        config_for(store, tmp_path / "again", **settings), resume=continued(first, 6, tmp_path / "again")
    )
    assert_same_run(first, again)


def test_a_run_of_a_version_with_other_draws_goes_on_and_says_so(
    whole: Path, store: EmbeddingStore, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    checkpoint = continued(whole, 9, tmp_path / "again")
    config = config_for(store, tmp_path / "again", **EVERY)
    for version, said in ((None, True), (DRAWS_VERSION, False)):
        progress = json.loads((checkpoint / "progress.json").read_text())
        progress["draws"] = version
        if version is None:  # as it was before there were several
            del progress["draws"]
        (checkpoint / "progress.json").write_text(json.dumps(progress))
        seal(checkpoint)
        caplog.clear()
        train(config, resume=checkpoint)
        assert ("its noise and times were drawn by another version" in caplog.text) == said


def test_a_complete_run_continued_stays_as_it_is(whole: Path, store: EmbeddingStore, tmp_path: Path) -> None:
    again = train(
        config_for(store, tmp_path / "again", **EVERY), resume=continued(whole, 10, tmp_path / "again")
    )
    assert same(load_file(whole / "model.safetensors"), load_file(again / "model.safetensors"))
    assert json.loads((again / "trainer_state.json").read_text())["global_step"] == 10


def test_samples_seen_before_the_checkpoint_are_not_read(
    whole: Path, store: EmbeddingStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    read: list[int] = []
    plain = EmbeddingStore._fetch

    def fetch(self: EmbeddingStore, indices: Any, dtype: torch.dtype) -> Any:
        read.extend(int(index) for index in indices)
        return plain(self, indices, dtype)

    monkeypatch.setattr(EmbeddingStore, "_fetch", fetch)
    config = config_for(store, tmp_path / "again", **(EVERY | dict(eval_steps=100, eval_samples=0)))
    train(config, resume=continued(whole, 9, tmp_path / "again"))
    trained, held_out = 8, 8  # one step; the evaluation at the end
    assert len(read) == trained + held_out


def test_a_logged_norm_that_is_not_finite_leaves_json_and_runs_that_continue(
    store: EmbeddingStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """float16 overflows in search of its loss scale, in a step that may be logged."""
    plain = BLIP3oTrainer._clip_grad_norm

    def overflow(self: BLIP3oTrainer, model: Any) -> torch.Tensor:
        norm = plain(self, model)
        return torch.full_like(norm, torch.inf) if self.state.global_step == 3 else norm

    monkeypatch.setattr(BLIP3oTrainer, "_clip_grad_norm", overflow)
    settings = dict(max_steps=6, logging_steps=4, save_steps=5, eval_split=0.0, ema_decay=0.0, source="noise")
    first = train(config_for(store, tmp_path / "first", **settings))
    read_json(first / "trainer_state.json")  # refuses what JSON does not have
    assert [entry["grad_norm"] for entry in logged(first) if "grad_norm" in entry] == [None]

    checkpoint = continued(first, 5, tmp_path / "again")
    state = (checkpoint / "trainer_state.json").read_text()
    assert state.count('"grad_norm": null') == 1
    old = state.replace('"grad_norm": null', '"grad_norm": Infinity')  # as the Trainer itself writes it
    (checkpoint / "trainer_state.json").write_text(old)
    seal(checkpoint)
    again = train(config_for(store, tmp_path / "again", **settings), resume=checkpoint)
    assert same(load_file(first / "model.safetensors"), load_file(again / "model.safetensors"))
    assert read_json(again / "trainer_state.json")["log_history"][0]["grad_norm"] is None


# Stopping


def stop_at(monkeypatch: pytest.MonkeyPatch, step: int, action: Any) -> None:
    """Do something in the middle of an optimizer step."""
    plain = BLIP3oTrainer.compute_loss

    def compute_loss(self: BLIP3oTrainer, *args: Any, **kwargs: Any) -> Any:
        if self.state.global_step == step - 1:
            action()
        return plain(self, *args, **kwargs)

    monkeypatch.setattr(BLIP3oTrainer, "compute_loss", compute_loss)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_saves_and_the_continued_run_is_the_same(
    whole: Path, store: EmbeddingStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    before = signal.getsignal(number)
    stop_at(monkeypatch, 7, lambda: os.kill(os.getpid(), number))
    config = config_for(store, tmp_path / "run", **EVERY)
    with pytest.raises(StoppedEarly, match=r"SIG(TERM|INT) received: stopped after step 7 of 10"):
        train(config)
    assert signal.getsignal(number) == before
    assert not (tmp_path / "run" / "model.safetensors").exists()
    monkeypatch.undo()
    assert newest_whole(tmp_path / "run") == tmp_path / "run" / "checkpoint-7"
    train(config, resume=tmp_path / "run" / "checkpoint-7")
    assert_same_run(whole, tmp_path / "run")


@pytest.mark.parametrize("moment", ["a step", "the final model"])
def test_a_signal_to_every_process_of_a_job_costs_no_step(
    store: EmbeddingStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, moment: str
) -> None:
    """As Slurm and `timeout` send it: to the loader's workers too, and not by their parent."""

    def signal_all() -> None:
        workers = [str(process.pid) for process in multiprocessing.active_children()]
        assert bool(workers) == (moment == "a step")  # afterwards nothing is left to read
        if workers:
            subprocess.run(["kill", "-TERM", *workers], check=True)
            time.sleep(0.1)  # for a worker to die in
        os.kill(os.getpid(), signal.SIGTERM)

    config = config_for(store, tmp_path / "run", max_steps=3, num_workers=1, source="noise", eval_split=0.0)
    if moment == "a step":
        stop_at(monkeypatch, 2, signal_all)
        with pytest.raises(StoppedEarly, match="SIGTERM received: stopped after step 2 of 3"):
            train(config)
        assert newest_whole(tmp_path / "run") == tmp_path / "run" / "checkpoint-2"
    else:
        plain = atomic.publish_files
        monkeypatch.setattr(atomic, "publish_files", lambda *args: (signal_all(), plain(*args)))
        verify(train(config))


def test_a_worker_ends_when_its_own_process_asks_it_to() -> None:
    loader = DataLoader(range(8), num_workers=1, persistent_workers=True, worker_init_fn=outlive_stops)
    batches = iter(loader)
    next(batches)
    (worker,) = batches._workers
    subprocess.run(["kill", "-TERM", str(worker.pid)], check=True)
    subprocess.run(["kill", "-INT", str(worker.pid)], check=True)
    assert [int(batch) for batch in batches] == list(range(1, 8))
    worker.terminate()
    worker.join(10)
    assert worker.exitcode == 0


def test_a_time_limit_stops_as_a_signal_does(store: EmbeddingStore, tmp_path: Path) -> None:
    with pytest.raises(StoppedEarly, match=r"--max_hours 1e-09 are over: stopped after step 1 of 10"):
        train(config_for(store, tmp_path / "run", **EVERY, max_hours=1e-9))
    assert newest_whole(tmp_path / "run") == tmp_path / "run" / "checkpoint-1"


def test_a_second_signal_ends_the_process_at_once(
    store: EmbeddingStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ended: list[int] = []
    monkeypatch.setattr(os, "_exit", ended.append)
    request = make_trainer(store, tmp_path).stop_request
    with request.watching():
        os.kill(os.getpid(), signal.SIGTERM)
        assert not ended
        os.kill(os.getpid(), signal.SIGTERM)
    assert ended == [128 + signal.SIGTERM]


@pytest.mark.parametrize(
    ("error", "status"),
    [
        (StoppedEarly("SIGTERM received"), 75),
        (WriteError("checkpoint-3: no room"), 74),
        (OSError(28, "No space left on device", "log"), 74),
        (OSError(2, "No such file or directory", "log"), 2),
        (ValueError("batch_size: expected"), 2),
        (KeyboardInterrupt(), 130),
    ],
)
def test_exit_statuses(error: BaseException, status: int, capsys: pytest.CaptureFixture[str]) -> None:
    def fail() -> None:
        raise error

    assert command.run_command(fail) == status
    shown = capsys.readouterr().err
    assert shown.count("\n") == 1 and "Traceback" not in shown


# Checkpoints


def test_checkpoints_hold_no_pickle_and_are_sealed(whole: Path) -> None:
    names = {file.name for file in (whole / "checkpoint-6").iterdir()}
    assert names == {
        *("model.safetensors", EMA_FILE, "config.json", "training_config.json"),
        *("optimizer.safetensors", "optimizer.json", "trainer_state.json", "progress.json", CHECKSUMS_FILE),
        "source_folds.safetensors",
    }
    for folder in (whole, *checkpoints(whole)):
        verify(folder)


def test_auto_passes_over_what_is_not_whole(whole: Path, tmp_path: Path) -> None:
    output = tmp_path / "run"
    continued(whole, 9, output)
    assert newest_whole(output) == output / "checkpoint-9"
    weights = output / "checkpoint-9" / "model.safetensors"
    content = bytearray(weights.read_bytes())
    content[-100] ^= 1
    weights.write_bytes(content)
    (output / "checkpoint-6" / CHECKSUMS_FILE).unlink()
    shutil.copytree(output / "checkpoint-3", output / "checkpoint-12.partial")
    assert newest_whole(output) == output / "checkpoint-3"
    os.rename(output / "checkpoint-3", output / "checkpoint-3.replaced")  # killed between two renames
    assert newest_whole(output) == output / "checkpoint-3"
    shutil.rmtree(output / "checkpoint-3")
    assert newest_whole(output) is None
    with pytest.raises(ValueError, match=r"found none: --overwrite starts over$"):
        _checkpoint("auto", output, "", overwrite=False)
    assert _checkpoint("auto", output, "", overwrite=True) is None


@pytest.mark.parametrize("moment", ["writing", "sealing", "renaming"])
def test_an_error_while_saving_leaves_the_previous_checkpoint(
    store: EmbeddingStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, moment: str
) -> None:
    target = {"writing": (BLIP3oTrainer, "_write_checkpoint"), "sealing": (atomic, "seal")}
    where, name = target.get(moment, (atomic, "publish"))
    plain, calls = getattr(where, name), [0]

    def fail_the_second_time(*args: Any) -> None:
        calls[0] += 1
        if calls[0] == 2:
            raise OSError(28, "No space left on device")
        plain(*args)

    monkeypatch.setattr(where, name, fail_the_second_time)
    with pytest.raises(WriteError, match=r"checkpoint-6: expected to write it whole, found: No space left"):
        train(config_for(store, tmp_path / "run", **EVERY))
    assert [path.name for path in (tmp_path / "run").glob("checkpoint*")] == ["checkpoint-3"]
    assert newest_whole(tmp_path / "run") == tmp_path / "run" / "checkpoint-3"


def test_the_newest_and_the_best_checkpoint_are_kept(store: EmbeddingStore, tmp_path: Path) -> None:
    for step in (2, 4, 6, 10, 20):
        (tmp_path / "kept" / f"checkpoint-{step}").mkdir(parents=True)
    keep_newest(tmp_path / "kept", 2, best_step=4)
    assert [path.name for path in checkpoints(tmp_path / "kept")] == [
        *("checkpoint-20", "checkpoint-10", "checkpoint-4"),
    ]
    changes = EVERY | dict(save_steps=1, eval_steps=1, save_total_limit=1, best_metric="r2")
    run = train(config_for(store, tmp_path / "run", **changes))
    state = json.loads((run / "trainer_state.json").read_text())
    values = {e["step"]: e["eval_r2"] for e in state["log_history"] if "eval_r2" in e}
    assert state["best_global_step"] == max(values, key=values.__getitem__)
    names = {path.name for path in checkpoints(run)}
    assert names == {"checkpoint-10", f"checkpoint-{state['best_global_step']}"}


def test_the_checkpoint_that_a_run_went_on_from_may_be_replaced(
    whole: Path, store: EmbeddingStore, tmp_path: Path
) -> None:
    checkpoint = continued(whole, 3, tmp_path / "run")
    changes = EVERY | dict(save_steps=2, save_total_limit=1, best_metric="loss")
    train(config_for(store, tmp_path / "run", **changes), resume=checkpoint)
    assert not checkpoint.exists()
    assert_same_run(whole, tmp_path / "run")


def test_starting_over_leaves_no_checkpoint_of_the_earlier_run(store: EmbeddingStore, tmp_path: Path) -> None:
    config = config_for(store, tmp_path / "run", **EVERY)
    (tmp_path / "run" / "checkpoint-99").mkdir(parents=True)
    train(config, overwrite=True)
    assert "checkpoint-99" not in {path.name for path in checkpoints(tmp_path / "run")}


def test_starting_over_without_averages_leaves_none_of_the_earlier_run(
    store: EmbeddingStore, tmp_path: Path
) -> None:
    quick = dict(max_steps=1, eval_split=0.0, source="noise")
    run = train(config_for(store, tmp_path / "run", **quick))
    (run / "notes.txt").write_text("mine")
    (run / "loss_spikes.jsonl").write_text("{}")
    assert (run / EMA_FILE).is_file()
    train(config_for(store, run, **quick, ema_decay=0.0), overwrite=True)
    assert not (run / EMA_FILE).exists() and not (run / "loss_spikes.jsonl").exists()
    assert (run / "notes.txt").read_text() == "mine"
    verify(run)
    assert BLIP3oInference(run, device="cpu").weights == "raw"


def test_files_under_old_checksums_go_and_others_stay(tmp_path: Path) -> None:
    for names in (("a", "b"), ("b", "c")):
        with atomic.written_aside(tmp_path / "final", files_only=True, replaces=["d"]) as aside:
            for name in names:
                (aside / name).write_text(name)
        (tmp_path / "final" / "d").write_text("of a run that was killed here")
        (tmp_path / "final" / "e").write_text("of somebody else")
    assert {file.name for file in (tmp_path / "final").iterdir()} == {"b", "c", "d", "e", CHECKSUMS_FILE}
    with atomic.written_aside(tmp_path / "final", files_only=True, replaces=["d"]) as aside:
        (aside / "b").write_text("b")
    assert {file.name for file in (tmp_path / "final").iterdir()} == {"b", "e", CHECKSUMS_FILE}


# What a continued run must share


def test_other_data_or_steps_are_refused(whole: Path, store: EmbeddingStore, tmp_path: Path) -> None:
    other = write_linear_store(tmp_path / "other", samples=54)
    checkpoint = whole / "checkpoint-3"
    with pytest.raises(
        ValueError, match=r"the number of samples was 48, now 54; the data \(its fingerprint\)"
    ):
        train(config_for(other, tmp_path / "out", **EVERY), resume=checkpoint)
    with pytest.raises(ValueError, match=r"the samples of an optimizer step .* was 8, now 16"):
        train(config_for(store, tmp_path / "out", **(EVERY | dict(batch_size=16))), resume=checkpoint)


def test_a_schedule_that_ends_with_the_run_cannot_get_another_end(whole: Path) -> None:
    with pytest.raises(ValueError, match=r"num_epochs was 2, now 5"):
        resolve_config({"num_epochs": 5}, debug=False, resume=whole / "checkpoint-3")


def test_other_intervals_are_taken(whole: Path, store: EmbeddingStore, tmp_path: Path) -> None:
    config = config_for(store, tmp_path / "again", **(EVERY | dict(logging_steps=1, save_steps=7)))
    again = train(config, resume=continued(whole, 6, tmp_path / "again"))
    assert [e["step"] for e in read_log(again / LOG_FILE) if "loss" in e] == [4, 7, 8, 9, 10]
    assert "checkpoint-7" in {path.name for path in checkpoints(again)}


@pytest.mark.parametrize(
    ("file", "change", "message"),
    [
        ("optimizer.json", lambda v: v["param_groups"][0].update(lr="fast"), "lr: expected a value like"),
        (
            "optimizer.json",  # as it was when norms and gates decayed
            lambda v: v["param_groups"][0]["params"].append(v["param_groups"][1]["params"].pop()),
            r"expected \[\d+, \d+\] parameters with and without weight decay.*found \[\d+, \d+\] \(earlier",
        ),
        ("optimizer.json", lambda v: v.pop("param_groups"), r"found \[\] \(earlier"),
        ("optimizer.json", lambda v: v.pop("scheduler"), "scheduler: expected a value like"),
        ("optimizer.json", lambda v: v.update(eight_bit={"0.exp_avg": True}), "expected codes, scale, qmap"),
        ("progress.json", lambda v: v.update(colour=1), "expected the progress of a run"),
        (
            "trainer_state.json",
            lambda v: v.update(global_step=-1),
            "global_step: expected a positive integer",
        ),
        ("trainer_state.json", lambda v: v.update(colour=1), r"unknown \['colour'\]"),
    ],
)
def test_a_checkpoint_with_other_content_is_one_clear_line(
    whole: Path, store: EmbeddingStore, tmp_path: Path, file: str, change: Any, message: str
) -> None:
    checkpoint = continued(whole, 3, tmp_path / "again")
    values = json.loads((checkpoint / file).read_text())
    change(values)
    (checkpoint / file).write_text(json.dumps(values))
    seal(checkpoint)
    with pytest.raises(ValueError, match=message) as caught:
        train(config_for(store, tmp_path / "again", **EVERY), resume=checkpoint)
    assert str(checkpoint) in str(caught.value)


# Health


def diagnosis(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "diagnosis.json").read_text())


def test_a_loss_that_is_not_finite_is_diagnosed(store: EmbeddingStore, tmp_path: Path) -> None:
    trainer = make_trainer(store, tmp_path)
    with torch.no_grad():
        trainer.unwrapped_model.dit.layers[0].ffn_norm2.weight[3] = float("inf")
        trainer.unwrapped_model.dit.layers[0].norm1.linear.bias.fill_(1.0)
    with pytest.raises(NonFiniteLossError, match=r"step 1: .* what was found is in .*diagnosis.json"):
        trainer.train()
    found = diagnosis(tmp_path)
    assert found["step"] == 1 and len(found["samples"]) == 8
    assert found["samples"][0]["key"] == f"sample-{found['samples'][0]['index']}"
    assert found["first_layer"] == {
        "name": "dit.layers.0.ffn_norm2",
        "class": "RMSNorm",
        "dtype": "torch.float32",
    }
    assert [entry["name"] for entry in found["weights"]] == ["dit.layers.0.ffn_norm2.weight"]


@pytest.mark.parametrize("clipping", [1.0, 0.0])
def test_a_gradient_that_is_not_finite_stops_before_the_step(
    store: EmbeddingStore, tmp_path: Path, clipping: float
) -> None:
    trainer = make_trainer(store, tmp_path, max_grad_norm=clipping)
    bias = trainer.unwrapped_model.dit.norm_out.linear_2.bias
    bias.register_hook(lambda gradient: gradient * float("nan"))
    before = {name: p.clone() for name, p in trainer.unwrapped_model.named_parameters()}
    with pytest.raises(NonFiniteLossError, match=r"infinity in dit.norm_out.linear_2.bias; stopped before"):
        trainer.train()
    assert all(torch.equal(before[name], p) for name, p in trainer.unwrapped_model.named_parameters())
    assert [entry["name"] for entry in diagnosis(tmp_path)["gradients"]] == ["dit.norm_out.linear_2.bias"]


def test_a_loss_out_of_proportion_is_noted_with_its_samples(
    store: EmbeddingStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(anomalies, "MIN_LOSSES", 4)
    trainer = make_trainer(store, tmp_path)
    for step in range(1, 7):
        trainer.losses.add(torch.tensor(1.0 + 0.01 * (step % 3)), step, {"index": [step]})
        trainer.losses.check()
    trainer.losses.add(torch.tensor(9.0), 7, {"index": [11, 12]})
    (line,) = (tmp_path / "loss_spikes.jsonl").read_text().splitlines()
    found = json.loads(line)
    assert found["step"] == 7 and found["samples"] == [11, 12]
    assert found["keys"] == ["sample-11", "sample-12"]
    assert found["usual"] == pytest.approx(1.01, abs=0.011)


def test_a_cut_last_line_of_the_log_is_passed_over(tmp_path: Path) -> None:
    (tmp_path / LOG_FILE).write_text('{"step": 1}\n{"step": 2, "lo')
    assert read_log(tmp_path / LOG_FILE) == [{"step": 1}]


def test_max_hours_and_best_metric_are_checked() -> None:
    with pytest.raises(ValueError, match="max_hours: expected a number above 0, found 0"):
        TrainingConfig(max_hours=0)
    with pytest.raises(ValueError, match="best_metric: r2 expects eval_samples above 0, found 0"):
        TrainingConfig(best_metric="r2", eval_samples=0)
