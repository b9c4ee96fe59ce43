"""Whether a GPU computes what the CPU does: every dtype and path of a small network beside float32 there."""

from __future__ import annotations

import gc
import importlib.util
import tempfile
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import numpy as np
import torch
from safetensors.torch import load_file
from torch import Tensor
from torch.utils import deterministic

from benchmarks.measure import Row
from benchmarks.our_step import RandomEmbeddings
from blip3o_dit.data.embeddings import open_embeddings
from blip3o_dit.data.store import StoreWriter
from blip3o_dit.decoder.config import DecoderConfig, DecoderTrainingConfig
from blip3o_dit.decoder.network import TokenDecoder
from blip3o_dit.decoder.pictures import Pictures
from blip3o_dit.decoder.training import fit_decoder
from blip3o_dit.inference.pipeline import BLIP3oInference
from blip3o_dit.model.blip3o_dit import BLIP3oDiTModel
from blip3o_dit.model.config import BLIP3oDiTConfig
from blip3o_dit.model.quantization import DTYPES as QUANTIZED
from blip3o_dit.training import base_trainer
from blip3o_dit.training.arguments import make_deterministic
from blip3o_dit.training.config import LOW_MEMORY_DEFAULTS, TrainingConfig
from blip3o_dit.training.distillation import student_trainer
from blip3o_dit.training.distillation_config import DistillationConfig
from blip3o_dit.training.run import train, train_on
from blip3o_dit.training.trainer import BLIP3oTrainer
from blip3o_dit.utils.stateless_random import stateless_normal

# Largest relative distance (root mean square) from the CPU's float32.
TOLERANCE = {"float32": 1e-3, "bfloat16": 2e-2, "float16": 5e-3}


@dataclass(frozen=True)
class Training:
    """A way to train whose losses are compared, by at most `tolerance`."""

    settings: dict[str, Any]
    tolerance: float = 2e-2
    beside: dict[str, Any] = field(default_factory=dict)  # the CPU's settings, in float32
    on_cpu: bool = False  # whether a CPU can take it as well
    needs: str = ""  # a package


# A new way to train is a line here, and one in RESUMED.
TRAININGS = {
    "float32": Training({}, 1e-3, on_cpu=True),
    "bfloat16": Training({"bf16": True}, on_cpu=True),
    "bfloat16 recorded": Training({"bf16": True, "cuda_graphs": True}),
    "float16": Training({"fp16": True}),
    "bfloat16 residual stream": Training({"bf16": True, "residual": "bfloat16"}, on_cpu=True),
    "memory split": Training({"memory": "split"}, on_cpu=True),
    "memory split, recorded": Training({"memory": "split", "cuda_graphs": True}),
    "muon": Training({"bf16": True, "optimizer": "muon"}, on_cpu=True, beside={"optimizer": "muon"}),
    "memory low": Training({"memory": "low", **LOW_MEMORY_DEFAULTS}, needs="torchao"),
}

# What must continue bit for bit, by its settings beside bfloat16; a GPU's only, but for the first.
RESUMED: dict[str, dict[str, Any]] = {
    "": {},
    ", recorded": {"cuda_graphs": True},
    ", memory split": {"memory": "split", "moments": "bfloat16"},
    ", muon": {"optimizer": "muon"},
    ", checkpoints waited for": {"async_checkpoints": False},
}


@dataclass(frozen=True)
class Setup:
    """Where to check, and how large the network is that is compared."""

    device: torch.device
    width: int
    layers: int
    steps: int
    quick: bool

    def config(self, source: str = "noise", **more: Any) -> BLIP3oDiTConfig:
        flow: dict[str, Any] = {"condition_dropout": 0.1, "source": source, **more}
        if source != "noise":
            flow["prediction_type"] = "preconditioned"
        heads = self.width // 16 if self.quick else self.width // 64
        return BLIP3oDiTConfig(
            model_dim=self.width,
            num_layers=self.layers,
            num_heads=heads,
            num_kv_heads=heads if source == "noise" else heads // 2,
            in_channels=24,
            eva_embedding_size=40,
            input_size=4 if self.quick else 8,
            flow_matching=flow,
        )

    def model(self, source: str = "noise", **more: Any) -> BLIP3oDiTModel:
        """The same random weights at every call, on the CPU, without zero gates."""
        torch.manual_seed(0)
        model = BLIP3oDiTModel(self.config(source, **more))
        with torch.no_grad():
            for parameter in model.parameters():
                if not parameter.any():
                    parameter.normal_(std=0.02)
            if source != "noise":
                model.source_weight.normal_(std=0.1)
                model.source_std.fill_(0.3)
        return model.eval()

    def sizes(self) -> dict[str, Any]:
        """Of the network that is measured: the default one, or a tiny one."""
        if not self.quick:
            return {}
        data = {"in_channels": 24, "eva_embedding_size": 40, "input_size": 4}
        return {"model_dim": self.width, "num_layers": 2, "num_heads": 2, **data}

    def there(self, model: BLIP3oDiTModel, dtype: torch.dtype) -> BLIP3oDiTModel:
        return model.to(self.device, dtype)

    def dtypes(self) -> list[torch.dtype]:
        narrow = [torch.bfloat16] if self.device.type == "cpu" else [torch.bfloat16, torch.float16]
        return [torch.float32, *narrow]

    def conditions(self, batch: int) -> Tensor:
        generator = torch.Generator().manual_seed(1)
        config = self.config()
        return torch.randn(batch, config.num_tokens, config.eva_embedding_size, generator=generator)


