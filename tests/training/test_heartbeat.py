"""A process that hangs is noticed in time and named; restarted runs go on from what is their own.

Processes that watch each other: test_processes.py.
"""

from __future__ import annotations

import os
import signal
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch.distributed as dist

from blip3o_dit.cli.command import STOPPED, USER_ERROR, run_command
from blip3o_dit.cli.train import main
from blip3o_dit.data.store import EmbeddingStore
from blip3o_dit.training.checkpoint import checkpoints
from blip3o_dit.training.heartbeat import HUNG, Judge, Sign, end_process, losses_in_one_line
from blip3o_dit.training.run import train
from blip3o_dit.training.trainer import BLIP3oTrainer
from blip3o_dit.utils.distributed import RESTARTS_VARIABLE, launcher_began, meet_again, restarts
from tests.helpers.forks import forked
from tests.helpers.stores import write_linear_store
from tests.helpers.training import same_files, tiny_training

pytestmark = pytest.mark.usefixtures("no_curves")

SETTINGS: dict[str, Any] = dict(
    max_steps=5, save_steps=2, logging_steps=5, eval_split=0.0, source="noise", ema_decay=0.0
)


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> EmbeddingStore:
    return write_linear_store(tmp_path_factory.mktemp("data") / "store")


def heard(marks: list[int], seconds: float, busy: bool = False, silent: int | None = None) -> list[Sign]:
    pulse = int(10 * seconds)
    return [
        Sign(0 if rank == silent else pulse, count, step=3, busy=busy) for rank, count in enumerate(marks)
    ]


def test_who_is_behind_when_nobody_gets_on_hangs() -> None:
    judge = Judge(2.0)
    assert judge.verdict(heard([7, 7, 7], 0.0), 0.0) is None
    assert judge.verdict(heard([9, 8, 9], 1.0), 1.0) is None
    assert judge.verdict(heard([9, 8, 9], 3.0), 3.0) is None
    assert judge.verdict(heard([9, 8, 9], 3.1), 3.1) == "rank 1 has not finished step 3 within 2 s"
    assert judge.verdict(heard([9, 8, 8], 3.2), 3.2) is None  # a sign of something else is progress too
    assert judge.verdict(heard([9, 8, 8], 5.3), 5.3) == "ranks 1, 2 have not finished step 3 within 2 s"
    assert judge.verdict(heard([9, 9, 9], 5.4), 5.4) is None
    assert judge.verdict(heard([9, 9, 9], 7.5), 7.5) == "none of 3 ranks has finished step 3 within 2 s"


def test_who_is_busy_is_waited_for_unless_it_is_silent() -> None:
    judge = Judge(2.0)
    for seconds in (0.0, 50.0):
        assert judge.verdict(heard([4, 4], seconds, busy=True), seconds) is None
    assert judge.verdict(heard([4, 4], 52.0, busy=True, silent=1), 52.0) is None
    assert (
        judge.verdict(heard([4, 4], 54.1, busy=True, silent=1), 54.1) == "rank 1 gave no sign of life for 2 s"
    )


def test_a_process_that_is_ended_says_so_and_its_status_is_its_own(capfd: pytest.CaptureFixture[str]) -> None:
    ended = os.waitpid(forked(lambda: end_process("error: rank 1\n")), 0)[1]
    assert os.waitstatus_to_exitcode(ended) == HUNG
    assert capfd.readouterr().err == "error: rank 1\n"


def test_a_process_that_died_is_one_line_for_those_that_waited(capsys: pytest.CaptureFixture[str]) -> None:
    gloo = "[pair.cc:553] Connection closed by peer [127.0.0.1]:11912.\nThis is typically caused by"
    for error, processes, kind in (
        (RuntimeError(gloo), 2, ConnectionError),
        (dist.DistNetworkError("no route"), 2, ConnectionError),
        (RuntimeError(gloo), 1, RuntimeError),
        (RuntimeError("size 3"), 2, RuntimeError),
    ):
        match = r"Connection closed|no route|size 3"
        with pytest.raises(kind, match=match) as caught, losses_in_one_line(processes):
            raise error
        assert (caught.value is error) == (kind is RuntimeError)
        if kind is ConnectionError:
            assert run_command(lambda error=caught.value: _raise(error)) == USER_ERROR
    shown = capsys.readouterr().err.splitlines()
    assert len(shown) == 2 and shown[0].startswith(
        "error: another process was lost: [pair.cc:553] Connection"
    )


def _raise(error: BaseException) -> None:
    raise error


# Restarts


def words_of(store: EmbeddingStore, output: Path) -> list[str]:
    config = tiny_training(store.path, output, **SETTINGS)
    words = ["--embeddings_path", str(store.path), "--output_dir", str(output)]
    for name in (*SETTINGS, "model_dim", "num_layers", "num_heads", "batch_size", "warmup_steps", "device"):
        words += [f"--{name}", str(getattr(config, name))]
    return words


