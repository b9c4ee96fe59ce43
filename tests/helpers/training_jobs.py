"""What the tests of several processes do in each of them; the same functions run in one process."""

from __future__ import annotations

import os
import signal
import threading
from pathlib import Path
from typing import Any

import torch
import torch.distributed
import torch.nn.functional as F
from accelerate.state import AcceleratorState, PartialState
from accelerate.utils import DistributedType, FullyShardedDataParallelPlugin
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.fsdp import fully_shard

from blip3o_dit.data.store import EmbeddingStore
from blip3o_dit.evaluation.config import EvaluationConfig
from blip3o_dit.evaluation.evaluate import evaluate_models
from blip3o_dit.flow.path import FlowBatch
from blip3o_dit.inference.pipeline import BLIP3oInference
from blip3o_dit.model import transformer
from blip3o_dit.model.blip3o_dit import BLIP3oDiTModel
from blip3o_dit.model.layers import BFLOAT16_VARIABLE
from blip3o_dit.training import heartbeat
from blip3o_dit.training.anomalies import NonFiniteLossError
from blip3o_dit.training.config import TrainingConfig
from blip3o_dit.training.ema import ExponentialMovingAverage
from blip3o_dit.training.fsdp import check_sharding, keep_the_dtype_rule, let_generate
from blip3o_dit.training.run import build_trainer, train
from blip3o_dit.training.trainer import BLIP3oTrainer
from blip3o_dit.utils.distributed import join_processes
from blip3o_dit.utils.errors import StoppedEarly
from tests.conftest import randomize, tiny_config
from tests.helpers.training import tiny_training

torch.set_num_threads(1)

# Of 90 samples 75 to train on, 3 global batches of 32 an epoch, and 15 held out, 2 batches of 8 and 7.
CONFIG: dict[str, Any] = dict(
    model_dim=32,
    num_layers=2,
    batch_size=32,
    learning_rate=1e-3,
    eval_split=1 / 6,
    eval_batch_size=8,
    eval_samples=11,
    logging_steps=1,
    save_steps=1000,
    cfg_dropout=0.1,
)


def config_for(store: Path, output: Path, changes: dict[str, Any]) -> TrainingConfig:
    return tiny_training(store, output, **(CONFIG | changes))


def train_once(store: Path, output: Path, changes: dict[str, Any], resume: Path | None = None) -> None:
    train(config_for(store, output, changes), resume=resume)


def train_stopped(store: Path, output: Path, changes: dict[str, Any]) -> str:
    """`train_once`, where the second process alone gets a signal in its third step; how it ends."""
    plain = BLIP3oTrainer.compute_loss

    def compute_loss(self: BLIP3oTrainer, *args: Any, **kwargs: Any) -> Any:
        if os.environ["RANK"] == "1" and self.state.global_step == 2:
            os.kill(os.getpid(), signal.SIGTERM)
        return plain(self, *args, **kwargs)

    BLIP3oTrainer.compute_loss = compute_loss  # type: ignore[method-assign]
    try:
        train_once(store, output, changes)
    except StoppedEarly as error:
        return str(error)
    return "not stopped"


def train_with_a_rank_that_hangs(store: Path, output: Path, changes: dict[str, Any]) -> list[str]:
    """`train_once`, where the second process hangs in its third step until it is noticed; what is said."""
    plain, noticed, said = BLIP3oTrainer.compute_loss, threading.Event(), []

    def compute_loss(self: BLIP3oTrainer, *args: Any, **kwargs: Any) -> Any:
        if os.environ["RANK"] == "1" and self.state.global_step == 2:
            assert noticed.wait(20)
        return plain(self, *args, **kwargs)

    def go_on(line: str) -> None:
        said.append(line)
        noticed.set()

    BLIP3oTrainer.compute_loss = compute_loss  # type: ignore[method-assign]
    heartbeat.end_process = go_on
    train_once(store, output, changes)
    return said