def check_generation(setup: Setup) -> list[Row]:
    """Every dtype and way of launching, with and without guidance and an informed source."""
    rows = []
    ways = ("",) if setup.device.type == "cpu" else ("", "recorded", "compiled")  # compiling takes seconds
    for source in ("noise", "ridge"):
        for guidance in (1.0, 3.0):
            expected = _generate(setup.model(source), setup.conditions(3), guidance)
            for dtype in setup.dtypes():
                for way in ways if dtype == torch.bfloat16 else ways[:2]:
                    model = prepared(setup.there(setup.model(source), dtype), way)
                    for _ in range(3 if way else 1):  # plainly, recorded, replayed
                        found = _generate(model, setup.conditions(3), guidance)
                    what = f"generate {_name(dtype)}, {source}, guidance {guidance:g}"
                    what += f", {way}" if way else ""
                    rows.append(_compared(what, found, expected, TOLERANCE[_name(dtype)]))
    return rows


def check_recordings(setup: Setup) -> list[Row]:
    """Recorded generations with batch sizes and guidance that change and come back."""
    model = prepared(setup.there(setup.model(), torch.bfloat16), "recorded")
    plain, rows = setup.there(setup.model(), torch.bfloat16), []
    for batch, guidance in 3 * ((1, 1.0), (3, 1.0), (3, 3.0), (8, 1.0)):
        found, expected = (_generate(m, setup.conditions(batch), guidance) for m in (model, plain))
        what = f"recorded, batch {batch}, guidance {guidance:g}"
        rows.append(_compared(what, found, expected, TOLERANCE["bfloat16"]))
    return rows


def check_student(setup: Setup) -> Iterator[Row]:
    """A distilled model's one call, plainly, recorded and replayed."""
    expected = _sampled(setup.model("ridge", student_steps=1), setup.conditions(1))
    student = prepared(setup.there(setup.model("ridge", student_steps=1), torch.bfloat16), "recorded")
    for way in ("plain", "recorded", "replayed"):
        yield _compared(f"student, {way}", _sampled(student, setup.conditions(1)), expected, 2e-2)


def check_draws(setup: Setup) -> Iterator[Row]:
    """The same random numbers as on the CPU: each is within 4e-6 of the exact transform (`philox.py`)."""
    draw = partial(stateless_normal, [0, 7, 2**40], (64, 768), seed=1, stream="check", repeats=[0, 1, 2])
    distance = float((draw(device=setup.device).cpu() - draw()).abs().max())
    yield {"check": "normal numbers", "found": distance, "at most": 8e-6, "ok": distance <= 8e-6}


def check_quantized(setup: Setup) -> Iterator[Row]:
    """Weights of one byte: plainly, recorded and replayed, beside the same weights widened to float32."""
    with tempfile.TemporaryDirectory() as folder:
        setup.model("ridge").save_pretrained(folder)
        for kind in QUANTIZED:
            where, opened = setup.device.type, partial(BLIP3oInference, folder, quantize=kind, alone=True)
            expected = _generate(opened(device="cpu", dtype=torch.float32).model, setup.conditions(2))
            there = opened(device=where, dtype=torch.bfloat16)
            for _ in range(3):
                found = _generate(there.model, setup.conditions(2))
                yield _compared(f"quantize {kind}", found, expected, TOLERANCE["bfloat16"])


