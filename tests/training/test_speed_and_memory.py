"""Low memory, checkpointing, compiled blocks, deferred checks and what the log says about speed."""

from __future__ import annotations

import json
import math
import time
import weakref
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode
from transformers import TrainerCallback

from blip3o_dit.data.store import EmbeddingStore
from blip3o_dit.flow.loss import BLIP3oFlowMatchingLoss
from blip3o_dit.flow.path import AffineSource
from blip3o_dit.model.blip3o_dit import BLIP3oDiTModel
from blip3o_dit.model.loading import EMA_FILE
from blip3o_dit.model.transformer import NextDiTBlock
from blip3o_dit.training import arguments
from blip3o_dit.training.anomalies import HostCopy, LossMonitor, NonFiniteLossError
from blip3o_dit.training.config import TrainingConfig
from blip3o_dit.training.curves import read_log
from blip3o_dit.training.ema import ExponentialMovingAverage
from blip3o_dit.training.metrics import Throughput, TrainingMetrics, forward_flops, matmul_rate
from blip3o_dit.training.resolve import resolve_config
from blip3o_dit.training.run import train
from blip3o_dit.training.trainer import BLIP3oTrainer
from tests.conftest import randomize, tiny_config
from tests.helpers.stores import write_linear_store
from tests.helpers.training import config_for, make_trainer, same


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> EmbeddingStore:
    return write_linear_store(tmp_path_factory.mktemp("data") / "store")


@pytest.fixture
def uncompiled() -> Iterator[None]:
    """torchao's compiled optimizer, run as it is written: compiling it takes half a minute."""
    torch.compiler.set_stance("force_eager")
    yield
    torch.compiler.set_stance("default")


# Low memory


@pytest.mark.usefixtures("uncompiled")
def test_low_memory_learns_what_float32_learns(store: EmbeddingStore, tmp_path: Path) -> None:
    # Wide enough for quantised states, which start at 4096 numbers.
    common = dict(model_dim=64, max_steps=30, eval_split=0.0, ema_decay=0.0, logging_steps=5, save_steps=15)
    common |= dict(source="noise", prediction_type="v_prediction")  # what there is most to learn of
    train(config_for(store, tmp_path / "float32", **common))
    train(config_for(store, tmp_path / "low", **common, memory="low", gradient_checkpointing=True))
    losses = [
        [entry["loss"] for entry in read_log(tmp_path / name / "training_log.jsonl") if "loss" in entry]
        for name in ("float32", "low")
    ]
    assert losses[0][-1] < 0.96 * losses[0][0]
    for exact, low in zip(*losses, strict=True):
        assert low == pytest.approx(exact, rel=0.02)
        assert low != exact
    optimizer = load_file(tmp_path / "low" / "checkpoint-15" / "optimizer.safetensors")
    assert sum(name.endswith("exp_avg.codes") for name in optimizer) > 5
    saved = BLIP3oDiTModel.from_pretrained(tmp_path / "low", dtype="auto")
    assert saved.dtype == torch.bfloat16 and saved.target_mean.dtype == torch.float32


@pytest.mark.usefixtures("uncompiled")
def test_a_low_memory_run_continues_where_it_stopped(store: EmbeddingStore, tmp_path: Path) -> None:
    common = dict(model_dim=64, max_steps=10, memory="low", ema_decay=0.99, eval_split=1 / 6)
    whole = train(config_for(store, tmp_path / "whole", **common))
    resumed = train(config_for(store, tmp_path / "resumed", **common), resume=whole / "checkpoint-5")
    for file in ("model.safetensors", EMA_FILE, f"checkpoint-10/{EMA_FILE}"):
        assert same(load_file(whole / file), load_file(resumed / file)), file
    name = "dit.norm_out.linear_2.weight"
    exact, rounded = (load_file(folder / EMA_FILE)[name] for folder in (whole / "checkpoint-10", whole))
    assert exact.dtype == torch.float32 and rounded.dtype == torch.bfloat16
    assert torch.equal(exact.bfloat16(), rounded) and not torch.equal(exact, rounded.float())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_averages_take_the_place_of_weights_without_a_second_copy(dtype: torch.dtype) -> None:
    model = BLIP3oDiTModel(tiny_config()).to(dtype)
    average = ExponentialMovingAverage(model, 0.5)
    randomize(model)
    average.update(model, 1)
    own = {name: p.detach().clone() for name, p in model.named_parameters()}
    averages = {name: value.clone() for name, value in average.weights.items()}
    name = "dit.layers.0.feed_forward.linear_1.weight"
    with Copies() as copies, average.applied(model):
        kept = copies.bytes()
        assert all(torch.equal(p, averages[n].to(dtype)) for n, p in model.named_parameters())
        assert not torch.equal(model.get_parameter(name), own[name])
    assert all(torch.equal(p, own[n]) for n, p in model.named_parameters())
    assert same(average.weights, averages)
    sizes = [p.numel() for p in model.parameters()]
    largest, weights = 4 * max(sizes), sum(sizes)
    assert kept <= (largest if dtype == torch.float32 else 2 * weights)
    with Copies() as copies:
        average.update(model, 2)
        assert copies.most <= 2 * largest


