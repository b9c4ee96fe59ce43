"""What a run takes of memory, said before it is taken, and where freed memory goes."""

from __future__ import annotations

import ctypes
import os
import platform
import re
from dataclasses import dataclass
from pathlib import Path

import psutil
import torch

from blip3o_dit.model.blip3o_dit import BLIP3oDiTModel
from blip3o_dit.model.config import BLIP3oDiTConfig
from blip3o_dit.model.layers import has_native_matmul
from blip3o_dit.training import fsdp
from blip3o_dit.training.config import TrainingConfig
from blip3o_dit.training.muon import block_matrices
from blip3o_dit.utils.validation import triton_works

GIB = 2**30
FLOAT32 = 4

# What AdamW keeps per weight: two float32 numbers, or two of one byte with a float32 scale for each 256.
ADAMW, ADAMW_8BIT = 2 * FLOAT32, 2 * (1 + FLOAT32 / 256)

# What a program that is ready to build its network still loads: parts of the Trainer, curves, a batch.
PROGRAM_GROWS = 48 * 2**20

_M_MMAP_THRESHOLD = -3  # malloc.h
_LARGE = 4 * 2**20


@dataclass(frozen=True, kw_only=True)
class Room:
    """Bytes that one process can have, and where."""

    size: int
    where: str


@dataclass(frozen=True, kw_only=True)
class Forecast:
    """Bytes that one process takes, by what they are for.

    Args:
        program: what the process has resident before anything is built; 0 on a GPU.
        teacher: weights that are read and never change, in distillation.
        copies: weights in the arithmetic's narrower dtype, kept from the forward to the backward pass.
        activations: all that the forward pass keeps for the backward pass.
        working: of the backward pass in one block, which it computes again first with checkpointing.
        gradients_wait: gradients are there when a forward pass begins, as between accumulated batches.
        fragmentation: of what comes and goes, the share that is kept beside it, in freed pieces that are too
            small for what is asked for next.
    """

    program: int = 0
    teacher: int = 0
    weights: int = 0
    averages: int = 0
    optimizer: int = 0
    gradients: int = 0
    copies: int = 0
    activations: int = 0
    working: int = 0
    gradients_wait: bool = False
    fragmentation: float = 0.0

    @property
    def total(self) -> int:
        """At the largest moment of a step."""
        lasting = self.program + self.teacher + self.weights + self.averages + self.optimizer
        return lasting + self._coming_and_going + self.fragments

    @property
    def fragments(self) -> int:
        return int(self.fragmentation * self._coming_and_going)

    @property
    def _coming_and_going(self) -> int:
        """The backward pass begins with all activations and no gradients, and ends with all gradients and
        hardly any activations: in between they change places."""
        moving = self.activations + self.copies
        both = moving + self.gradients if self.gradients_wait else max(moving, self.gradients)
        return both + self.working

    def table(self, room: Room) -> str:
        """One line per part, in GiB, and what there is."""
        parts = {
            "program and libraries": self.program,
            "teacher": self.teacher,
            "weights": self.weights,
            "averaged weights": self.averages,
            "optimizer": self.optimizer,
            "gradients": self.gradients,
            "weights in the arithmetic's dtype": self.copies,
            "activations": self.activations,
            "backward pass of one block": self.working,
            "freed memory in pieces": self.fragments,
        }
        rows = {name: size for name, size in parts.items() if size}
        rows["at most together"] = self.total
        rows[f"there is, {room.where}"] = room.size
        return "\n".join(f"  {name:<48}{size / GIB:9.3f} GiB" for name, size in rows.items())