def check_decoder(setup: Setup) -> Iterator[Row]:
    """A decoder of 64 tokens after five steps of training, and what a step takes."""
    pixels = torch.randint(
        256, (64, 64, 64, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(1)
    )
    tokens = stateless_normal(range(64), (64, 768), seed=1, stream="decoder check")
    source: Any = SimpleNamespace(fetch=lambda rows: (None, tokens[rows]))
    sizes = DecoderConfig(num_tokens=64, channels=768, picture_size=64, width=128, num_layers=2, num_heads=4)
    found: list[Tensor] = []
    for where in (torch.device("cpu"), setup.device):
        torch.manual_seed(0)
        decoder = TokenDecoder(sizes).to(where)
        for steps in (5, 20) if where.type == "cuda" else (5,):
            started = time.monotonic()
            fit_decoder(decoder, source, Pictures(np.arange(64), pixels), DecoderTrainingConfig(steps=steps))
            if steps == 5:
                with torch.no_grad():
                    found.append(decoder.eval()(tokens[:8].to(where)).cpu())
    seconds = (time.monotonic() - started) / steps
    yield _compared("decoder", found[1], found[0], 1e-2)
    yield {"figure": "decoder, a training step, 32 pictures of 64 pixels", "seconds": seconds}


def check_devices(setup: Setup) -> list[Row]:
    """The same samples on each device by its name, whatever the current device is."""
    names = ["cpu"]
    if setup.device.type == "cuda":
        names = ["cuda", *(f"cuda:{number}" for number in range(min(2, torch.cuda.device_count())))]
    rows = []
    expected = _generate(setup.model(), setup.conditions(2))
    with tempfile.TemporaryDirectory() as folder:
        setup.model().save_pretrained(folder)
        for name in names:
            inference = BLIP3oInference(folder, device=name)
            for _ in range(2):
                found = inference.generate(setup.conditions(2), num_inference_steps=4, solver="euler")
                rows.append(
                    _compared(f"device {name}", torch.as_tensor(found), expected, TOLERANCE["bfloat16"])
                )
    return rows


def check_training(setup: Setup) -> Iterator[Row]:
    """Losses of the first steps in every precision and way of launching."""
    plain, where = _losses(setup, "cpu"), setup.device.type
    for name, kind in TRAININGS.items():
        there = not kind.needs or importlib.util.find_spec(kind.needs)
        if there and (kind.on_cpu or where == "cuda"):
            with uncompiled():  # torchao compiles its optimizer, for ten seconds a step
                found = _losses(setup, where, **kind.settings)
                expected = _losses(setup, "cpu", **kind.beside) if kind.beside else plain
            yield _compared(f"training in {name}", found, expected, kind.tolerance)


def check_resume(setup: Setup) -> Iterator[Row]:
    """A run that continues from a checkpoint ends with the very weights of the uninterrupted one."""
    for name, settings in RESUMED.items():
        if not name or setup.device.type == "cuda":
            yield _resumed(setup, name, **settings)
    yield _resumed_student(setup)
    yield _resumed(setup, " without --deterministic", deterministic=False) | {"at most": "", "ok": True}


def _resumed(setup: Setup, name: str, **more: Any) -> Row:
    settings = {"bf16": True, "save_steps": 2, "max_steps": 4, "deterministic": True, **more}
    with tempfile.TemporaryDirectory() as folder, _algorithms_restored():
        data, root = _write_store(setup, Path(folder) / "store"), Path(folder)
        whole, again = (_config(setup, data, root / run, **settings) for run in ("whole", "again"))
        train(whole)
        train(again, resume=root / "whole" / "checkpoint-2")
        first, second = (load_file(root / run / "model.safetensors") for run in ("whole", "again"))
    return _same_weights(f"resume bit for bit{name}", first, second)


def _resumed_student(setup: Setup) -> Row:
    """The same of a distillation, which keeps one checkpoint only."""
    with (
        tempfile.TemporaryDirectory() as folder,
        _algorithms_restored(),
        mock.patch.object(base_trainer, "keep_newest"),
    ):
        make_deterministic()
        root, source = Path(folder), open_embeddings(_write_store(setup, Path(folder) / "store"))
        lessons = DistillationConfig(
            steps=1, train_steps=4, save_steps=2, teacher_steps=2, batch_size=8, device=setup.device.type
        )
        found = []
        for run, resume in (("whole", None), ("again", str(root / "whole" / "checkpoint-2"))):
            config = TrainingConfig(output_dir=str(root / run), device=setup.device.type)
            student = student_trainer(setup.model("ridge"), source, np.arange(32), lessons, config)
            student.train(resume_from_checkpoint=resume)
            found.append(student.unwrapped_model.state_dict())
    return _same_weights("resume bit for bit, distillation", *found)


def _same_weights(what: str, first: Mapping[str, Tensor], second: Mapping[str, Tensor]) -> Row:
    different = [weight for weight in first if not torch.equal(first[weight], second[weight])]
    return {"check": what, "found": len(different), "at most": 0, "ok": not different}


def check_checkpoints(setup: Setup) -> list[Row]:
    """What a thread writes out of pinned memory while steps go on is what is written between two steps."""
    settings = {"bf16": True, "save_steps": 1, "max_steps": setup.steps, "deterministic": True}
    with tempfile.TemporaryDirectory() as folder, _algorithms_restored():
        data, root = _write_store(setup, Path(folder) / "store"), Path(folder)
        for name, meanwhile in (("meanwhile", True), ("between", False)):
            train(_config(setup, data, root / name, **settings, async_checkpoints=meanwhile))
        files = sorted(path.relative_to(root / "between") for path in root.glob("between/**/*.safetensors"))
        different = [
            str(file)
            for file in files
            if (root / "between" / file).read_bytes() != (root / "meanwhile" / file).read_bytes()
        ]
    check = f"checkpoints written meanwhile: files that differ of {len(files)}"
    return [{"check": check, "found": len(different), "at most": 0, "ok": not different and len(files) > 3}]


def check_lack_of_memory(setup: Setup) -> Iterator[Row]:
    """A real lack of memory, of a GPU that is given three quarters of what a run takes: the run goes on."""
    if setup.device.type != "cuda":
        return
    settings: dict[str, Any] = {"batch_size": 256, "logging_steps": 1, "auto_micro_batch": True}
    with tempfile.TemporaryDirectory() as folder:
        data = _write_store(setup, Path(folder) / "store")
        torch.cuda.reset_peak_memory_stats()
        plain = train_on(open_embeddings(data), _config(setup, data, Path(folder) / "plain", **settings))
        peak, total = torch.cuda.max_memory_reserved(), torch.cuda.mem_get_info()[1]
        expected = _losses_of(plain)
        del plain
        gc.collect()
        torch.cuda.empty_cache()
        torch.cuda.set_per_process_memory_fraction(0.75 * peak / total)
        short = train_on(open_embeddings(data), _config(setup, data, Path(folder) / "short", **settings))
        torch.cuda.set_per_process_memory_fraction(1.0)
        assert short.micro_batches is not None
        pieces = short.micro_batches.pieces
        yield {
            "check": "lack of memory: pieces of a batch",
            "found": pieces,
            "at most": 256,
            "ok": pieces > 1,
        }
        yield _compared("lack of memory: losses", _losses_of(short), expected, TOLERANCE["float32"])


def _losses_of(trainer: BLIP3oTrainer) -> Tensor:
    return torch.tensor([line["loss"] for line in trainer.state.log_history if "loss" in line])


def _losses(setup: Setup, device: str, **settings: Any) -> Tensor:
    with tempfile.TemporaryDirectory() as folder:
        data = _write_store(setup, Path(folder) / "store")
        asked = _config(
            setup, data, Path(folder) / "run", **{"device": device, "logging_steps": 1} | settings
        )
        return _losses_of(train_on(open_embeddings(data), asked))


def _config(setup: Setup, data: str, output: Path, **settings: Any) -> TrainingConfig:
    config = setup.config()
    return TrainingConfig(
        **{
            "embeddings_path": data,
            "output_dir": str(output),
            "model_dim": config.model_dim,
            "num_layers": config.num_layers,
            "num_heads": config.num_heads,
            "source": "ridge",
            "batch_size": 8,
            "max_steps": setup.steps,
            "learning_rate": 1e-3,
            "eval_split": 0.0,
            "device": setup.device.type,
            "cuda_graphs": False,
            **settings,
        }
    )


def _write_store(setup: Setup, path: Path) -> str:
    tokens, condition, target = setup.config().data_sizes
    eva, clip = RandomEmbeddings(tokens, condition, target).fetch(range(32))
    with StoreWriter(path, num_tokens=tokens, condition_dim=condition, target_dim=target) as writer:
        writer.append(eva, clip, [{"key": str(i)} for i in range(32)])
    return str(path)


def prepared(model: BLIP3oDiTModel, way: str) -> BLIP3oDiTModel:
    if way == "compiled":
        model.compile_for_generation()
    elif way == "recorded":
        model.record_generation()
    return model


def _generate(model: BLIP3oDiTModel, conditions: Tensor, guidance: float = 1.0) -> Tensor:
    return model.generate(conditions, num_inference_steps=4, solver="euler", guidance_scale=guidance).cpu()


def _sampled(model: BLIP3oDiTModel, conditions: Tensor) -> Tensor:
    """By the one step that the student is taught."""
    return model.generate(conditions, num_inference_steps=1, solver="euler").cpu()


def _compared(what: str, found: Tensor, expected: Tensor, tolerance: float) -> Row:
    distance = float((found.float() - expected).norm() / expected.norm())
    return {"check": what, "found": distance, "at most": tolerance, "ok": distance <= tolerance}


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


@contextmanager
def uncompiled() -> Iterator[None]:
    torch.compiler.set_stance("force_eager")
    try:
        yield
    finally:
        torch.compiler.set_stance("default")


@contextmanager
def _algorithms_restored() -> Iterator[None]:
    before, filled = torch.are_deterministic_algorithms_enabled(), deterministic.fill_uninitialized_memory
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before)
        deterministic.fill_uninitialized_memory = filled