class Copies(TorchDispatchMode):
    """Bytes of the tensors that were copied since and are alive."""

    def __init__(self) -> None:
        super().__init__()
        self.most = 0
        self._alive: list[weakref.ref[torch.Tensor]] = []

    def bytes(self) -> int:
        tensors = [tensor for reference in self._alive if (tensor := reference()) is not None]
        return sum(tensor.numel() * tensor.element_size() for tensor in tensors)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if func in (torch.ops.aten.clone.default, torch.ops.aten._to_copy.default):
            self._alive.append(weakref.ref(result))
            self.most = max(self.most, self.bytes())
        return result


def test_small_updates_survive_stochastic_rounding() -> None:
    """An update of a tenth of a bfloat16 step would be lost by rounding to the nearest."""
    from torchao.optim import AdamW8bit

    weight = nn.Parameter(torch.ones(4096, dtype=torch.bfloat16))
    step = 2**-8  # the distance of the next smaller bfloat16 number from 1
    optimizer = AdamW8bit([weight], lr=step / 10, weight_decay=0.0, bf16_stochastic_round=True)
    torch.compiler.set_stance("force_eager")
    try:
        for _ in range(5):
            weight.grad = torch.ones_like(weight)
            optimizer.step()
    finally:
        torch.compiler.set_stance("default")
    assert float(1 - weight.float().mean()) == pytest.approx(0.5 * step, rel=0.1)


def test_low_memory_stands_for_checkpointing_and_no_averages_unless_they_are_given() -> None:
    config = resolve_config({"memory": "low"}, debug=False, resume=None)
    assert config.gradient_checkpointing and config.ema_decay == 0.0
    config = resolve_config({"memory": "low", "ema_decay": 0.9}, debug=False, resume=None)
    assert config.ema_decay == 0.9
    with pytest.raises(ValueError, match="bfloat16, expected no fp16"):
        TrainingConfig(memory="low", fp16=True)


