"""The forecast of memory: counted, measured, and refused when there is no room for it."""

from __future__ import annotations

import json
import logging
import platform
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from blip3o_dit.cli.train import main as train_main
from blip3o_dit.data.store import EmbeddingStore
from blip3o_dit.model import transformer
from blip3o_dit.model.blip3o_dit import BLIP3oDiTModel
from blip3o_dit.model.config import BLIP3oDiTConfig
from blip3o_dit.training import memory
from blip3o_dit.training.config import TrainingConfig
from blip3o_dit.training.distillation import distill
from blip3o_dit.training.distillation_config import DistillationConfig
from blip3o_dit.training.memory import GIB, Activations, Room, forecast
from blip3o_dit.training.run import train
from tests.conftest import tiny_config
from tests.helpers.stores import write_linear_store
from tests.helpers.training import config_for

CPU = torch.device("cpu")
DEFAULT_DATA = dict(num_tokens=64, condition_dim=1280, target_dim=768)


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> EmbeddingStore:
    return write_linear_store(tmp_path_factory.mktemp("data") / "store")


def kept_for_backward(
    config: BLIP3oDiTConfig, batch: int, length: int, *, selective: bool = False, narrow: bool = False
) -> int:
    """Bytes of all storages, those of the model aside, that autograd holds after a forward pass."""
    model = BLIP3oDiTModel(config).train()
    model.dit.selective_checkpointing = selective
    own = {tensor.untyped_storage().data_ptr() for tensor in model.state_dict().values()}
    held: dict[int, int] = {}
    kept = []

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            held[storage.data_ptr()] = storage.nbytes()
            kept.append(tensor)
        return tensor

    x = torch.randn(batch, config.num_tokens, config.in_channels)
    condition = torch.randn(batch, length, config.eva_embedding_size)
    autocast = torch.autocast("cpu", dtype=torch.bfloat16, enabled=narrow)
    with autocast, torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        model(x, torch.rand(batch), condition)
    return sum(held.values())


def test_a_predicted_spread_takes_a_number_for_each_of_a_target() -> None:
    plain, predicted = (
        Activations(tiny_config(flow_matching=flow), 8, condition_tokens=9, bytes_each=4, device=CPU).ends()
        for flow in ({}, {"source": "ridge_context_spread", "source_components": 2})
    )
    assert predicted - plain == 4 * 8 * 9 * 8


@pytest.mark.parametrize("narrow", [False, True])
@pytest.mark.parametrize(("kv_heads", "recompute"), [(None, False), (1, False), (None, True)])
def test_activations_of_a_block_are_those_that_autograd_keeps(
    kv_heads: int | None, recompute: bool, narrow: bool
) -> None:
    sizes = dict(model_dim=64, num_heads=4, num_kv_heads=kv_heads, input_size=6)
    configs = [tiny_config(**sizes, num_layers=layers, gradient_checkpointing=recompute) for layers in (1, 2)]
    one, two = (kept_for_backward(config, 8, 20, narrow=narrow) for config in configs)
    keeps = Activations(
        configs[0],
        batch=8,
        condition_tokens=20,
        bytes_each=2 if narrow else 4,
        device=CPU,
    )
    found = keeps.kept_of_block(recompute, selective=False)
    if narrow and not recompute:  # bfloat16 copies of a block's matrices
        found += 2 * (memory.count_weights(configs[1])[1] - memory.count_weights(configs[0])[1])
    assert found == pytest.approx(two - one, rel=0.03)


def test_the_default_network_takes_what_its_weights_say() -> None:
    config = TrainingConfig()
    model = config.model(**DEFAULT_DATA)
    weights, matrices = memory.count_weights(model)
    assert matrices < weights == 1_358_588_576
    needed = forecast(config, model, CPU)
    assert needed.weights == needed.gradients == needed.averages == 4 * weights
    assert needed.optimizer == 8 * weights
    frugal = TrainingConfig(memory="low", gradient_checkpointing=True, ema_decay=0.0)
    low = forecast(frugal, frugal.model(**DEFAULT_DATA), CPU)
    assert low.weights + low.gradients + low.optimizer == pytest.approx(6.03 * weights, rel=0.01)
    assert low.averages == 0 and low.activations < needed.activations / 10
    # On an H100, without averages: 27.4 GiB at batch 32.
    on_gpu = forecast(TrainingConfig(ema_decay=0.0), model, torch.device("cuda"))
    assert on_gpu.total / GIB == pytest.approx(27.4, rel=0.15)


def test_processes_share_weights_only_when_they_are_sharded(monkeypatch: pytest.MonkeyPatch) -> None:
    config = TrainingConfig()
    model = config.model(**DEFAULT_DATA)
    alone, side_by_side = (forecast(config, model, CPU, processes=count) for count in (1, 4))
    assert side_by_side.weights == alone.weights and side_by_side.gradients == 2 * alone.gradients
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    sharded = forecast(config, model, CPU, processes=4)
    for part in ("weights", "gradients", "optimizer", "averages"):
        assert getattr(sharded, part) == getattr(alone, part) // 4
    assert sharded.activations == alone.activations
    monkeypatch.setattr(memory, "resident", lambda: 1000)
    monkeypatch.setattr(memory, "_free_of_machine", lambda: (8000, "free"))
    monkeypatch.setattr(memory, "_free_of_groups", lambda: [(10**9, "left")])
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    assert memory.room_on(CPU) == Room(size=3000, where="free, shared by 4 processes")