def killed_in_step(step: int, words: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    def die(self: BLIP3oTrainer, *args: Any, **kwargs: Any) -> Any:
        if self.state.global_step == step - 1:
            os.kill(os.getpid(), signal.SIGKILL)
        return plain(self, *args, **kwargs)

    plain = BLIP3oTrainer.compute_loss
    with monkeypatch.context() as patch:
        patch.setattr(BLIP3oTrainer, "compute_loss", die)
        child = forked(lambda: main(words))
        assert os.WTERMSIG(os.waitpid(child, 0)[1]) == signal.SIGKILL


@pytest.mark.parametrize("flags", [[], ["--overwrite"]])
def test_a_restarted_run_goes_on_from_its_own_checkpoint(
    store: EmbeddingStore,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    flags: list[str],
) -> None:
    """Without a flag that says so, and with one that says otherwise; first killed before it has one."""
    whole = train(tiny_training(store.path, tmp_path / "whole", **SETTINGS))
    words = [*words_of(store, tmp_path / "run"), *flags]
    if flags:
        train(tiny_training(store.path, tmp_path / "run", **(SETTINGS | dict(seed=1))))
        for path in (tmp_path / "run").rglob("checksums.json"):
            os.utime(path, (psutil.Process().create_time() - 60,) * 2)
    killed_in_step(2, words, monkeypatch)
    for attempt, step in ((1, 4), (2, 5)):
        monkeypatch.setenv(RESTARTS_VARIABLE, str(attempt))
        monkeypatch.setattr("blip3o_dit.utils.distributed.launcher_began", psutil.Process().create_time)
        killed_in_step(step, words, monkeypatch)
    monkeypatch.setenv(RESTARTS_VARIABLE, "3")
    assert main(words) == 0
    assert f"restarted by the launcher (3): {tmp_path}/run/checkpoint-4" in capsys.readouterr().err
    assert same_files(whole, tmp_path / "run", "model.safetensors", "checkpoint-5/optimizer.safetensors")


def test_a_restart_does_not_go_on_with_what_was_there_before_its_launcher(
    store: EmbeddingStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Refused at first, a run is started again by its launcher: no reason to take it for another one."""
    words = words_of(store, tmp_path / "run")
    assert main(words) == 0
    for path in (tmp_path / "run").rglob("checksums.json"):
        os.utime(path, (launcher_began() - 60,) * 2)
    monkeypatch.setenv(RESTARTS_VARIABLE, "1")
    assert main(words) == USER_ERROR
    assert "expected no run there, found one" in capsys.readouterr().err


def test_restarted_processes_do_not_look_for_the_dead_ones(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where the launcher keeps its store, the names in it are those of this attempt."""
    met: list[Any] = []
    monkeypatch.setattr(dist, "TCPStore", lambda *place, is_master: place)
    monkeypatch.setattr(dist, "PrefixStore", lambda prefix, store: (prefix, store))
    monkeypatch.setattr(dist, "init_process_group", lambda backend, **given: met.append((backend, given)))
    places = dict(RANK="1", WORLD_SIZE="2", MASTER_ADDR="here", MASTER_PORT="29")
    for name, value in {**places, "TORCHELASTIC_USE_AGENT_STORE": "True"}.items():
        monkeypatch.setenv(name, value)
    meet_again(on_cpu=True, timeout=5)
    assert not met
    monkeypatch.setenv(RESTARTS_VARIABLE, "3")
    meet_again(on_cpu=True, timeout=5)
    ((backend, given),) = met
    assert backend == "gloo" and given["store"] == ("restart-3", ("here", 29, 2))
    assert (given["rank"], given["world_size"], given["timeout"].seconds) == (1, 2, 5)


def test_hours_count_from_the_launcher_on(
    store: EmbeddingStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(RESTARTS_VARIABLE, "1")
    monkeypatch.setattr("blip3o_dit.training.stopping.launcher_began", lambda: 0.0)
    assert main([*words_of(store, tmp_path / "run"), "--max_hours", "1000"]) == STOPPED
    assert [path.name for path in checkpoints(tmp_path / "run")] == ["checkpoint-1"]


def test_the_launcher_is_who_does_not_have_its_variables(monkeypatch: pytest.MonkeyPatch) -> None:
    class Ancestor:
        def __init__(self, began: float, **variables: str) -> None:
            self.create_time, self.environ = lambda: began, lambda: variables

    wrapper, torchrun, shell = Ancestor(9.0, **{RESTARTS_VARIABLE: "1"}), Ancestor(5.0), Ancestor(1.0)
    monkeypatch.setattr(psutil.Process, "parents", lambda self: [wrapper, torchrun, shell])
    assert launcher_began() == 5.0 and restarts() == 0