def train_short_of_memory(store: Path, output: Path, changes: dict[str, Any], most: int) -> int:
    """`train_once`, where from the third step on the second process has no memory for passes of more samples
    than `most`; the pieces that batches were cut into."""
    plain = BLIP3oTrainer.compute_loss
    trainers: list[Any] = []

    def compute_loss(self: BLIP3oTrainer, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
        trainers.append(self)
        loss = plain(self, model, inputs, *args, **kwargs)
        if os.environ["RANK"] == "1" and self.state.global_step >= 2 and len(inputs["index"]) > most:
            raise MemoryError
        return loss

    BLIP3oTrainer.compute_loss = compute_loss  # type: ignore[method-assign]
    train_once(store, output, changes)
    return trainers[0].micro_batches.pieces


def train_with_a_fault(store: Path, output: Path, changes: dict[str, Any]) -> tuple[str, bool]:
    """`train_once`, where the loss of the second process alone is NaN in the third step; the error, and
    whether the weights are those before that step."""
    trainer = build_trainer(EmbeddingStore(store), config_for(store, output, changes))
    plain, before = trainer.compute_loss, {}

    def compute_loss(model: Any, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
        if trainer.state.global_step == 2:
            before.update(
                {name: p.detach().clone() for name, p in trainer.unwrapped_model.named_parameters()}
            )
            if os.environ["RANK"] == "1":
                inputs["noise"][0, 0, 0] = torch.nan
        return plain(model, inputs, *args, **kwargs)

    trainer.compute_loss = compute_loss  # type: ignore[method-assign]
    try:
        trainer.train()
    except NonFiniteLossError as error:
        same = [torch.equal(before[name], p) for name, p in trainer.unwrapped_model.named_parameters()]
        return str(error), len(same) > 10 and all(same)
    return "trained", False


def train_sharded(
    store: Path, output: Path, changes: dict[str, Any], resume: Path | None = None, bfloat16: str = "emulated"
) -> list[str]:
    """`train_once` with weights sharded as accelerate does it for configs/accelerate/fsdp.yaml on GPUs.

    On a CPU accelerate ignores such a configuration, so its state is set by hand before training begins.
    Returns the kinds of the trained parameters and, with `bf16`, of gathered ones and of what the network
    was given: times must be those that x_t was made with.
    """
    os.environ[BFLOAT16_VARIABLE] = bfloat16
    config = config_for(store, output, changes)
    trainer = build_trainer(EmbeddingStore(store), config, fitted=resume is not None)
    plugin = FullyShardedDataParallelPlugin(
        fsdp_version=2,
        auto_wrap_policy="transformer_based_wrap",
        transformer_cls_names_to_wrap=["NextDiTBlock"],
        state_dict_type="FULL_STATE_DICT",
        reshard_after_forward=True,
        cpu_ram_efficient_loading=False,
    )
    if config.bf16:
        plugin.set_mixed_precision("bf16")  # as accelerate does it for `mixed_precision: bf16`
    for state in (PartialState, AcceleratorState):
        state._shared_state["distributed_type"] = DistributedType.FSDP
    AcceleratorState._shared_state["fsdp_plugin"] = plugin
    check_sharding(trainer.accelerator.state)
    keep_the_dtype_rule(trainer.accelerator.state)
    trainer.is_fsdp_enabled = True
    found = _watch_dtypes(trainer) if config.bf16 else set()
    trainer.train(resume_from_checkpoint=str(resume) if resume else None)
    trainer.save_final_model()
    return sorted(found | {type(parameter).__name__ for parameter in trainer.model.parameters()})


def _watch_dtypes(trainer: BLIP3oTrainer) -> set[str]:
    """Dtypes inside the network while it trains, filled in as it does."""
    found: set[str] = set()
    times: list[torch.Tensor] = []
    plain_predict, plain_timestep = FlowBatch.predict, transformer.official_timestep

    def predict(flow_batch: FlowBatch, model: torch.nn.Module) -> torch.Tensor:
        times.append(flow_batch.sample.t)
        prediction = plain_predict(flow_batch, model)
        found.add(f"prediction {prediction.dtype}")
        return prediction

    def official_timestep(t: torch.Tensor) -> torch.Tensor:
        if torch.is_grad_enabled():
            assert torch.equal(t, times[-1])
        found.add(f"time {t.dtype}")
        return plain_timestep(t)

    def look(block: torch.nn.Module, inputs: tuple[torch.Tensor, ...], output: torch.Tensor) -> None:
        found.update({f"stream {output.dtype}", f"weight {block.attn1.to_q.weight.dtype}"})
        found.add(f"rope {inputs[3][0].dtype}")

    def look_inside(norm: torch.nn.Module, inputs: tuple[torch.Tensor], output: torch.Tensor) -> None:
        found.add(f"queries {output.dtype}")

    FlowBatch.predict = predict  # type: ignore[method-assign]
    transformer.official_timestep = official_timestep
    trainer.unwrapped_model.dit.layers[0].register_forward_hook(look)
    trainer.unwrapped_model.dit.layers[0].attn1.norm_q.register_forward_hook(look_inside)
    return found


def ask(model: Path, store: Path, output: Path) -> tuple[dict[str, Any], dict[str, float], dict[str, Any]]:
    """Generated tokens, metrics and a report."""
    inference = BLIP3oInference(model, device="cpu", dtype=torch.float32)
    generated = inference.generate_from_dataset(
        store, num_samples=21, batch_size=4, output_path=output / "generated.pkl", progress=False
    )
    metrics = inference.evaluate_model(store, batch_size=4, progress=False)
    config = EvaluationConfig(
        curve_calls=(2,),
        curve_samples=10,
        shown=0,
        device="cpu",
        batch_size=4,
        draws=3,
        draw_samples=9,
        distribution_samples=64,
        bootstrap=20,
        half_samples=4,
    )
    return generated, metrics, evaluate_models([model], store, output, config, progress=False)


def use_processes() -> tuple[Any, Any, Any, Any]:
    """Pieces in order, their sum, the first one's value, and the share of this process."""
    processes = join_processes("cpu")
    pieces = list(range(5))
    map_in_order = list(processes.map_in_order(iter(pieces), lambda piece: piece**2))
    total = processes.sum(torch.tensor([processes.rank + 1.0]))
    processes.barrier()
    return map_in_order, total.item(), processes.broadcast(processes.rank), list(processes.shard(pieces))


def shard_and_train(folder: Path, checkpointing: bool) -> None:
    """Some steps of a tiny real model under torch's own `fully_shard`; the first process saves the model.

    It also generates while it is sharded, with the averaged weights, and takes more steps with its own after.
    """
    processes = join_processes("cpu")
    model = BLIP3oDiTModel(tiny_config(gradient_checkpointing=checkpointing))
    randomize(model)
    average = ExponentialMovingAverage(model, 0.5)
    if processes.count > 1:
        for block in model.dit.blocks:
            fully_shard(block)
        fully_shard(model)
    let_generate(model)
    average.lay_out_like(model)
    losses = _steps(model, average, processes.rank, processes.count)
    with average.applied(model.eval()):
        generated = model.generate(torch.ones(2, 9, 12), num_inference_steps=2)
    losses += _steps(model, average, processes.rank, processes.count)
    options = StateDictOptions(full_state_dict=True, cpu_offload=True)
    state = get_model_state_dict(model, options=options)
    averages = average.whole_state(model, keep=processes.is_main)
    if processes.is_main:
        model.save_pretrained(folder, state_dict=state)
        model.save_pretrained(folder, state_dict=averages, variant="ema")
        torch.save({"losses": losses, "generated": generated}, folder / "found.pt")


def _steps(model: BLIP3oDiTModel, average: ExponentialMovingAverage, rank: int, count: int) -> list[float]:
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    model.train()
    losses = []
    for step in range(1, 6):
        generator = torch.Generator().manual_seed(step)
        x, target = torch.randn(2, 8, 9, 8, generator=generator)
        condition, t = torch.randn(8, 9, 12, generator=generator), torch.rand(8, generator=generator)
        mine = slice(rank * 8 // count, (rank + 1) * 8 // count)
        loss = F.mse_loss(model(x[mine], t[mine], condition[mine]), target[mine])
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        average.update(model, step)
        losses.append(loss.detach())
    means = torch.stack(losses)
    if count > 1:
        torch.distributed.all_reduce(means)
    return (means / count).tolist()