MEASURED = """
import gc, json, sys
from blip3o_dit.utils.logging import quiet_torchao
quiet_torchao()
import torch
from blip3o_dit.training.config import TrainingConfig
from blip3o_dit.training import memory, run
torch.set_num_threads(1)

for _ in range(3):
    torch.ones(6 * 2**20)  # glibc learns to keep blocks of a size that was freed
memory.return_freed_memory()
tensors = [torch.ones(5 * 2**18) for _ in range(40)]  # 5 MiB each
kept = tensors[1::2]
before = memory.resident()
del tensors
gc.collect()
freed = before - memory.resident()
del kept

forecast, found = run.forecast, []
run.forecast = lambda *given, **named: found.append(forecast(*given, **named)) or found[-1]
run.train(TrainingConfig(**json.loads(sys.argv[1])))
status = open("/proc/self/status").read()  # ru_maxrss begins with that of the process it was started by
peak = 1024 * int(status.split("VmHWM:")[1].split()[0])
print(json.dumps([freed, found[0].total, found[0].program, peak]))
"""


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="reads the peak of resident memory as Linux gives it")
def test_freed_memory_goes_back_and_a_run_takes_what_was_said(tmp_path: Path) -> None:
    """A network of weights and, with 64 tokens, activations: 0.4 GiB beside the program.

    A process of its own: in this one tensors would take memory that others have freed before.
    """
    data = write_linear_store(tmp_path / "store", samples=24, tokens=64, condition=64, target=48)
    settings = dict(model_dim=384, num_layers=5, num_heads=6, batch_size=4, max_steps=2, logging_steps=10)
    settings |= dict(embeddings_path=str(data.path), output_dir=str(tmp_path / "run"), source="noise")
    words = json.dumps(settings | dict(eval_split=0.0, save_steps=10, device="cpu"))
    done = subprocess.run([sys.executable, "-c", MEASURED, words], capture_output=True, text=True, check=True)
    freed, said, program, peak = json.loads(done.stdout.splitlines()[-1])
    if platform.libc_ver()[0] == "glibc":
        assert 60 < freed / 2**20 < 110  # of 100 MiB
    assert said == pytest.approx(peak, rel=0.15)
    assert said - program == pytest.approx(peak - program, rel=0.15)  # what the program itself takes is known


def test_what_cannot_fit_is_refused_in_one_line_before_anything_is_built(
    store: EmbeddingStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("blip3o_dit.training.run.room_on", lambda device: Room(size=10**7, where="free here"))
    monkeypatch.setattr("blip3o_dit.training.run.build_trainer", lambda *given, **named: pytest.fail("built"))
    words = ["--embeddings_path", str(store.path), "--output_dir", str(tmp_path / "out"), "--device=cpu"]
    assert train_main(words) == 2
    error = capsys.readouterr().err.strip()
    assert len(error.splitlines()) == 1
    for part in (
        "0.0 GiB (free here)",
        "found a run that takes",
        "weights 5.",
        "optimizer 10.",
        "--memory low",
    ):
        assert part in error
    for flag in ("--gradient_checkpointing", "--ema_decay 0", "--batch_size"):
        assert flag in error
    small = TrainingConfig(memory="low", gradient_checkpointing=True, ema_decay=0.0, batch_size=1)
    assert memory.ways_to_fit(small) == "less is taken with a smaller network (--model_dim, --num_layers)"


def test_a_dry_run_shows_the_table(
    store: EmbeddingStore, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "blip3o_dit")
    train(config_for(store, tmp_path / "out"), dry_run=True)
    for line in ("optimizer", "averaged weights", "activations", "at most together", "there is"):
        assert line in caplog.text


@pytest.mark.parametrize("precision", [{}, {"bf16": True}])
def test_a_dry_run_computes_in_the_precision_of_the_run(
    precision: dict[str, Any], store: EmbeddingStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[torch.dtype] = []
    attend = transformer.attend

    def spy(queries: Tensor, *given: Tensor) -> Tensor:
        seen.append(queries.dtype)
        return attend(queries, *given)

    monkeypatch.setattr(transformer, "attend", spy)
    train(config_for(store, tmp_path / "out", **precision), dry_run=True)
    tried = set(seen)
    seen.clear()
    train(config_for(store, tmp_path / "out", max_steps=1, eval_split=0.0, **precision))
    assert tried == set(seen) == {torch.bfloat16 if precision else torch.float32}


@pytest.mark.parametrize("names", [("memory.max", "memory.current", "inactive_file"), memory._GROUP_FILES[1]])
def test_limits_of_control_groups_count(names: tuple[str, str, str], tmp_path: Path) -> None:
    limit, usage, droppable = names
    version_2 = limit == "memory.max"
    (tmp_path / "membership").write_text("0::/job/step\n" if version_2 else "7:cpu:/\n4:memory:/job/step\n")
    root = tmp_path / "cgroup"
    job = (root if version_2 else root / "memory") / "job"
    (job / "step").mkdir(parents=True)
    for folder, found in ((job, "3000"), (job / "step", "max" if version_2 else str(2**63 - 4096))):
        (folder / limit).write_text(f"{found}\n")
        (folder / usage).write_text("1200\n")
        (folder / "memory.stat").write_text(f"cache 7\n{droppable} 200\n")
    free, where = min(memory._free_of_groups(tmp_path / "membership", root))
    assert free == 2000 and "limited to" in where


def test_distillation_is_refused_as_well(
    store: EmbeddingStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    teacher = train(config_for(store, tmp_path / "teacher", max_steps=1, eval_split=0.0))
    monkeypatch.setattr(
        "blip3o_dit.training.distillation.room_on", lambda device: Room(size=10**6, where="free here")
    )
    with pytest.raises(ValueError, match=r"memory: expected at most .* teacher .* --batch_size"):
        distill(teacher, store.path, tmp_path / "student", DistillationConfig(steps=1), progress=False)
    assert not (tmp_path / "student").exists()
