"""Training runs of a tiny real model: draws, resume, averaging, logs, refusals."""

from __future__ import annotations

import json
import math
import os
import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from blip3o_dit.cli.train import main as train_main
from blip3o_dit.data.dataset import split_samples, training_sampler
from blip3o_dit.data.store import EmbeddingStore
from blip3o_dit.flow.path import LinearPath
from blip3o_dit.flow.predictions import preconditioning
from blip3o_dit.model.blip3o_dit import BLIP3oDiTModel
from blip3o_dit.model.loading import EMA_FILE
from blip3o_dit.training.anomalies import NonFiniteLossError
from blip3o_dit.training.arguments import make_deterministic, training_arguments
from blip3o_dit.training.checkpoint import LoopState, best_saved, check_checkpoint
from blip3o_dit.training.config import TrainingConfig
from blip3o_dit.training.curves import read_log
from blip3o_dit.training.distillation import distill
from blip3o_dit.training.distillation_config import DistillationConfig
from blip3o_dit.training.resolve import resolve_config
from blip3o_dit.training.run import build_trainer, train
from blip3o_dit.training.wandb_setup import prepare_wandb
from blip3o_dit.utils.checksums import seal
from blip3o_dit.utils.distributed import join_processes
from tests.helpers.curves import curves_drawn
from tests.helpers.stores import write_linear_store
from tests.helpers.training import config_for, make_trainer, same


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> EmbeddingStore:
    return write_linear_store(tmp_path_factory.mktemp("data") / "store")


