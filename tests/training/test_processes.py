"""Several processes give what one gives: training, evaluation, generation, reports; sharded weights."""

from __future__ import annotations

import json
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from blip3o_dit.data.store import EmbeddingStore
from blip3o_dit.model.blip3o_dit import BLIP3oDiTModel
from blip3o_dit.model.loading import EMA_FILE
from blip3o_dit.training.checkpoint import verify_checkpoint
from blip3o_dit.training.curves import read_log
from tests.helpers import training_jobs as jobs
from tests.helpers.inference_jobs import generate_store
from tests.helpers.processes import SEVERAL, launch
from tests.helpers.stores import write_linear_store

pytestmark = pytest.mark.slow

STEPS = 20  # 6 whole passes and a part of another one


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_linear_store(tmp_path_factory.mktemp("data") / "store", samples=90).path


@pytest.fixture(scope="module")
def run(store: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """processes x batch x accumulation -> the output folder of a training, made once."""
    finished: dict[tuple[int, int, int], Path] = {}

    def find(processes: int, batch: int, accumulation: int = 1) -> Path:
        key = (processes, batch, accumulation)
        if key not in finished:
            finished[key] = tmp_path_factory.mktemp("run") / "x".join(map(str, key))
            changes = dict(batch_size=batch, gradient_accumulation_steps=accumulation)
            changes |= dict(max_steps=STEPS, eval_steps=STEPS // 2)
            if processes == 1:
                jobs.train_once(store, finished[key], changes)
            else:
                launch(jobs.train_once, processes, store, finished[key], changes)
        return finished[key]

    return find


def logged(folder: Path, *, evaluation: bool = False) -> dict[str, np.ndarray]:
    """Each logged quantity over the steps, without what depends on the clock."""
    name = "eval_loss" if evaluation else "loss"
    entries = [entry for entry in read_log(folder / "training_log.jsonl") if name in entry]
    timed = ("per_second", "per_step", "runtime", "mfu", "data_wait")
    names = [name for name in entries[0] if not name.endswith(timed)]
    return {name: np.array([entry[name] for entry in entries]) for name in names}


@pytest.mark.parametrize(
    ("processes", "batch", "accumulation"), [(1, 8, 4), (2, 16, 1), (4, 8, 1), (2, 8, 2)]
)
def test_training_does_not_depend_on_how_a_batch_is_shared_out(
    run: Callable[..., Path], processes: int, batch: int, accumulation: int
) -> None:
    one, other = run(1, 32), run(processes, batch, accumulation)
    expected, found = logged(one), logged(other)
    assert expected.keys() == found.keys() and len(found["loss"]) == STEPS
    np.testing.assert_allclose(found["loss"], expected["loss"], rtol=1e-5)
    for name in ("epoch", "learning_rate", "flow_matching_loss", "cosine_similarity", "l2_distance"):
        np.testing.assert_allclose(found[name], expected[name], rtol=1e-4, atol=1e-6, err_msg=name)
    for file in ("model.safetensors", EMA_FILE):
        weights = load_file(other / file)
        for name, tensor in load_file(one / file).items():
            torch.testing.assert_close(weights[name], tensor, rtol=1e-3, atol=1e-4, msg=name)


def test_a_log_line_has_the_steps_of_all_processes_before_and_after_a_checkpoint(
    store: Path, tmp_path: Path
) -> None:
    changes = dict(batch_size=16, max_steps=6, logging_steps=4, save_steps=3, eval_split=0.0, source="noise")
    whole, again = tmp_path / "whole", tmp_path / "again"
    launch(jobs.train_once, 2, store, whole, changes)
    shutil.copytree(whole / "checkpoint-3", again / "checkpoint-3")
    launch(jobs.train_once, 2, store, again, changes, again / "checkpoint-3")
    expected, found = logged(whole), logged(again)
    assert len(expected["loss"]) == 1 and expected.keys() == found.keys()
    for name, values in expected.items():
        assert np.array_equal(found[name], values), name
    name = "checkpoint-6/optimizer.safetensors"
    assert (whole / name).read_bytes() == (again / name).read_bytes()


def test_a_signal_to_one_process_stops_all_after_the_same_step(store: Path, tmp_path: Path) -> None:
    changes = dict(batch_size=16, max_steps=6, eval_steps=100, eval_samples=0)
    first, second = launch(jobs.train_stopped, 2, store, tmp_path / "run", changes)
    # The signal comes in step 3; at its end the processes tell each other, and at the next one's they listen.
    assert first.startswith("another process was asked to stop: stopped after step 4 of 6")
    assert second.startswith("SIGTERM received: stopped after step 4 of 6")
    verify_checkpoint(tmp_path / "run" / "checkpoint-4")


def test_a_rank_that_hangs_in_its_step_is_named_by_one_of_the_others(store: Path, tmp_path: Path) -> None:
    """Rank 0 waits for its gradients meanwhile. Both would end; here they go on, to say what they said."""
    changes = dict(batch_size=16, max_steps=4, rank_timeout=3.0, eval_split=0.0, source="noise")
    found = launch(jobs.train_with_a_rank_that_hangs, 2, store, tmp_path / "run", changes)
    said = [line for lines in found for line in lines if line]
    assert said == ["error: rank 1 has not finished step 3 within 3 s\n"]


def test_where_one_process_lacks_memory_all_take_smaller_passes(store: Path, tmp_path: Path) -> None:
    """And gradients that are exchanged after the passes are those that are exchanged meanwhile."""
    changes = dict(batch_size=16, max_steps=4, eval_split=0.0, source="noise", gradient_accumulation_steps=2)
    launch(jobs.train_once, 2, store, tmp_path / "meanwhile", changes)
    expected = load_file(tmp_path / "meanwhile" / "model.safetensors")
    cut = changes | dict(auto_micro_batch=True)
    for most, pieces in ((16, 1), (4, 4)):
        found = launch(jobs.train_short_of_memory, 2, store, tmp_path / f"after-{most}", cut, most)
        assert found == [pieces] * 2
        for name, tensor in load_file(tmp_path / f"after-{most}" / "model.safetensors").items():
            torch.testing.assert_close(tensor, expected[name], rtol=1e-3, atol=1e-5, msg=name)


def test_a_loss_that_is_not_finite_in_one_process_stops_all_before_its_step(
    store: Path, tmp_path: Path
) -> None:
    changes = dict(batch_size=16, max_steps=6, logging_steps=100, eval_steps=100, eval_samples=0)
    first, second = launch(jobs.train_with_a_fault, 2, store, tmp_path / "run", changes)
    assert first[0].startswith("step 3: expected finite gradients, found NaN or infinity in ")
    assert second[0].startswith("step 3: expected a finite loss, found nan for samples [")
    assert first[1] and second[1]


@pytest.mark.parametrize("processes", [2, 4])
def test_held_out_figures_do_not_depend_on_the_number_of_processes(
    run: Callable[..., Path], processes: int
) -> None:
    """15 samples in batches of 8 and 7, of which 4 processes get two."""
    expected = logged(run(1, 32), evaluation=True)
    found = logged(run(processes, 32 // processes), evaluation=True)
    assert {"eval_loss", "eval_r2", "eval_cosine_similarity_mean"} <= set(found)
    for name, values in expected.items():
        np.testing.assert_allclose(found[name], values, rtol=1e-5, err_msg=name)


@pytest.mark.parametrize("processes", [2, 4])
def test_work_is_shared_out_and_comes_together_in_order(processes: int) -> None:
    everything = [(piece, piece**2) for piece in range(5)]
    found = launch(jobs.use_processes, processes)
    assert [map_in_order for map_in_order, *_ in found] == [everything] + [[]] * (processes - 1)
    assert {total for _, total, *_ in found} == {processes * (processes + 1) / 2}
    assert {value for _, _, value, _ in found} == {0}
    shares = [share for *_, share in found]
    assert len({len(share) for share in shares}) == 1
    assert sorted(piece for share in shares for piece, counts in share if counts) == list(range(5))


@pytest.mark.parametrize("processes", [SEVERAL])
def test_generation_and_reports_are_those_of_one_process(
    run: Callable[..., Path], store: Path, tmp_path: Path, processes: int
) -> None:
    """21 samples in 6 batches, bit for bit."""
    folders = [tmp_path / "one", tmp_path / "several"]
    for folder in folders:
        folder.mkdir()
    expected = jobs.ask(run(1, 32), store, folders[0])
    first, *others = launch(jobs.ask, processes, run(1, 32), store, folders[1])
    for generated, metrics, report in others:
        assert generated == {} and report == {} and metrics == expected[1]
    assert first[1] == expected[1]
    written = [pickle.loads((folder / "generated.pkl").read_bytes()) for folder in folders]
    for name in ("generated_clip_embeddings", "eva_embeddings", "target_clip_embeddings"):
        assert np.array_equal(written[0][name], written[1][name]), name
    assert written[0]["keys"] == written[1]["keys"]
    assert written[0]["generation_metrics"] == written[1]["generation_metrics"]
    reports = [json.loads((folder / "metrics.json").read_text()) for folder in folders]
    assert _without_clock(reports[0]) == _without_clock(reports[1])
    assert (folders[1] / "report.html").is_file()


def test_several_processes_write_the_store_that_one_would(
    run: Callable[..., Path], store: Path, tmp_path: Path
) -> None:
    """21 samples in 6 batches; each process that has any writes a shard of its own."""
    model = run(1, 32)
    expected, _ = generate_store(model, store, tmp_path / "one")
    (first, *others), counts = zip(
        *launch(generate_store, SEVERAL, model, store, tmp_path / "two"), strict=True
    )
    assert first["generation_metrics"] == expected["generation_metrics"]
    assert not any(others) and sum(counts) == 21 and (SEVERAL > 2 or min(counts) >= 8)
    one, two = (EmbeddingStore(tmp_path / name) for name in ("one", "two"))
    assert len(two.manifest["shards"]) == sum(count > 0 for count in counts)
    for a, b in zip(one.fetch(range(21)), two.fetch(range(21)), strict=True):
        assert torch.equal(a, b)
    assert one.records() == two.records()


def _without_clock(report: dict[str, Any]) -> dict[str, Any]:
    for method in report["methods"]:
        del method["cost"]
    for points in report["curve"].values():
        for point in points:
            del point["milliseconds_per_sample"]
    return {name: value for name, value in report.items() if name not in ("command", "summary")}


@pytest.mark.parametrize("checkpointing", [False, True])
def test_sharded_weights_train_average_and_generate_as_whole_ones(
    tmp_path: Path, checkpointing: bool
) -> None:
    """torch's `fully_shard`, 2 processes: the same steps, and an ordinary model folder for one process."""
    folders = [tmp_path / "one", tmp_path / "two"]
    for folder in folders:
        folder.mkdir()
    jobs.shard_and_train(folders[0], checkpointing)
    launch(jobs.shard_and_train, 2, folders[1], checkpointing)
    one, two = (torch.load(folder / "found.pt") for folder in folders)
    np.testing.assert_allclose(two["losses"], one["losses"], rtol=1e-4)
    torch.testing.assert_close(two["generated"], one["generated"], rtol=1e-4, atol=1e-4)
    eva = torch.randn(2, 9, 12)
    for variant in (None, "ema"):
        models = [BLIP3oDiTModel.from_pretrained(folder, variant=variant) for folder in folders]
        tokens = [model.generate(eva, num_inference_steps=2) for model in models]
        torch.testing.assert_close(tokens[1], tokens[0], rtol=1e-4, atol=1e-4)
        assert models[1].config.architectures == ["BLIP3oDiTModel"]


def test_the_trainer_shards_weights(store: Path, run: Callable[..., Path], tmp_path: Path) -> None:
    """The Trainer's and accelerate's own path, put on a CPU by hand: see `jobs.train_sharded`."""
    changes = dict(batch_size=16, max_steps=STEPS, eval_steps=STEPS // 2, save_steps=STEPS // 2)
    kinds = launch(jobs.train_sharded, 2, store, tmp_path / "sharded", changes)
    assert kinds == [["DTensor"]] * 2
    one, two = run(1, 32), tmp_path / "sharded"
    np.testing.assert_allclose(logged(two)["loss"], logged(one)["loss"], rtol=1e-4)
    for name, values in logged(one, evaluation=True).items():
        np.testing.assert_allclose(logged(two, evaluation=True)[name], values, rtol=1e-4, err_msg=name)
    for file in ("model.safetensors", EMA_FILE):
        weights = load_file(two / file)
        for name, tensor in load_file(one / file).items():
            torch.testing.assert_close(weights[name], tensor, rtol=1e-3, atol=1e-4, msg=name)
    eva = torch.randn(2, 9, 12)
    models = [BLIP3oDiTModel.from_pretrained(folder, variant="ema") for folder in (one, two)]
    tokens = [model.generate(eva, num_inference_steps=2) for model in models]
    torch.testing.assert_close(tokens[1], tokens[0], rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize(("bfloat16", "checkpointing"), [("native", False), ("emulated", True)])
def test_sharded_weights_in_mixed_precision_follow_the_dtype_rule(
    store: Path, run: Callable[..., Path], tmp_path: Path, bfloat16: str, checkpointing: bool
) -> None:
    """configs/accelerate/fsdp.yaml: weights are gathered in bfloat16, times and tables stay float32."""
    changes = dict(batch_size=16, max_steps=8, eval_steps=4, eval_samples=4, bf16=True)
    changes["gradient_checkpointing"] = checkpointing
    expected = {"queries torch.bfloat16", "weight torch.bfloat16"}
    expected |= {f"{what} torch.float32" for what in ("stream", "rope", "time")}
    if bfloat16 == "emulated":  # training, which FSDP does not autocast, then takes products in float32
        expected.add("queries torch.float32")
    found = launch(jobs.train_sharded, 2, store, tmp_path / "sharded", changes, None, bfloat16)
    assert [set(kinds) for kinds in found] == [expected | {"prediction torch.float32", "DTensor"}] * 2
    exact = logged(run(1, 32))["loss"][:8]
    np.testing.assert_allclose(logged(tmp_path / "sharded")["loss"], exact, rtol=0.01)


def test_a_sharded_run_continues_sharded_or_on_one_process(store: Path, tmp_path: Path) -> None:
    changes = dict(batch_size=16, max_steps=8, eval_split=1 / 6, eval_steps=100, eval_samples=0, save_steps=5)
    whole, sharded, alone = (tmp_path / name for name in ("whole", "sharded", "alone"))
    launch(jobs.train_sharded, 2, store, whole, changes)
    checkpoint = whole / "checkpoint-5"
    verify_checkpoint(checkpoint)
    launch(jobs.train_sharded, 2, store, sharded, changes, checkpoint)
    jobs.train_once(store, alone, changes | dict(batch_size=32), checkpoint)
    for name in ("model.safetensors", EMA_FILE, "checkpoint-8/optimizer.safetensors"):
        expected = load_file(whole / name)
        for again in (sharded, alone):
            found = load_file(again / name)
            for key, tensor in expected.items():
                where = f"{again.name}/{name}: {key}"
                torch.testing.assert_close(found[key], tensor, rtol=1e-4, atol=1e-6, msg=where)


@pytest.mark.parametrize("job", [jobs.train_once, jobs.train_sharded])
def test_several_processes_start_from_a_model_and_train_further_as_one_does(
    job: Callable[..., Any], store: Path, run: Callable[..., Path], tmp_path: Path
) -> None:
    """At a rate of 0 the weights stay what they were; an extension has one process's rates and weights."""
    model = run(1, 32)
    start = dict(batch_size=16, max_steps=2, learning_rate=0.0, eval_steps=100, init_from=str(model))
    launch(job, 2, store, tmp_path / "started", start)
    expected = load_file(model / EMA_FILE)
    for file in ("model.safetensors", EMA_FILE):
        for name, tensor in load_file(tmp_path / "started" / file).items():
            torch.testing.assert_close(tensor, expected[name], rtol=1e-6, atol=1e-8, msg=name)
    longer = start | dict(extend_steps=3, extended_at=2, extended_to=5, extended_warmup=1, learning_rate=1e-3)
    checkpoint = tmp_path / "started" / "checkpoint-2"
    launch(job, 2, store, tmp_path / "longer", longer, checkpoint)
    jobs.train_once(store, tmp_path / "one", longer | dict(batch_size=32), checkpoint)
    assert logged(tmp_path / "longer")["learning_rate"].tolist() == [0.0, 1e-3, 5e-4]
    one = load_file(tmp_path / "one" / "model.safetensors")
    for name, tensor in load_file(tmp_path / "longer" / "model.safetensors").items():
        torch.testing.assert_close(tensor, one[name], rtol=1e-4, atol=1e-6, msg=name)
