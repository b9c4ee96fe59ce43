"""From a `TrainingConfig` to Hugging Face's `TrainingArguments`: optimizer, device, precision."""

from __future__ import annotations

import importlib.util
import os
from typing import Any

import torch
from transformers import TrainingArguments

from blip3o_dit.training import fsdp
from blip3o_dit.training.config import LOWER_IS_BETTER, TrainingConfig, launcher_precision
from blip3o_dit.training.loggers import loggers
from blip3o_dit.training.muon import check_muon
from blip3o_dit.utils.distributed import check_launch, meet_again
from blip3o_dit.utils.validation import check_compiler, package_missing

# How long the other processes wait for the first one, which fits the source; also how long it takes until a
# process that hangs is given up.
MAX_FIT_SECONDS = 2 * 3600


def training_arguments(config: TrainingConfig, *, evaluate: bool) -> TrainingArguments:
    """Hugging Face's arguments for this run, refused (ValueError) for another launcher or no GPU."""
    on_cpu = use_cpu(config)
    optimizer, optimizer_arguments = _optimizer(config)
    meet_again(on_cpu=on_cpu, timeout=MAX_FIT_SECONDS)
    arguments = TrainingArguments(
        output_dir=config.output_dir,
        num_train_epochs=_number(config, "num_epochs"),
        max_steps=config.extended_to or config.max_steps,
        per_device_train_batch_size=config.batch_size,
        per_device_eval_batch_size=config.eval_batch_size,
        gradient_accumulation_steps=config.gradient_accumulation_steps,
        learning_rate=config.learning_rate,
        weight_decay=config.weight_decay,
        warmup_steps=_number(config, "warmup_steps"),
        lr_scheduler_type=config.lr_scheduler_type,
        max_grad_norm=config.max_grad_norm,
        bf16=config.bf16 and config.memory == "default",  # in others the weights are bfloat16 already
        optim=optimizer,
        optim_args=optimizer_arguments,
        fp16=config.fp16,
        use_cpu=on_cpu,
        seed=config.seed,
        logging_steps=_number(config, "logging_steps"),
        logging_nan_inf_filter=False,
        save_strategy="steps",
        save_steps=_number(config, "save_steps"),
        save_total_limit=config.save_total_limit,
        eval_strategy="steps" if evaluate else "no",
        eval_steps=_number(config, "eval_steps"),
        metric_for_best_model=(config.best_metric or "loss") if evaluate else None,
        greater_is_better=config.best_metric not in (None, *LOWER_IS_BETTER),
        dataloader_num_workers=_number(config, "num_workers"),
        remove_unused_columns=False,
        ddp_find_unused_parameters=False,
        ddp_broadcast_buffers=False,  # statistics and source, which all processes have and nothing changes
        # The others wait while the first process fits statistics and source.
        ddp_timeout=MAX_FIT_SECONDS,
        report_to=loggers(config) or "none",
        run_name=config.wandb_run_name,
        disable_tqdm=False,
    )
    # Without a launcher the Trainer would spread one process over all GPUs (DataParallel); use one.
    arguments._n_gpu = min(1, arguments.n_gpu)
    check_launch(arguments.world_size)
    if config.cuda_graphs and (on_cpu or arguments.world_size > 1):
        raise ValueError(
            "--cuda_graphs: expected one process on a GPU, found "
            + (f"{arguments.world_size} processes" if arguments.world_size > 1 else "a CPU")
        )
    if config.memory == "split" and (arguments.world_size > 1 or fsdp.asked_for()):
        found = "FSDP" if fsdp.asked_for() else f"{arguments.world_size} processes"
        raise ValueError(f"--memory split: expected one process without FSDP, found {found}")
    if config.async_checkpoints and fsdp.asked_for():
        raise ValueError("--async_checkpoints: expected a run without FSDP, found one with it")
    if config.auto_micro_batch and fsdp.asked_for():
        raise ValueError("--auto_micro_batch: expected a run without FSDP, found one with it")
    asked = launcher_precision()
    if any(not getattr(config, name) for name in asked):
        raise ValueError(
            f"ACCELERATE_MIXED_PRECISION: the launcher asks for {', '.join(asked)}, the run is configured "
            "otherwise: give the same precision to both"
        )
    return arguments


def _number(config: TrainingConfig, name: str) -> Any:
    """A setting that follows from the data where it was not given."""
    value = getattr(config, name)
    assert value is not None, f"{name}: expected with_lengths to come first"
    return value


def _optimizer(config: TrainingConfig) -> tuple[str, str | None]:
    """Which AdamW, and its settings. Raises ValueError when the 8-bit one is not installed."""
    if config.memory != "low":
        return "adamw_torch_fused", None
    if not importlib.util.find_spec("torchao"):
        raise package_missing("--memory low", "torchao")
    # Rounding to the nearest bfloat16 would lose most of the updates: they are smaller than half a step.
    return "adamw_torch_8bit", "bf16_stochastic_round=True"


# cuBLAS's workspaces with which its products are the same in every run, by its documentation; and ways in
# which NCCL adds up gradients: by default it chooses one by what it finds when it starts.
CUBLAS_WORKSPACES = (":4096:8", ":16:8")
NCCL_ALGORITHMS = ("Ring", "Tree")


def make_deterministic() -> None:
    """From here on only kernels that give the same bits in every run; one that has no such form raises.

    Torch then takes attention whose backward pass adds in one order, and none of cuDNN's. cuBLAS reads its
    variable when its first handle is made, NCCL when processes join: call this before anything runs on a GPU.

    Raises:
        ValueError: when a variable is set to what is not deterministic.
    """
    for name, accepted in (("CUBLAS_WORKSPACE_CONFIG", CUBLAS_WORKSPACES), ("NCCL_ALGO", NCCL_ALGORITHMS)):
        found = os.environ.setdefault(name, accepted[0])
        if found not in accepted:
            expected = " or ".join(accepted)
            raise ValueError(f"--deterministic: {name}: expected {expected} or nothing, found {found!r}")
    torch.backends.cudnn.benchmark = False
    torch.use_deterministic_algorithms(True)
    # Nothing here reads memory before it is written; filling it would be a launch for each tensor.
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]


def use_cpu(config: TrainingConfig) -> bool:
    """Whether to train on the CPU. Raises ValueError for settings that need a GPU when there is none."""
    has_gpu = torch.cuda.is_available()
    if config.device == "cuda" and not has_gpu:
        raise ValueError("--device cuda: expected a CUDA GPU, found none")
    on_cpu = config.device == "cpu" or not has_gpu
    if config.fp16 and on_cpu:
        raise ValueError(
            "--fp16: expected a GPU, found none: float16 training does not work on the CPU; use --bf16 there"
        )
    check_muon(config.optimizer)
    device = torch.device("cpu" if on_cpu else "cuda")
    if config.compile:
        check_compiler("--compile", device)
    if config.memory == "low":  # torchao's optimizers are compiled
        check_compiler("--memory low", device)
    return on_cpu