@pytest.fixture(scope="module")
def finished(store: EmbeddingStore, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One whole run of two passes, with a checkpoint at the boundary between them."""
    with curves_drawn():
        return train(config_for(store, tmp_path_factory.mktemp("run") / "whole"))


def tensors(file: Path) -> dict[str, torch.Tensor]:
    return load_file(file)


def test_the_output_folder_holds_all_that_generation_needs(finished: Path, store: EmbeddingStore) -> None:
    names = {"config.json", "model.safetensors", EMA_FILE, "training_config.json"}
    names |= {"training_log.jsonl", "training_curves.png"}
    assert names <= {file.name for file in finished.iterdir()}
    saved = json.loads((finished / "config.json").read_text())
    assert saved["flow_matching"]["prediction_type"] == "preconditioned"
    assert saved["flow_matching"]["source"] == "ridge_context"
    assert "source_weight" in tensors(finished / "model.safetensors")
    assert (saved["in_channels"], saved["eva_embedding_size"], saved["input_size"]) == (8, 12, 3)
    split = split_samples(store, eval_split=1 / 6, seed=42)
    eva, clip = store.fetch(split.train)
    model = BLIP3oDiTModel.from_pretrained(finished)
    torch.testing.assert_close(model.target_mean, clip.mean(dim=(0, 1)))
    torch.testing.assert_close(model.condition_std, eva.flatten(0, 1).std(dim=0, correction=0))


def test_resume_at_an_epoch_boundary_equals_the_uninterrupted_run(
    finished: Path, store: EmbeddingStore, tmp_path: Path
) -> None:
    shutil.copytree(finished / "checkpoint-5", tmp_path / "again" / "checkpoint-5")
    torch.manual_seed(123)  # the state of the process must not matter
    resumed = train(config_for(store, tmp_path / "again"), resume=tmp_path / "again" / "checkpoint-5")
    for file in ("model.safetensors", EMA_FILE):
        assert same(tensors(finished / file), tensors(resumed / file)), file
    whole = [entry for entry in read_log(finished / "training_log.jsonl") if entry["step"] > 6]
    again = [entry for entry in read_log(resumed / "training_log.jsonl") if entry["step"] > 6]
    assert [e["loss"] for e in whole if "loss" in e] == [e["loss"] for e in again if "loss" in e]
    assert not same(tensors(finished / "model.safetensors"), tensors(resumed / EMA_FILE))


def test_the_trainer_takes_the_order_that_was_asked_for(store: EmbeddingStore, tmp_path: Path) -> None:
    orders = []
    for shuffle in ("exact", "window"):
        trainer = make_trainer(store, tmp_path / shuffle, shuffle=shuffle, shuffle_window=6)
        data = trainer.train_dataset
        expected = training_sampler(data, shuffle=shuffle, window=6, seed=42)
        orders.append([index for batch in trainer.get_train_dataloader() for index in batch["index"]])
        assert orders[-1] == [int(data.indices[position]) for _, position in expected]
    assert orders[0] != orders[1]
    assert sorted(orders[0]) == sorted(orders[1])


def test_training_refuses_a_damaged_shard_that_its_statistics_glanced_at(tmp_path: Path) -> None:
    store = write_linear_store(tmp_path / "store")
    file = store.path / "shard-00002.safetensors"
    file.write_bytes(file.read_bytes()[:-1] + b"\x01")
    with pytest.raises(ValueError, match=r"shard-00002.safetensors: sample 29: its CRC-32"):
        train(config_for(store, tmp_path / "run", source="noise", max_steps=5))


def test_statistics_of_a_part_of_the_training_split(store: EmbeddingStore, tmp_path: Path) -> None:
    def means(**changes: Any) -> torch.Tensor:
        config = config_for(store, tmp_path / "run", source="noise", **changes)
        return build_trainer(store, config).unwrapped_model.condition_mean

    whole = means()
    assert torch.equal(means(statistics_samples=40), whole)
    part = means(statistics_samples=20)
    assert torch.equal(means(statistics_samples=20), part)
    assert not torch.equal(part, whole)
    # 180 tokens of unit variance around 3: the deviation of a mean is 0.07.
    torch.testing.assert_close(part, whole, atol=0.3, rtol=0)


def test_accumulation_of_small_batches_equals_one_large_batch(store: EmbeddingStore, tmp_path: Path) -> None:
    # Batches of the same pass hold the same samples, noise and times whatever their size.
    quiet = dict(max_steps=3, ema_decay=0.0, eval_split=0.0, save_steps=100, logging_steps=1)
    large = train(config_for(store, tmp_path / "large", batch_size=8, **quiet))
    small = train(config_for(store, tmp_path / "small", batch_size=4, gradient_accumulation_steps=2, **quiet))
    losses = [
        [e["loss"] for e in read_log(run / "training_log.jsonl") if "loss" in e] for run in (large, small)
    ]
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)


def test_log_has_the_documented_quantities(finished: Path) -> None:
    log = read_log(finished / "training_log.jsonl")
    training = [entry for entry in log if "loss" in entry]
    evaluation = [entry for entry in log if "eval_loss" in entry]
    assert [entry["step"] for entry in training] == [2, 4, 6, 8, 10]
    assert [entry["step"] for entry in evaluation] == [5, 10]
    documented = {"loss", "flow_matching_loss", "regularization_loss", "cosine_similarity", "l2_distance"}
    documented |= {"snr_db", "output_norm", "grad_norm", "learning_rate", "epoch", "step"}
    assert documented <= set(training[0])
    assert {"eval_loss", "eval_cosine_similarity_mean", "eval_r2"} <= set(evaluation[0])
    assert all(math.isfinite(value) for entry in log for value in entry.values())
    assert training[0]["loss"] == pytest.approx(training[0]["flow_matching_loss"])


@pytest.mark.parametrize("recipe", [dict(source="noise", prediction_type="v_prediction"), {}])
def test_network_input_and_loss_share_one_draw(
    store: EmbeddingStore, tmp_path: Path, recipe: dict[str, str]
) -> None:
    trainer = make_trainer(store, tmp_path, **recipe)
    batch = trainer._prepare_inputs(trainer.train_dataset.__getitems__([(0, 1), (0, 2)]))
    seen: dict[str, torch.Tensor] = {}

    def record(_: Any, inputs: tuple[torch.Tensor, ...]) -> None:
        seen["x_t"], seen["t"] = inputs[:2]

    trainer.unwrapped_model.register_forward_pre_hook(record)
    loss = trainer.compute_loss(trainer.unwrapped_model, batch)
    source = trainer.unwrapped_model.source_distribution(
        trainer.unwrapped_model.normalize_condition(batch["eva"])
    )
    x_1 = source.to_flow(trainer.unwrapped_model.normalize_target(batch["clip"]))
    path, t = LinearPath(), seen["t"][:, None, None]
    x_t = source.to_flow(seen["x_t"])
    noise = (x_t - path.alpha(t) * x_1) / path.sigma(t)
    assert abs(float(noise.mean())) < 0.3 and 0.7 < float(noise.std()) < 1.3
    # An untrained model puts out zero, so the loss is the mean square of the target made of that noise,
    # less what the preconditioning says without the network.
    target = x_1 + path.sigma_derivative(t) * noise
    if not recipe:
        target = target - preconditioning(t, path)[0] * x_t
    assert float(loss.detach()) == pytest.approx(float(target.square().mean()), rel=1e-4)


def test_a_dropped_condition_leaves_the_source_and_its_guess(store: EmbeddingStore, tmp_path: Path) -> None:
    trainer = make_trainer(store, tmp_path, cfg_dropout=0.999)
    trainer.unwrapped_model.source_weight.normal_()
    batch = trainer._prepare_inputs(trainer.train_dataset.__getitems__([(0, 1), (0, 2)]))
    seen: list[torch.Tensor] = []
    trainer.unwrapped_model.register_forward_pre_hook(lambda _, inputs: seen.extend(inputs))
    trainer.compute_loss(trainer.unwrapped_model, batch)
    _, _, condition, guess = seen
    expected = trainer.unwrapped_model.source_distribution(
        trainer.unwrapped_model.normalize_condition(batch["eva"])
    ).mean
    assert (condition == 0).all() and expected.abs().mean() > 0.01
    assert torch.equal(guess, expected)


def test_draws_do_not_depend_on_the_batch_and_change_with_the_pass(
    store: EmbeddingStore, tmp_path: Path
) -> None:
    trainer = make_trainer(store, tmp_path)
    dataset = trainer.train_dataset
    together = trainer.flow_batch(
        trainer._prepare_inputs(dataset.__getitems__([(0, 4), (0, 7)])), training=True
    )
    alone = trainer.flow_batch(trainer._prepare_inputs(dataset.__getitems__([(0, 7)])), training=True)
    later = trainer.flow_batch(trainer._prepare_inputs(dataset.__getitems__([(1, 7)])), training=True)
    assert torch.equal(together.sample.noise[1], alone.sample.noise[0])
    assert together.sample.t[1] == alone.sample.t[0]
    torch.testing.assert_close(together.network_input[1], alone.network_input[0])
    assert torch.equal(together.condition[1], alone.condition[0])
    assert later.sample.t[0] != alone.sample.t[0]
    assert not torch.equal(later.sample.noise, alone.sample.noise)


def test_condition_dropout_drops_whole_conditions_at_its_rate(store: EmbeddingStore, tmp_path: Path) -> None:
    trainer = make_trainer(store, tmp_path, cfg_dropout=0.3)
    dropped = []
    for epoch in range(10):
        batch = trainer._prepare_inputs(trainer.train_dataset.__getitems__([(epoch, i) for i in range(40)]))
        condition = trainer.flow_batch(batch, training=True).condition
        zero = (condition == 0).flatten(1)
        assert torch.equal(zero.all(dim=1), zero.any(dim=1))
        dropped.append(zero.all(dim=1).float().mean())
        kept = trainer.flow_batch(batch, training=False).condition
        assert not (kept == 0).flatten(1).all(dim=1).any()
    assert 0.22 < float(torch.stack(dropped).mean()) < 0.38


def test_a_non_finite_loss_stops_before_the_step(store: EmbeddingStore, tmp_path: Path) -> None:
    trainer = make_trainer(store, tmp_path)
    with torch.no_grad():
        trainer.unwrapped_model.dit.norm_out.linear_2.bias[0] = float("nan")
    before = {name: p.clone() for name, p in trainer.unwrapped_model.named_parameters()}
    with pytest.raises(NonFiniteLossError, match="step 1: expected a finite loss, found nan for samples"):
        trainer.train()
    after = dict(trainer.unwrapped_model.named_parameters())
    assert all(torch.equal(before[n], after[n]) for n in before if "linear_2.bias" not in n)


def test_ema_follows_its_formula_and_is_what_evaluation_uses(store: EmbeddingStore, tmp_path: Path) -> None:
    trainer = make_trainer(store, tmp_path, ema_decay=0.5, max_steps=1)
    name = "dit.norm_out.linear_2.weight"
    start = trainer.unwrapped_model.get_parameter(name).detach().clone()
    trainer.train()
    end = trainer.unwrapped_model.get_parameter(name).detach()
    assert trainer.ema is not None
    decay = min(0.5, (1 + 1) / (10 + 1))
    torch.testing.assert_close(trainer.ema.weights[name], decay * start + (1 - decay) * end)
    own = {n: p.clone() for n, p in trainer.unwrapped_model.named_parameters()}
    with_average = trainer.evaluate()["eval_loss"]
    assert all(torch.equal(own[n], p) for n, p in trainer.unwrapped_model.named_parameters())
    trainer.ema = None
    assert trainer.evaluate()["eval_loss"] != with_average


def test_evaluation_repeats_its_draws(store: EmbeddingStore, tmp_path: Path) -> None:
    trainer = make_trainer(store, tmp_path)
    first, second = trainer.evaluate(), trainer.evaluate()
    assert first["eval_loss"] == second["eval_loss"]
    assert first["eval_r2"] == second["eval_r2"]


def test_held_out_figures_are_of_a_named_choice_of_bounded_size(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Not of all held-out samples, and not of the first ones: stores may be sorted by class."""
    store = write_linear_store(tmp_path / "store", samples=60)
    trainer = make_trainer(store, tmp_path, eval_split=40, eval_loss_samples=12, eval_samples=6)
    seen: dict[str, list[int]] = {"loss": [], "generated": []}
    flow_batch, generate = trainer.flow_batch, trainer.unwrapped_model.generate

    def drawing(batch: dict[str, Any], *, training: bool) -> Any:
        seen["loss"] += batch["index"]
        return flow_batch(batch, training=training)

    def generating(*args: Any, sample_index: list[int], **kwargs: Any) -> torch.Tensor:
        seen["generated"] += sample_index
        return generate(*args, sample_index=sample_index, **kwargs)

    monkeypatch.setattr(trainer, "flow_batch", drawing)
    monkeypatch.setattr(trainer.unwrapped_model, "generate", generating)
    held_out = trainer.eval_dataset.indices.tolist()
    figures = [trainer.evaluate()["eval_loss"] for _ in range(2)]
    assert len(held_out) == 40 and figures[0] == figures[1]
    for name, count in (("loss", 12), ("generated", 6)):
        first, second = seen[name][:count], seen[name][count:]
        assert first == second, name
        assert len(set(first)) == count and set(first) <= set(held_out), name
        assert max(first) > held_out[25], name
    trainer.config = replace(trainer.config, eval_loss_samples=40)
    seen["loss"].clear()
    trainer.evaluate()
    assert seen["loss"] == held_out


@pytest.mark.parametrize("prediction_type", ["epsilon", "sample"])
def test_other_predictions_and_paths_train(
    store: EmbeddingStore, tmp_path: Path, prediction_type: str
) -> None:
    changes = dict(prediction_type=prediction_type, schedule_type="cosine", normalize_embeddings=True)
    run = train(config_for(store, tmp_path / "run", max_steps=4, **changes))
    losses = [e["loss"] for e in read_log(run / "training_log.jsonl") if "loss" in e]
    assert len(losses) == 2 and all(math.isfinite(loss) for loss in losses)


class TestRefusals:
    def test_half_a_checkpoint(self, finished: Path, store: EmbeddingStore, tmp_path: Path) -> None:
        broken = tmp_path / "checkpoint-5"
        shutil.copytree(finished / "checkpoint-5", broken)
        (broken / "optimizer.safetensors").unlink()
        with pytest.raises(ValueError, match=r"expected a whole checkpoint, found no optimizer.safetensors"):
            train(config_for(store, tmp_path / "out"), resume=broken)
        with pytest.raises(FileNotFoundError, match="expected a checkpoint folder, found nothing there"):
            train(config_for(store, tmp_path / "out"), resume=tmp_path / "nowhere")

    def test_checkpoint_of_another_model(self, finished: Path, store: EmbeddingStore, tmp_path: Path) -> None:
        other = config_for(store, tmp_path / "out", model_dim=64)
        with pytest.raises(ValueError, match="model_dim is 32 there, 64 here"):
            train(other, resume=finished / "checkpoint-5")

    def test_checkpoint_with_other_tensors(self, finished: Path, tmp_path: Path) -> None:
        broken = tmp_path / "checkpoint-5"
        shutil.copytree(finished / "checkpoint-5", broken)
        weights = tensors(broken / "model.safetensors")
        del weights["dit.layers.0.gate"]
        save_file(weights, broken / "model.safetensors", metadata={"format": "pt"})
        model = BLIP3oDiTModel.from_pretrained(finished)
        run = LoopState.read(broken).run
        with pytest.raises(ValueError, match=r"model.safetensors: expected \d+ bytes, found \d+"):
            check_checkpoint(broken, model.config, run)
        seal(broken)
        misfit = r"weights do not fit the configuration: 1 missing \(dit.layers.0.gate\)"
        with pytest.raises(ValueError, match=misfit):
            check_checkpoint(broken, model.config, run)

    def test_changed_settings_show_the_difference(self, finished: Path) -> None:
        checkpoint = finished / "checkpoint-5"
        with pytest.raises(ValueError, match=r"seed was 42, now 7"):
            resolve_config({"seed": 7}, debug=False, resume=checkpoint)
        with pytest.raises(ValueError, match=r"prediction_type was 'preconditioned', now 'sample'"):
            resolve_config({"prediction_type": "sample"}, debug=False, resume=checkpoint)
        resumed = resolve_config({"num_workers": 2}, debug=False, resume=checkpoint)
        assert (resumed.model_dim, resumed.num_workers) == (32, 2)

    def test_a_folder_that_holds_a_run(self, finished: Path, store: EmbeddingStore) -> None:
        before = (finished / "model.safetensors").read_bytes()
        with pytest.raises(ValueError, match="expected no run there, found one"):
            train(config_for(store, finished))
        assert (finished / "model.safetensors").read_bytes() == before

    def test_a_folder_that_holds_a_run_with_debug_too(self, finished: Path, store: EmbeddingStore) -> None:
        before = sorted(file.relative_to(finished) for file in finished.rglob("*"))
        words = ["--embeddings_path", str(store.path), "--output_dir", str(finished), "--debug"]
        assert train_main([*words, "--source", "noise", "--max_steps", "1", "--device", "cpu"]) == 2
        assert sorted(file.relative_to(finished) for file in finished.rglob("*")) == before

    def test_an_output_path_that_cannot_be_a_folder(self, store: EmbeddingStore, tmp_path: Path) -> None:
        file = tmp_path / "file"
        file.write_text("")
        with pytest.raises(ValueError, match="expected a folder to write to, found a file"):
            train(config_for(store, file))
        with pytest.raises((ValueError, OSError), match="file"):
            train(config_for(store, file / "below"))

    @pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
    def test_settings_that_need_a_gpu(self, store: EmbeddingStore, tmp_path: Path) -> None:
        with pytest.raises(ValueError, match=r"--fp16: expected a GPU.*use --bf16"):
            train(config_for(store, tmp_path / "a", fp16=True))
        with pytest.raises(ValueError, match="--device cuda: expected a CUDA GPU, found none"):
            train(config_for(store, tmp_path / "a", device="cuda"))
        assert not any(tmp_path.rglob("*.safetensors"))

    def test_a_launch_the_trainer_does_not_see(
        self, store: EmbeddingStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        from blip3o_dit.utils.distributed import check_launch

        monkeypatch.setenv("WORLD_SIZE", "2")
        with pytest.raises(ValueError, match="started 2 processes, this program sees 1"):
            check_launch(1)

    @pytest.mark.parametrize("variable", ["SLURM_STEP_NUM_TASKS", "OMPI_COMM_WORLD_SIZE"])
    def test_a_launch_without_torchrun(
        self, store: EmbeddingStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, variable: str
    ) -> None:
        """`srun -n 2 python ...`: two programs that do not know of each other."""
        monkeypatch.setenv(variable, "2")
        if variable.startswith("SLURM"):  # MPI's accelerate takes up itself when it trains
            with pytest.raises(ValueError, match=rf"{variable}: the launcher started 2 .* sees 1"):
                train(config_for(store, tmp_path / "run"))
        with pytest.raises(ValueError, match=rf"{variable}: the launcher started 2 .* sees 1"):
            join_processes("cpu")
        with pytest.raises(ValueError, match=rf"{variable}: distill works in one process, .* started 2"):
            distill(tmp_path / "m", store.path, tmp_path / "out", DistillationConfig(steps=1))
        assert not (tmp_path / "run").exists() or not any((tmp_path / "run").iterdir())
        monkeypatch.setenv("WORLD_SIZE", "1")  # each is to work alone
        assert join_processes("cpu").count == 1


def test_only_matrices_decay(store: EmbeddingStore, tmp_path: Path) -> None:
    trainer = make_trainer(store, tmp_path, weight_decay=0.1)
    trainer.create_optimizer()
    decayed, others = (group["params"] for group in trainer.optimizer.param_groups)
    assert trainer.optimizer.param_groups[0]["weight_decay"] == 0.1
    assert {p.ndim for p in decayed} == {2} and {p.ndim for p in others} == {1}
    gate = trainer.unwrapped_model.dit.layers[0].gate
    assert any(p is gate for p in others)


def test_the_best_of_the_saved_checkpoints_is_found(tmp_path: Path) -> None:
    """The best evaluation of all was at step 15, where nothing was saved."""
    losses = {5: 3.0, 10: 2.0, 15: 1.0, 20: 2.5, 30: None, 40: float("nan")}
    log: list[dict[str, Any]] = [{"step": step, "loss": 0.1} for step in losses]
    log += [{"step": step, "eval_loss": value, "eval_r2": value} for step, value in losses.items()]
    assert best_saved(tmp_path, log, "eval_loss") is None
    for step in (10, 20, 30, 40, 50):
        (tmp_path / f"checkpoint-{step}").mkdir()
    assert best_saved(tmp_path, log, "eval_loss") == 10
    assert best_saved(tmp_path, log, "eval_r2") == 20


def test_the_arguments_allow_for_a_long_fit_and_send_no_buffers_around(
    store: EmbeddingStore, tmp_path: Path
) -> None:
    arguments = training_arguments(config_for(store, tmp_path), evaluate=False)
    assert arguments.ddp_timeout >= 3600 and arguments.ddp_broadcast_buffers is False


@pytest.fixture
def algorithms(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Torch's choice of algorithms, and the variables for it, are as before afterwards."""
    for name in ("CUBLAS_WORKSPACE_CONFIG", "NCCL_ALGO"):
        monkeypatch.setenv(name, "")
        monkeypatch.delenv(name)
    yield
    torch.use_deterministic_algorithms(False)
    torch.utils.deterministic.fill_uninitialized_memory = True


@pytest.mark.usefixtures("algorithms")
@pytest.mark.parametrize("deterministic", [False, True])
def test_deterministic_asks_torch_cublas_and_nccl(
    store: EmbeddingStore, tmp_path: Path, deterministic: bool
) -> None:
    trainer = build_trainer(store, config_for(store, tmp_path, source="noise", deterministic=deterministic))
    loss = trainer.compute_loss(
        trainer.unwrapped_model,
        trainer._prepare_inputs(trainer.train_dataset.__getitems__([(0, 1), (0, 2)])),
    )
    loss.backward()  # every operation has a deterministic form
    assert torch.are_deterministic_algorithms_enabled() == deterministic
    assert torch.utils.deterministic.fill_uninitialized_memory != deterministic
    found = [os.environ.get(name) for name in ("CUBLAS_WORKSPACE_CONFIG", "NCCL_ALGO")]
    assert found == ([":4096:8", "Ring"] if deterministic else [None, None])


@pytest.mark.usefixtures("algorithms")
def test_a_deterministic_run_asks_before_a_gpu_is_looked_at(
    store: EmbeddingStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """cuBLAS and NCCL read their variables once."""
    seen: list[str | None] = []

    def use_cpu(config: TrainingConfig) -> bool:
        seen.append(os.environ.get("CUBLAS_WORKSPACE_CONFIG"))
        raise ZeroDivisionError

    monkeypatch.setattr("blip3o_dit.training.run.use_cpu", use_cpu)
    with pytest.raises(ZeroDivisionError):
        train(config_for(store, tmp_path / "run", deterministic=True))
    assert seen == [":4096:8"]


@pytest.mark.usefixtures("algorithms")
def test_deterministic_refuses_variables_that_say_otherwise(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":16:8")
    monkeypatch.setenv("NCCL_ALGO", "Tree")
    make_deterministic()
    assert os.environ["NCCL_ALGO"] == "Tree"
    for name, value in (("NCCL_ALGO", "NVLS"), ("CUBLAS_WORKSPACE_CONFIG", ":0:0")):
        with monkeypatch.context() as patch:
            patch.setenv(name, value)
            with pytest.raises(ValueError, match=f"--deterministic: {name}: expected .*, found '{value}'"):
                make_deterministic()


def test_a_continued_run_is_the_same_one_at_wandb(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("WANDB_PROJECT", "WANDB_DIR", "WANDB_RUN_ID", "WANDB_RESUME"):
        monkeypatch.setenv(name, "")
        monkeypatch.delenv(name)
    monkeypatch.setenv("WANDB_MODE", "offline")

    def run_id(folder: str, *, continued: bool) -> str:
        prepare_wandb("project", str(tmp_path / folder), continued=continued)
        assert os.environ["WANDB_RESUME"] == "allow"
        return os.environ["WANDB_RUN_ID"]

    first = run_id("a", continued=False)
    other = run_id("b", continued=False)
    assert first != other and run_id("a", continued=True) == first
    assert run_id("a", continued=False) != first  # started over
    monkeypatch.setenv("WANDB_RUN_ID", "mine")
    assert run_id("b", continued=True) == "mine"


def test_dry_run_writes_nothing(store: EmbeddingStore, tmp_path: Path) -> None:
    train(config_for(store, tmp_path / "dry"), dry_run=True)
    assert not (tmp_path / "dry").exists() or not any((tmp_path / "dry").iterdir())