def test_what_is_not_installed_is_asked_for_before_anything_is_written(
    store: EmbeddingStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(arguments.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(
        ValueError, match=r"--memory low: expected the package torchao, found none: pip install torchao$"
    ):
        arguments.training_arguments(config_for(store, tmp_path / "out", memory="low"), evaluate=False)
    monkeypatch.undo()
    monkeypatch.setattr("shutil.which", lambda name: None)
    with pytest.raises(ValueError, match=r"--compile: expected a C\+\+ compiler"):
        train(config_for(store, tmp_path / "out", compile=True))
    assert not (tmp_path / "out").exists()


# Checkpointing and compilation change time and memory, not the result


def gradients(model: BLIP3oDiTModel) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(3)
    x, condition = (torch.randn(2, 9, width, generator=generator) for width in (8, 12))
    model.zero_grad()
    model(x, torch.tensor([0.2, 0.7]), condition).square().sum().backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def check_close(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    scale = max(float(gradient.abs().max()) for gradient in expected.values())
    for name, gradient in expected.items():
        torch.testing.assert_close(found[name], gradient, rtol=1e-4, atol=1e-6 * scale, msg=name)


def test_selective_checkpointing_keeps_products_and_gives_the_same_gradients() -> None:
    model = BLIP3oDiTModel(tiny_config()).train()
    randomize(model)
    expected = gradients(model)
    operations = {}
    for checkpointing, selective in ((False, False), (True, True), (True, False)):
        model.dit.gradient_checkpointing, model.dit.selective_checkpointing = checkpointing, selective
        with FlopCounterMode(display=False) as counter:
            found = gradients(model)
        check_close(found, expected)
        operations[checkpointing, selective] = counter.get_total_flops()
    assert operations[True, True] == operations[False, False] < operations[True, False]


def test_compiled_blocks_compute_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    """Traced by torch.compile and run without its code generation, which takes half a minute."""
    torch.compiler.reset()  # what other tests compiled counts towards a limit, beyond which nothing is
    model = BLIP3oDiTModel(tiny_config(num_kv_heads=1))
    randomize(model)
    model.train()
    expected, sample = gradients(model), model.generate(torch.ones(2, 9, 12), num_inference_steps=2)
    calls = []

    def backend(graph: torch.fx.GraphModule, inputs: list[torch.Tensor]) -> object:
        calls.append(graph)
        return graph.forward

    monkeypatch.setattr(NextDiTBlock, "compile", lambda self: nn.Module.compile(self, backend=backend))
    model.compile_for_generation()
    check_close(gradients(model), expected)
    # Norms are rounded in another order, which a network of large random weights makes much of.
    compiled = model.generate(torch.ones(2, 9, 12), num_inference_steps=2)
    torch.testing.assert_close(compiled, sample, rtol=1e-3, atol=1e-3)
    assert 1 <= len(calls) <= 2  # all blocks share one compiled function, with and without gradients


@pytest.mark.parametrize(("training", "products"), [(True, 6), (False, 4)])
def test_compiled_blocks_multiply_what_has_the_same_input_at_once(
    training: bool, products: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of eleven products with the modulation's and the condition's, five join others."""
    torch.compiler.reset()
    graphs = []

    def backend(graph: torch.fx.GraphModule, inputs: list[torch.Tensor]) -> object:
        graphs.append([str(node.target) for node in graph.graph.nodes if node.op == "call_function"])
        return graph.forward

    model = BLIP3oDiTModel(tiny_config())
    randomize(model)
    model.dit.layers = model.dit.layers[:1]
    inputs = torch.randn(2, 9, 8), torch.rand(2), torch.randn(2, 9, 12)
    with torch.autocast("cpu", torch.bfloat16, enabled=training), torch.set_grad_enabled(training):
        expected = model(*inputs) if training else model.generate(inputs[2], num_inference_steps=1)
        monkeypatch.setattr(NextDiTBlock, "compile", lambda self: nn.Module.compile(self, backend=backend))
        model.dit.compile_blocks()
        found = model(*inputs) if training else model.generate(inputs[2], num_inference_steps=1)
    torch.testing.assert_close(found, expected, rtol=2e-2, atol=2e-2)
    (targets,) = graphs
    assert sum("linear" in name or "joint_product" in name for name in targets) == products, targets


def test_the_full_network_is_one_compiled_function(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.compiler.reset()
    graphs, compile = [], torch.compile

    def backend(graph: torch.fx.GraphModule, inputs: list[torch.Tensor]) -> object:
        graphs.append(graph)
        return graph.forward

    model = BLIP3oDiTModel(tiny_config()).train()
    randomize(model)
    expected = gradients(model)
    monkeypatch.setattr(torch, "compile", lambda function: compile(function, backend=backend, fullgraph=True))
    model.dit.compile_forward()
    check_close(gradients(model), expected)
    assert len(graphs) == 1


# Health


def test_a_deferred_loss_is_looked_at_before_the_optimizer_step() -> None:
    losses = LossMonitor(deferred=True, on_spike=lambda *found: None)
    losses.add(torch.tensor(1.0), 4, {"index": [1, 2]})
    losses.add(torch.tensor(float("inf")), 4, {"index": [3, 9]})
    with pytest.raises(
        NonFiniteLossError, match=r"step 4: expected a finite loss, found inf for samples \[3, 9\]"
    ):
        losses.check()
    losses.check()


def test_a_deferred_check_stops_a_run_before_its_weights_change(
    store: EmbeddingStore, tmp_path: Path
) -> None:
    trainer = make_trainer(store, tmp_path)
    trainer.losses._deferred = True
    with torch.no_grad():
        trainer.unwrapped_model.dit.norm_out.linear_2.bias[0] = float("nan")
    before = {name: p.clone() for name, p in trainer.unwrapped_model.named_parameters()}
    with pytest.raises(NonFiniteLossError, match="step 1"):
        trainer.train()
    after = dict(trainer.unwrapped_model.named_parameters())
    assert all(torch.equal(before[n], after[n]) for n in before if "linear_2.bias" not in n)


def late(trainer: BLIP3oTrainer) -> BLIP3oTrainer:
    """The trainer looking at steps as it does on a GPU and in several processes."""
    trainer.losses._deferred = trainer._gated = True
    return trainer


class Reads(TorchDispatchMode):
    """Notes the optimizer step under way whenever a tensor other than a `HostCopy` is read, which a GPU
    would be waited for."""

    def __init__(self, trainer: BLIP3oTrainer, monkeypatch: pytest.MonkeyPatch) -> None:
        super().__init__()
        self.steps: list[int] = []
        self._trainer = trainer
        copies: list[torch.Tensor] = []  # kept, so that no other tensor gets their place in memory
        plain = HostCopy.read

        def read(copy: HostCopy) -> torch.Tensor:
            copies.append(plain(copy).clone())
            return copies[-1]

        monkeypatch.setattr(HostCopy, "read", read)
        self._copies = copies

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        reading = func in (torch.ops.aten._local_scalar_dense.default, torch.ops.aten.equal.default)
        if reading and args[0].data_ptr() not in {copy.data_ptr() for copy in self._copies}:
            self.steps.append(self._trainer.state.global_step + 1)
        return func(*args, **(kwargs or {}))


def test_no_step_waits_for_the_device(
    store: EmbeddingStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trainer = late(make_trainer(store, tmp_path, max_steps=6, logging_steps=6, eval_samples=0))
    trainer.train_dataset.source.fetch(range(48))  # shards are checked when they are opened
    with Reads(trainer, monkeypatch) as reads:
        trainer.train()
    assert trainer.state.global_step == 6
    assert not set(range(2, 6)) & set(reads.steps)
    assert set(reads.steps) & {6, 7}  # the log line, the evaluation and the checkpoint at the end


@pytest.mark.parametrize("fault", ["loss", "gradient"])
@pytest.mark.parametrize("accumulation", [1, 2])
def test_a_step_looked_at_later_changes_no_weight(
    store: EmbeddingStore, tmp_path: Path, fault: str, accumulation: int
) -> None:
    changes = dict(batch_size=8 // accumulation, gradient_accumulation_steps=accumulation, logging_steps=100)
    trainer = late(make_trainer(store, tmp_path, max_steps=6, **changes))
    before: dict[str, torch.Tensor] = {}
    faulty: list[dict[str, Any]] = []
    compute_loss = trainer.compute_loss

    def with_a_fault(model: nn.Module, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
        if trainer.state.global_step == 2:
            before.update(
                {name: p.detach().clone() for name, p in trainer.unwrapped_model.named_parameters()}
            )
            faulty.append(inputs)
            if fault == "loss" and len(faulty) == accumulation:
                inputs["noise"][0, 0, 0] = torch.nan
        return compute_loss(model, inputs, *args, **kwargs)

    def with_a_bad_gradient(gradient: torch.Tensor) -> torch.Tensor:
        return gradient * (torch.nan if fault == "gradient" and trainer.state.global_step == 2 else 1.0)

    trainer.compute_loss = with_a_fault  # type: ignore[method-assign]
    trainer.unwrapped_model.dit.norm_out.linear_2.bias.register_hook(with_a_bad_gradient)
    with pytest.raises(NonFiniteLossError, match=rf"step 3: expected (a )?finite {fault}"):
        trainer.train()
    assert trainer.state.global_step == 3  # in the next step
    assert len(before) > 10
    for name, parameter in trainer.unwrapped_model.named_parameters():
        assert torch.equal(before[name], parameter), name
    found = json.loads((tmp_path / "diagnosis.json").read_text())
    assert found["step"] == 3 and not found["weights"]
    samples = [index for inputs in faulty for index in inputs["index"]]
    if fault == "loss":  # of one micro-batch, the last one
        samples = samples[-len(faulty[-1]["index"]) :]
    assert [sample["index"] for sample in found["samples"]] == samples
    bad = [entry["name"] for entry in found["gradients"]]
    assert "dit.norm_out.linear_2.bias" in bad and (len(bad) == 1) == (fault == "gradient")


@pytest.mark.parametrize("moment", [dict(logging_steps=3), dict(save_steps=3), dict(eval_steps=3), {}])
def test_a_step_is_looked_at_before_it_is_logged_measured_or_saved(
    store: EmbeddingStore, tmp_path: Path, moment: dict[str, int]
) -> None:
    intervals = dict(logging_steps=100, save_steps=100, eval_steps=100, eval_samples=0) | moment
    trainer = late(make_trainer(store, tmp_path, max_steps=6 if moment else 3, **intervals))
    trainer.unwrapped_model.dit.norm_out.linear_2.bias.register_hook(
        lambda gradient: gradient * (torch.nan if trainer.state.global_step == 2 else 1.0)
    )
    with pytest.raises(NonFiniteLossError, match="step 3"):
        trainer.train()
    assert trainer.state.global_step == 3
    assert not trainer.state.log_history and not list(tmp_path.glob("checkpoint-*"))


def test_a_step_that_the_loss_scaler_skips_moves_neither_schedule_nor_averages(
    store: EmbeddingStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """float16's scaler, which needs no GPU itself."""
    changes = dict(max_steps=4, logging_steps=1, lr_scheduler_type="linear", eval_samples=0)
    trainer = make_trainer(store, tmp_path, **changes)
    scaler = torch.amp.GradScaler("cpu", init_scale=8.0)
    trainer.accelerator.scaler = scaler
    monkeypatch.setattr(
        trainer.accelerator, "unscale_gradients", lambda: scaler.unscale_(trainer.optimizer.optimizer)
    )
    trainer.unwrapped_model.dit.norm_out.linear_2.bias.register_hook(
        lambda gradient: gradient * (torch.inf if trainer.state.global_step == 1 else 1.0)
    )
    states: list[tuple[float, dict[str, torch.Tensor], dict[str, torch.Tensor]]] = []

    class Note(TrainerCallback):
        def on_step_end(self, *args: Any, **kwargs: Any) -> None:
            assert trainer.ema is not None
            weights = {name: p.detach().clone() for name, p in trainer.unwrapped_model.named_parameters()}
            averages = {name: value.clone() for name, value in trainer.ema.weights.items()}
            states.append((trainer.optimizer.param_groups[0]["lr"], weights, averages))

    trainer.add_callback(Note())
    trainer.train()
    (first, *kept), (second, *skipped), (third, *moved), _ = states
    assert all(same(a, b) for a, b in zip(kept, skipped, strict=True))
    assert not any(same(a, b) for a, b in zip(kept, moved, strict=True))
    assert first == second == pytest.approx(0.75e-3) and third == pytest.approx(0.5e-3)
    norms = [entry["grad_norm"] for entry in trainer.state.log_history if "grad_norm" in entry]
    assert norms[1] is None and all(norms[i] > 0 for i in (0, 2, 3))
    assert scaler.get_scale() == 4.0


# Speed in the log


def test_counted_operations_are_those_of_the_matrix_products() -> None:
    config = tiny_config(num_kv_heads=1, input_size=4)
    model = BLIP3oDiTModel(config).eval()
    x, condition = torch.randn(3, 16, 8), torch.randn(3, 5, 12)
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        model(x, torch.rand(3), condition)
    counted = counter.get_total_flops()
    # torch counts no attention on the CPU, and does count what embeds the time: products per sample.
    attention = 2 * 4 * 16 * (16 + 5) * 48
    time_embedding = 2 * (256 * 48 + 3 * 48 * 48)
    assert counted == 3 * (forward_flops(config, 5) - attention + time_embedding)


def test_a_gpu_waits_for_data_while_it_stands_still(monkeypatch: pytest.MonkeyPatch) -> None:
    """What an event notes is when the GPU comes to it, which may be long after the loop has passed."""
    now, busy_until = [0.0], [0.0]

    class Event:
        def __init__(self, enable_timing: bool) -> None:
            assert enable_timing

        def record(self) -> None:
            self.at = max(now[0], busy_until[0])

        def elapsed_time(self, end: Event) -> float:
            return 1000 * (end.at - self.at)

        def synchronize(self) -> None:
            now[0] = max(now[0], self.at)

    monkeypatch.setattr(time, "perf_counter", lambda: now[0])
    monkeypatch.setattr(torch.cuda, "Event", Event)
    throughput = Throughput(1.0, 1.0, on_gpu=True)
    for work, fetching in ((0.0, 1.0), (3.0, 2.0), (3.0, 5.0)):  # seconds: all of one, none, 1 of the last
        busy_until[0] = max(now[0], busy_until[0]) + work
        with throughput.waiting():
            now[0] += fetching
    assert throughput.pop()["data_wait"] == pytest.approx(2.0 / 8.0)


def test_throughput_counts_samples_waiting_and_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [100.0]
    monkeypatch.setattr(time, "perf_counter", lambda: now[0])
    throughput = Throughput(flops_per_sample=10.0, rate=100.0)

    def let(seconds: float) -> None:
        now[0] += seconds

    throughput.count(8)
    let(3.0)
    with throughput.waiting():
        let(1.0)
    with throughput.pause(), throughput.pause():
        let(50.0)
    throughput.count(8)
    assert throughput.pop(processes=2) == {
        "samples_per_second": 8.0,
        "seconds_per_step": pytest.approx(4.0),
        "mfu": pytest.approx(0.4),
        "data_wait": pytest.approx(0.25),
    }
    throughput.count(1)
    let(1.0)
    assert throughput.pop()["samples_per_second"] == 1.0
    with throughput.pause():  # as the Trainer logs, measures and saves after a step
        throughput.count(1)
        let(7.0)
        throughput.pop()
        let(20.0)
    throughput.count(1)
    let(2.0)
    assert throughput.pop()["samples_per_second"] == 0.5


def test_r2_of_the_one_call_estimate() -> None:
    loss_fn = BLIP3oFlowMatchingLoss(prediction_type="sample")
    x_1, noise, error, mean = torch.randn(4, 8, 3, 5)
    metrics, source = TrainingMetrics(), AffineSource(None, None)
    for rows in (slice(0, 4), slice(4, 8)):
        sample = loss_fn.path.sample(x_1[rows], noise[rows], torch.rand(4).clamp(0.1, 0.9))
        prediction = x_1[rows] + error[rows]
        metrics.add(loss_fn, sample, source, prediction, loss_fn(prediction, sample), mean[0, 0])
    old = metrics.state
    assert old is not None
    logged = TrainingMetrics.log_entries(metrics.pop())  # type: ignore[arg-type]
    assert logged["r2"] == pytest.approx(
        1.0 - float(error.square().sum() / (x_1 - mean[0, 0]).square().sum()), abs=1e-5
    )
    # A checkpoint that was written before there was an R2: all else goes on, also into the next checkpoint.
    older = (old[0][:-2], old[1])
    metrics.restore(older, torch.device("cpu"))
    assert metrics.state == older
    again = TrainingMetrics.log_entries(metrics.pop())  # type: ignore[arg-type]
    assert math.isnan(again["r2"]) and again["l2_distance"] == pytest.approx(logged["l2_distance"])


def test_matmul_rate_is_that_of_a_product() -> None:
    rate = matmul_rate(tiny_config(), 4, torch.device("cpu"), torch.float32)
    assert 1e6 < rate < 1e15


def test_the_log_says_how_fast_training_was(store: EmbeddingStore, tmp_path: Path) -> None:
    trainer = make_trainer(store, tmp_path, max_steps=4, logging_steps=2)
    trainer.train()
    lines = [entry for entry in trainer.state.log_history if "loss" in entry]
    assert len(lines) == 2
    for entry in lines:
        assert 1 < entry["samples_per_second"] < 1e5
        assert 0 < entry["mfu"] < 1 and 0 <= entry["data_wait"] < 1