def forecast(
    config: TrainingConfig, model: BLIP3oDiTConfig, device: torch.device, *, processes: int = 1
) -> Forecast:
    """What one of `processes` takes to train this network, without building it."""
    weights, matrices = count_weights(model)
    narrow = config.memory != "default"
    stored, compute = 2 if narrow else FLOAT32, _compute_bytes(config, device)
    remainder = 2 if config.memory == "split" else 0
    keeps = Activations(model, config.batch_size, model.num_tokens, compute, device)
    recompute, selective = model.gradient_checkpointing, config.selective_checkpointing
    in_parts = model.num_layers if recompute else 1  # one block's at a time
    sharded = fsdp.asked_for()
    share = processes if sharded else 1
    # DistributedDataParallel sends gradients in buckets, which are a second copy of them.
    copies_of_gradients = 2 if processes > 1 and not sharded else 1
    return Forecast(
        program=resident() + PROGRAM_GROWS if device.type == "cpu" else 0,
        weights=(stored + remainder) * weights // share,
        averages=FLOAT32 * weights // share if config.ema_decay else 0,
        optimizer=optimizer_bytes(config, model) // share,
        gradients=stored * weights * copies_of_gradients // share,
        copies=compute * matrices // in_parts if compute < stored else 0,
        activations=keeps.ends() + model.num_layers * keeps.kept_of_block(recompute, selective),
        working=keeps.working(recompute) + _scratch(model, narrow, compute, device),
        gradients_wait=config.gradient_accumulation_steps > 1,
        fragmentation=0.0 if narrow else _fragmentation(device),
    )


def distillation_forecast(
    model: BLIP3oDiTConfig, device: torch.device, *, batch: int, targets: int, averages: bool
) -> Forecast:
    """What teaching a student takes: two networks in float32, one of which learns all `targets` at once."""
    weights, _ = count_weights(model)
    keeps = Activations(model, batch * targets, model.num_tokens, FLOAT32, device)
    kept = keeps.kept_of_block(model.gradient_checkpointing, False)
    return Forecast(
        program=resident() + PROGRAM_GROWS if device.type == "cpu" else 0,
        teacher=FLOAT32 * weights,
        weights=FLOAT32 * weights,
        averages=FLOAT32 * weights if averages else 0,
        optimizer=ADAMW * weights,
        gradients=FLOAT32 * weights,
        activations=keeps.ends() + model.num_layers * kept,
        working=keeps.working(model.gradient_checkpointing),
        fragmentation=_fragmentation(device),
    )


@dataclass(frozen=True)
class Activations:
    """Bytes that a forward pass keeps for its backward pass, counted from `transformer.py`.

    d = model_dim, kv = width of keys or values, ffn = inner width of SwiGLU; `bytes_each` is that of a number
    of the arithmetic, 4 or 2.
    """

    config: BLIP3oDiTConfig
    batch: int
    condition_tokens: int
    bytes_each: int
    device: torch.device

    def block(self) -> int:
        """All that one block keeps.

        For a target token
            d:   input and input of the second half, in float32                                            (2)
            d:   norm1; queries of both attentions, each before its norm and rotated; both attentions'
                 results, their sum; to_out; ffn_norm1; SwiGLU's result                                   (11)
            kv:  keys before their norm and rotated, values                                                (3)
            ffn: gate, silu(gate), up, their product                                                       (4)
        for a condition token
            d:   norm1_context                                                                             (1)
            kv:  keys before and after their norm, values                                                  (3)
        and for a sample the four modulations and six factors of norms                              (10 d).
        """
        d, kv, ffn = self.config.model_dim, self.config.kv_dim, self.config.ffn_dim or 0
        fused = self.device.type == "cuda" and self.bytes_each == 2 and triton_works()
        norm_bytes = 0 if fused else _norm_bytes(self.bytes_each, self.device)
        target = 2 * d * (FLOAT32 + (0 if fused else _norm_bytes(FLOAT32, self.device)))
        target += (11 * d + 3 * kv + (3 if fused else 4) * ffn) * self.bytes_each + 2 * d * norm_bytes
        condition = (d + 3 * kv) * self.bytes_each + d * norm_bytes
        sample = 10 * d * self.bytes_each
        return self.batch * (self.config.num_tokens * target + self.condition_tokens * condition + sample)

    def kept_of_block(self, recompute: bool, selective: bool) -> int:
        """What one block keeps: all, its input, or with selective checkpointing also products and attention.

        These are for a target token q, k, v, the second q, to_out, gate, up and SwiGLU's result, and both
        attentions' results; for a condition token k and v; for a sample the modulations.
        """
        d, kv, ffn = self.config.model_dim, self.config.kv_dim, self.config.ffn_dim or 0
        if not recompute:
            return self.block()
        kept = 0
        if selective:
            target = 6 * d + 2 * kv + 2 * ffn
            kept = self.config.num_tokens * target + self.condition_tokens * 2 * kv + 4 * d
        return self.batch * (kept * self.bytes_each + self.config.num_tokens * d * FLOAT32)

    def ends(self) -> int:
        """Before and after the blocks.

        In the arithmetic's dtype: the condition, its projection's three results. In float32: input, norm and
        result of the head; condition, its features for the source; target, noise, x_t, R(c), a predicted s,
        what is compared and what is reported of it.
        """
        config = self.config
        d, condition_dim, target_dim = config.model_dim, config.eva_embedding_size, config.in_channels
        condition = self.bytes_each * (condition_dim + 3 * d) + FLOAT32 * 2 * condition_dim
        target = FLOAT32 * (3 * d + (10 + config.flow.predicts_spread) * target_dim)
        return self.batch * (self.condition_tokens * condition + config.num_tokens * target)

    def working(self, recompute: bool) -> int:
        """Gradients to SwiGLU's inner numbers and to some of d; the block itself where it is recomputed."""
        inner = 4 * (self.config.ffn_dim or 0) + 6 * self.config.model_dim
        of_gradients = self.batch * self.config.num_tokens * inner * self.bytes_each
        return of_gradients + (self.block() if recompute else 0)


