"""The ready configuration files, read as `accelerate launch` reads them."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from accelerate.commands.config.config_args import load_config_from_file
from accelerate.commands.launch import _validate_launch_command, launch_command_parser
from accelerate.utils import FullyShardedDataParallelPlugin
from accelerate.utils.launch import prepare_multi_gpu_env
from torch.distributed.fsdp import MixedPrecisionPolicy

from blip3o_dit.model.transformer import NextDiTBlock
from blip3o_dit.training.fsdp import check_sharding, keep_the_dtype_rule
from tests.conftest import tiny_config

FOLDER = Path(__file__).parent.parent / "configs" / "accelerate"
FILES = {"one_gpu": ("NO", 1, 1), "one_node": ("MULTI_GPU", 1, 8), "several_nodes": ("MULTI_GPU", 2, 16)}
FILES |= {"fsdp": ("FSDP", 1, 8)}


def test_all_files_are_tested() -> None:
    assert {file.stem for file in FOLDER.iterdir()} == set(FILES)


@pytest.mark.parametrize("name", FILES)
def test_accelerate_understands_the_file(name: str) -> None:
    config = load_config_from_file(str(FOLDER / f"{name}.yaml"))
    found = (str(config.distributed_type).split(".")[-1], config.num_machines, config.num_processes)
    assert found == FILES[name]
    assert config.mixed_precision == "bf16"


def test_the_sharding_that_the_file_asks_for(monkeypatch: pytest.MonkeyPatch) -> None:
    """From the file through the launcher's environment to the plugin that shards the network's blocks."""
    words = ["--config_file", str(FOLDER / "fsdp.yaml"), "train_blip3o_dit.py"]
    arguments, *_ = _validate_launch_command(launch_command_parser().parse_args(words))
    assert arguments.use_fsdp and arguments.num_processes == 8
    for name, value in prepare_multi_gpu_env(arguments).items():
        monkeypatch.setenv(name, value)
    plugin = FullyShardedDataParallelPlugin()
    check_sharding(SimpleNamespace(fsdp_plugin=plugin))
    assert plugin.transformer_cls_names_to_wrap == [NextDiTBlock.__name__]
    plugin.set_auto_wrap_policy(NextDiTBlock(tiny_config()))
    assert plugin.auto_wrap_policy.keywords["transformer_layer_cls"] == {NextDiTBlock}


def test_mixed_precision_narrows_the_gathered_weights_and_nothing_else() -> None:
    plugin = FullyShardedDataParallelPlugin(fsdp_version=2)
    state = SimpleNamespace(fsdp_plugin=plugin)
    keep_the_dtype_rule(state)
    assert plugin.mixed_precision_policy is None
    plugin.set_mixed_precision("bf16")  # as accelerate does it for `mixed_precision: bf16`
    keep_the_dtype_rule(state)
    assert plugin.mixed_precision_policy == MixedPrecisionPolicy(
        param_dtype=torch.bfloat16, reduce_dtype=torch.float32, output_dtype=None, cast_forward_inputs=False
    )


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("fsdp_version", 1),
        ("fsdp_cpu_ram_efficient_loading", True),
        ("fsdp_state_dict_type", "SHARDED_STATE_DICT"),
    ],
)
def test_other_sharding_is_refused(name: str, value: object) -> None:
    right = {"fsdp_version": 2, "cpu_ram_efficient_loading": False, "state_dict_type": "FULL_STATE_DICT"}

    def state(**changes: object) -> SimpleNamespace:
        plugin = SimpleNamespace(**(right | changes))
        plugin.state_dict_type = SimpleNamespace(name=plugin.state_dict_type)
        return SimpleNamespace(fsdp_plugin=plugin)

    check_sharding(state())
    with pytest.raises(ValueError, match=rf"{name}: expected .* found {value}"):
        check_sharding(state(**{name if name in right else name.removeprefix("fsdp_"): value}))
