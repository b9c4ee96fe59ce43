"""The direction of imports, and what importing costs."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

SOURCE = Path(__file__).parent.parent / "src" / "blip3o_dit"

# Package -> what it may import of this project, besides itself and what is at the bottom.
ALLOWED: dict[str, set[str]] = {
    "utils": set(),
    "flow": set(),
    "metrics": set(),
    "data": set(),
    "normal_equations": set(),
    "ridge": {"normal_equations", "data"},
    "model": {"flow", "ridge"},
    "inference": {"model", "flow", "data", "metrics"},
    "training": {"model", "flow", "data", "metrics", "ridge", "normal_equations"},
    "evaluation": {"decoder", "inference", "model", "flow", "data", "metrics", "ridge"},
    "extraction": {"data"},
    "decoder": {"extraction", "model", "data", "ridge"},
    "demo": {"evaluation", "decoder", "extraction", "inference", "model", "data", "metrics"},
    "publish": {"data"},
    "cli": {
        "publish",
        "demo",
        "decoder",
        "inference",
        "training",
        "evaluation",
        "extraction",
        "model",
        "flow",
        "data",
        "metrics",
    },
}
BOTTOM = {"utils"}
ENTRIES = {"__init__", "__main__"}
# What a run was asked to do lies beside its weights, for whoever opens them: its own imports point down.
READ_BY_ALL = {"blip3o_dit.training.config"}
FILES = sorted(SOURCE.rglob("*.py"))


def imports(file: Path) -> set[str]:
    names: set[str] = set()
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            names |= {node.module} | {f"{node.module}.{alias.name}" for alias in node.names}
    return names


def package_of(file: Path) -> str:
    return file.relative_to(SOURCE).with_suffix("").parts[0]


@pytest.mark.parametrize("file", FILES, ids=lambda f: str(f.relative_to(SOURCE)))
def test_imports_point_down(file: Path) -> None:
    package = package_of(file)
    if package in ENTRIES:
        return
    names = {name for name in imports(file) if name.startswith("blip3o_dit.")}
    ours = {name.split(".")[1] for name in names if not name.startswith(tuple(READ_BY_ALL))}
    ours &= set(ALLOWED)
    assert ours <= ALLOWED[package] | {package} | BOTTOM
    foreign = " ".join(imports(file))
    if package != "training":
        assert "transformers.Trainer" not in foreign and "TrainingArguments" not in foreign
    if package != "extraction":
        assert not any(name in foreign for name in ("CLIPVision", "AutoImageProcessor", "timm", "open_clip"))


def test_every_package_is_in_the_table() -> None:
    assert {package_of(file) for file in FILES} - ENTRIES <= set(ALLOWED)


def test_importing_the_package_is_light() -> None:
    code = (
        "import sys, blip3o_dit; heavy = {'torch', 'transformers', 'numpy'} & set(sys.modules); "
        "assert not heavy, heavy; assert 'BLIP3oInference' in dir(blip3o_dit)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=SOURCE.parent.parent)


def test_public_names_resolve() -> None:
    import blip3o_dit

    for name in blip3o_dit.__all__:
        assert getattr(blip3o_dit, name)
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = blip3o_dit.nothing


# Modules without a test file of their name, and where they are tested.
TESTED_IN = {
    "cli/append.py": "data/test_combine.py",
    "cli/calibrate.py": "training/test_calibration.py",
    "cli/command.py": "cli/test_cli.py",
    "cli/convert.py": "cli/test_cli.py",
    "cli/decode.py": "decoder/test_decode.py",
    "cli/distill.py": "training/test_distillation.py",
    "cli/export.py": "inference/test_export_model.py",
    "cli/generate.py": "inference/test_from_conditions.py",
    "cli/export_embeddings.py": "data/test_export.py",
    "cli/inspect.py": "extraction/test_inspection.py",
    "__main__.py": "cli/test_cli.py",
    "cli/main.py": "cli/test_cli.py",
    "cli/outputs.py": "utils/test_sending.py",
    "cli/push.py": "utils/test_hub.py",
    "publish.py": "utils/test_hub.py",
    "cli/merge.py": "data/test_combine.py",
    "cli/train_decoder.py": "decoder/test_training.py",
    "cli/train.py": "cli/test_cli.py",
    "cli/translate.py": "inference/test_translate.py",
    "cli/verify.py": "data/test_combine.py",
    "utils/durations.py": "utils/test_progress.py",
    "data/array_embeddings.py": "data/test_array_files.py",
    "data/shard_cache.py": "data/test_remote_shards.py",
    "data/choices.py": "data/test_dataset.py",
    "data/checks.py": "data/test_store.py",
    "data/towers.py": "inference/test_from_conditions.py",
    "data/convert.py": "data/test_array_files.py",
    "data/pickle_values.py": "data/test_safe_unpickler.py",
    "data/sample_checksums.py": "data/test_store.py",
    "data/shard_writer.py": "data/test_store.py",
    "data/kept_vectors.py": "extraction/test_kept_vectors.py",
    "data/table_files.py": "data/test_array_files.py",
    "decoder/config.py": "decoder/test_network.py",
    "decoder/pictures.py": "decoder/test_training.py",
    "decoder/pixel_ridge.py": "decoder/test_network.py",
    "cli/demo.py": "demo/test_demo.py",
    "demo/answers.py": "demo/test_demo.py",
    "demo/config.py": "demo/test_demo.py",
    "demo/gallery.py": "demo/test_demo.py",
    "demo/opening.py": "demo/test_demo.py",
    "demo/page.py": "demo/test_demo.py",
    "data/vector_files.py": "inference/test_translate.py",
    "evaluation/config.py": "evaluation/test_evaluate.py",
    "evaluation/metric_tables.py": "evaluation/test_scores.py",
    "evaluation/predictions.py": "evaluation/test_scores.py",
    "evaluation/reference.py": "evaluation/test_scores.py",
    "evaluation/report.py": "evaluation/test_evaluate.py",
    "evaluation/samples.py": "evaluation/test_evaluate.py",
    "evaluation/samplers.py": "evaluation/test_evaluate.py",
    "extraction/conditions.py": "inference/test_from_conditions.py",
    "extraction/encoders.py": "extraction/test_vision_towers.py",
    "extraction/config.py": "extraction/test_extract.py",
    "extraction/extractor.py": "extraction/test_extract.py",
    "extraction/skipping.py": "extraction/test_reading_errors.py",
    "extraction/sources/collector.py": "extraction/sources/test_folders.py",
    "extraction/sources/image_list.py": "extraction/sources/test_makers.py",
    "extraction/sources/image_ref.py": "extraction/sources/test_folders.py",
    "extraction/sources/img2dataset.py": "extraction/sources/test_makers.py",
    "extraction/sources/options.py": "extraction/sources/test_lists.py",
    "extraction/sources/patterns.py": "extraction/sources/test_webdataset.py",
    "extraction/sources/reading.py": "extraction/sources/test_tables.py",
    "flow/config.py": "model/test_model_config.py",
    "flow/loss.py": "flow/test_path.py",
    "flow/predictions.py": "flow/test_path.py",
    "inference/from_dataset.py": "inference/test_unfinished.py",
    "inference/progress.py": "inference/test_unfinished.py",
    "inference/request.py": "inference/test_unfinished.py",
    "model/blip3o_dit.py": "inference/test_pipeline.py",
    "model/config.py": "model/test_model_config.py",
    "model/encoded_condition.py": "model/test_transformer.py",
    "model/layers.py": "model/test_transformer.py",
    "model/triton_kernels.py": "model/test_gpu_kernels.py",
    "model/triton_training.py": "model/test_gpu_training.py",
    "model/stacked_layers.py": "model/test_cpu_kernels.py",
    "utils/philox_kernel.py": "model/test_gpu_kernels.py",
    "training/anomalies.py": "training/test_resume.py",
    "training/callbacks.py": "training/test_trainer.py",
    "training/checkpoint.py": "training/test_resume.py",
    "training/config.py": "training/test_training_config.py",
    "training/curves.py": "cli/test_plot.py",
    "training/distillation_config.py": "training/test_distillation.py",
    "training/ema.py": "training/test_trainer.py",
    "training/finishing.py": "training/test_calibration.py",
    "training/fsdp.py": "training/test_processes.py",
    "training/metrics.py": "training/test_speed_and_memory.py",
    "training/optimizer_state.py": "training/test_resume.py",
    "training/run.py": "training/test_trainer.py",
    "training/stopping.py": "training/test_resume.py",
    "training/student.py": "training/test_distillation.py",
    "training/clipping.py": "training/test_base_trainer.py",
    "training/overrides.py": "training/test_base_trainer.py",
    "training/wandb_setup.py": "training/test_trainer.py",
    "utils/atomic.py": "data/test_store_folder.py",
    "utils/checksums.py": "training/test_damage.py",
    "utils/distributed.py": "training/test_processes.py",
    "utils/file_kinds.py": "utils/test_recognise.py",
    "utils/errors.py": "training/test_resume.py",
    "utils/kept_state.py": "inference/test_unfinished.py",
    "utils/names.py": "cli/test_plot.py",
    "utils/pca_colors.py": "extraction/test_inspection.py",
    "utils/settings.py": "cli/test_arguments.py",
}


@pytest.mark.parametrize("file", FILES, ids=lambda f: str(f.relative_to(SOURCE)))
def test_every_module_has_its_tests(file: Path) -> None:
    module = str(file.relative_to(SOURCE))
    tests = Path(__file__).parent
    own = [found for found in tests.rglob("test_*.py") if found.stem == f"test_{file.stem}"]
    assert file.stem == "__init__" or own or (tests / TESTED_IN[module]).is_file()


def test_every_named_module_is_there() -> None:
    assert all((SOURCE / module).is_file() for module in TESTED_IN)