def count_weights(model: BLIP3oDiTConfig) -> tuple[int, int]:
    """(all weights, those in matrices) of a network, which is not built."""
    with torch.device("meta"):
        parameters = list(BLIP3oDiTModel(model).parameters())
    return sum(p.numel() for p in parameters), sum(p.numel() for p in parameters if p.ndim == 2)


def optimizer_bytes(config: TrainingConfig, model: BLIP3oDiTConfig) -> int:
    """The optimizer's state: two moments a weight, of a matrix that Muon trains one."""
    weights, _ = count_weights(model)
    if config.optimizer == "muon":
        with torch.device("meta"):
            matrices = sum(matrix.numel() for matrix in block_matrices(BLIP3oDiTModel(model)))
        return ADAMW * weights - FLOAT32 * matrices
    if config.memory == "low":
        return int(ADAMW_8BIT * weights)
    return ADAMW * weights // (2 if config.moments == "bfloat16" else 1)


def _compute_bytes(config: TrainingConfig, device: torch.device) -> int:
    """Bytes of a number of the arithmetic: weights in bfloat16 are widened where that is emulated."""
    if config.memory != "default":
        return 2 if has_native_matmul(torch.bfloat16, device) else FLOAT32
    return 2 if config.bf16 or config.fp16 else FLOAT32


def _norm_bytes(compute: int, device: torch.device) -> int:
    """What an RMSNorm keeps beside its input: on a GPU its result before the factor, on a CPU nothing in
    float32 (it has a function of its own) and a float32 copy of its input in narrower types."""
    if device.type != "cpu":
        return compute
    return 0 if compute == FLOAT32 else FLOAT32


def _fragmentation(device: torch.device) -> float:
    """Of glibc's malloc, unless `return_freed_memory` was called: 0.2 to 0.6 at widths of 384 to 1792."""
    return 0.3 if device.type == "cpu" else 0.0


def _scratch(model: BLIP3oDiTConfig, narrow: bool, compute: int, device: torch.device) -> int:
    """The largest weight in float32, for its product where bfloat16 is not multiplied."""
    if not narrow or compute != FLOAT32 or device.type != "cpu":
        return 0
    return FLOAT32 * (model.ffn_dim or 0) * model.model_dim


def check_room(needed: Forecast, room: Room, ways_out: str) -> None:
    """Raises ValueError, with the numbers and what would make it fit, when `needed` is more than there is."""
    if needed.total > room.size:
        names = ("weights", "gradients", "optimizer", "averages", "teacher", "activations")
        sizes = {name: getattr(needed, name) for name in names}
        largest = ", ".join(f"{name} {size / GIB:.1f}" for name, size in sizes.items() if size)
        raise ValueError(
            f"memory: expected at most {room.size / GIB:.1f} GiB ({room.where}), found a run that takes "
            f"{needed.total / GIB:.1f} GiB: {largest}; {ways_out}"
        )


def ways_to_fit(config: TrainingConfig) -> str:
    """The flags that this run could still take to need less."""
    flags = {
        "--memory low": config.memory != "low",
        "--gradient_checkpointing": not config.gradient_checkpointing,
        "--ema_decay 0": config.ema_decay > 0,
        "a smaller --batch_size (with --gradient_accumulation_steps)": config.batch_size > 1,
        "a smaller network (--model_dim, --num_layers)": True,
    }
    return "less is taken with " + ", ".join(flag for flag, helps in flags.items() if helps)


def room_on(device: torch.device) -> Room:
    """What this process can have on a device: of a GPU's memory or of the machine's, its part."""
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        mine = torch.cuda.memory_reserved(device)
        return Room(size=free + mine, where=f"free on {torch.cuda.get_device_name(device)}")
    here = max(1, int(os.environ.get("LOCAL_WORLD_SIZE", "1")))
    free, where = min(_free_of_machine(), *_free_of_groups(), key=lambda found: found[0])
    shared = f", shared by {here} processes" if here > 1 else ""
    return Room(size=resident() + free // here, where=where + shared)


def memory_of(gpu: torch.device) -> int:
    """Bytes of a GPU's memory, whoever uses them."""
    return torch.cuda.get_device_properties(gpu).total_memory


def resident() -> int:
    """Bytes that this process has in memory now."""
    return psutil.Process().memory_info().rss


def _free_of_machine() -> tuple[int, str]:
    return psutil.virtual_memory().available, "free on this machine"


# A control group's files, version 2 and 1: its limit, what it uses, and what of that can be dropped.
_GROUP_FILES = (
    ("memory.max", "memory.current", "inactive_file"),
    ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"),
)


def _free_of_groups(
    membership: Path = Path("/proc/self/cgroup"), root: Path = Path("/sys/fs/cgroup")
) -> list[tuple[int, str]]:
    """What the limits of this process's control groups leave, theirs and those of the groups around them."""
    found = [(2**63, "no limit")]
    try:
        lines = membership.read_text().splitlines()
    except OSError:
        return found
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if controllers and "memory" not in controllers.split(","):
            continue
        top = root / "memory" if controllers else root
        group = top / path.strip("/")
        # Inside a container the group's own path may not be there, and its files lie at the top.
        for folder in dict.fromkeys([group, *group.parents, top]):
            if folder.is_relative_to(top):
                found += _free_of_group(folder)
    return found


def _free_of_group(folder: Path) -> list[tuple[int, str]]:
    for limit_file, usage_file, droppable in _GROUP_FILES:
        try:
            limit = (folder / limit_file).read_text().strip()
            usage = int((folder / usage_file).read_text())
            statistics = (folder / "memory.stat").read_text()
        except OSError:
            continue
        if not limit.isdigit() or int(limit) >= 2**60:  # "max", or version 1's largest number
            continue
        files = re.search(rf"^{droppable} (\d+)", statistics, re.MULTILINE)
        free = int(limit) - usage + (int(files[1]) if files else 0)
        return [(max(0, free), f"left of the {int(limit) / GIB:.1f} GiB this process is limited to")]
    return []


def return_freed_memory() -> bool:
    """Have glibc give blocks of 4 MiB and more back to the system as soon as they are freed.

    By default it learns to keep blocks of up to 32 MiB for later, which a training step, whose tensors come
    and go in every size, can leave it holding in pieces that nothing else fits into: a step of four blocks at
    the default width then takes 3.6 GiB instead of 2.5. Returns whether this system's malloc is glibc's.
    """
    if platform.libc_ver()[0] != "glibc":
        return False
    return bool(ctypes.CDLL(None).mallopt(_M_MMAP_THRESHOLD, _LARGE))
