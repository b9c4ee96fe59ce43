"""Model folders: which weights they hold, whether these fit the configuration, reading and writing them."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor, nn
from transformers import PreTrainedModel

from blip3o_dit.model.config import BLIP3oDiTConfig
from blip3o_dit.model.cpu_kernels import use_cpu_kernels
from blip3o_dit.model.quantization import is_quantized, quantize_blocks, quantize_weight
from blip3o_dit.utils.atomic import MODEL_ASIDE, finish_publishing
from blip3o_dit.utils.checksums import is_sealed, verify
from blip3o_dit.utils.json_files import printable, show_names, weight_files_of
from blip3o_dit.utils.logging import quiet_transformers
from blip3o_dit.utils.recognise import MODEL, recognise, refusal
from blip3o_dit.utils.validation import check_name, damage_refused, is_hub_id

TENSORS_AT_ONCE = 4  # mapped while they are read: 0.1 GiB at the default size
ALIGNMENT = 64  # bytes; what torch's own allocator gives on a CPU

# Averaged weights lie beside the raw ones under Hugging Face's variant naming.
EMA_VARIANT = "ema"
EMA_FILE = f"model.{EMA_VARIANT}.safetensors"
WEIGHTS_FILE = "model.safetensors"
WEIGHT_DTYPES = {"F64", "F32", "F16", "BF16"}


class StrictPreTrainedModel(PreTrainedModel):
    """A model whose weights must all be there and fit, and are written without a copy of them in memory."""

    def save_pretrained(  # type: ignore[override]
        self,
        save_directory: str | os.PathLike[str],
        is_main_process: bool = True,
        state_dict: dict[str, Tensor] | None = None,
        **kwargs: Any,
    ) -> None:
        """As `PreTrainedModel.save_pretrained`, which would copy all weights that share a block of memory.

        Raises:
            ValueError: for a model with quantised weights, which no folder holds.
        """
        if is_quantized(self):
            raise ValueError(f"{save_directory}: expected weights as they were trained, found quantised ones")
        state = self.state_dict() if state_dict is None else state_dict
        state = {name: _with_storage_of_its_own(tensor) for name, tensor in state.items()}
        with quiet_transformers():  # its bar is at its end before it is seen
            super().save_pretrained(save_directory, is_main_process, state, **kwargs)

    @classmethod
    def from_pretrained(  # type: ignore[override]
        cls, pretrained_model_name_or_path: str | os.PathLike[str], *args: Any, **kwargs: Any
    ) -> Any:
        """As `PreTrainedModel.from_pretrained`, but weights that do not fit the config are refused.

        Weights are read as safetensors. A folder is read without touching the network; what is no folder is
        looked up on the hub only if it can be meant as an id there (`is_hub_id`).

        Raises:
            FileNotFoundError: no such folder.
            ValueError: lists the missing, unexpected and misshapen tensors.
        """
        wants_info = kwargs.pop("output_loading_info", False)
        kwargs["use_safetensors"] = True
        # With peft installed, transformers would apply an adapter that lies in the folder.
        kwargs.setdefault("adapter_kwargs", {"subfolder": "no-adapters"})
        if not is_hub_id(pretrained_model_name_or_path):
            kwargs["local_files_only"] = True
            folder, config = Path(pretrained_model_name_or_path), kwargs.get("config")
            finish_model(folder)
            if not isinstance(config, BLIP3oDiTConfig):
                config = BLIP3oDiTConfig.from_pretrained(folder)
            cls.check_weights(weights_files(folder, kwargs.get("variant")), config)
        with quiet_transformers():  # its report of misfits is many lines; ours is one
            loaded: Any = super().from_pretrained(
                pretrained_model_name_or_path,
                *args,
                output_loading_info=True,
                ignore_mismatched_sizes=True,
                **kwargs,
            )
        model, info = loaded
        refuse_misfits(
            str(pretrained_model_name_or_path),
            missing=info["missing_keys"],
            unexpected=info["unexpected_keys"],
            mismatched=[name for name, *_ in info["mismatched_keys"]],
        )
        _align(model)
        use_cpu_kernels(model)
        return (model, info) if wants_info else model

    @classmethod
    def load_for_inference(
        cls,
        folder: str | Path,
        *,
        dtype: torch.dtype,
        variant: str | None = None,
        quantize: str | None = None,
    ) -> Any:
        """A model from a folder, for inference, with weights in `dtype` that are in memory once.

        `from_pretrained` has the whole file mapped while it converts, which counts as memory too. With
        `quantize` the blocks' weights are quantised as they are read (`quantization.py`).

        Raises:
            FileNotFoundError, ValueError: as `from_pretrained`.
        """
        finish_model(Path(folder))
        config, files = BLIP3oDiTConfig.from_pretrained(folder), weights_files(Path(folder), variant)
        cls.check_weights(files, config)
        file_of = {name: file for file in files for name in _shapes(file)}
        with torch.device("meta"):
            model = cls(config)
        weights = {name for name, _ in model.named_parameters()}
        names, state = list(model.state_dict()), {}
        quantized = quantize_blocks(model, quantize) if quantize else []
        for file in files:
            inside = [name for name in names if file_of[name] == file]
            for start in range(0, len(inside), TENSORS_AT_ONCE):
                with safe_open(file, framework="pt") as tensors:
                    for name in inside[start : start + TENSORS_AT_ONCE]:
                        tensor = tensors.get_tensor(name)
                        if name in quantized:
                            scale = f"{name.removesuffix('weight')}scale"
                            state[name], state[scale] = quantize_weight(tensor, str(quantize))
                        else:
                            wanted = dtype if name in weights else torch.float32
                            state[name] = tensor.to(wanted, copy=True)
        model.load_state_dict(state, assign=True)
        del state  # or what moves now would be there twice
        use_cpu_kernels(model)
        return model.eval()

    @classmethod
    def check_weights(cls, files: Path | Sequence[Path], config: BLIP3oDiTConfig) -> None:
        """Refuse weights that do not fit the configuration by the files' headers, before anything is built.

        Hugging Face makes room for what a configuration asks for and compares then.

        Raises:
            ValueError: not readable as safetensors, or names and shapes other than the configuration's.
        """
        files = [files] if isinstance(files, Path) else files
        found: dict[str, list[int]] = {}
        for part in files:
            shapes = _shapes(part)
            if twice := sorted(shapes.keys() & found.keys()):
                raise ValueError(f"{part}: expected each tensor in one file, found {show_names(twice)} again")
            found |= shapes
        if config.num_layers > len(found):
            raise ValueError(
                f"{files[0]}: expected {config.num_layers} layers, found {len(found)} tensors in all"
            )
        with torch.device("meta"):
            expected = {name: list(tensor.shape) for name, tensor in cls(config).state_dict().items()}
        refuse_misfits(str(files[0]), **compare_shapes(expected, found))


def pick_weights(path: Path, weights: str) -> str:
    """ "auto", "ema" or "raw" -> which of the last two a model folder gives; refuses altered files.

    Raises:
        FileNotFoundError, ValueError: one line: see `find_weights`, or files that were altered since they
            were saved.
    """
    chosen = find_weights(path, weights)
    if is_sealed(path):
        files = weights_files(path, variant_of(chosen))
        verify(path, ["config.json", *(file.name for file in files)])
    return chosen


def variant_of(chosen: str) -> str | None:
    """ "ema" or "raw", as `pick_weights` says it, in `from_pretrained`'s words."""
    return EMA_VARIANT if chosen == "ema" else None


def find_weights(path: Path, weights: str) -> str:
    """The same without reading them.

    Raises:
        FileNotFoundError, ValueError: one line: no model there, or no averaged weights.
    """
    check_name("weights", weights, ("auto", "ema", "raw"))
    check_is_model(path)
    has_ema = all(file.is_file() for file in weights_files(path, EMA_VARIANT))
    if weights == "ema" and not has_ema:
        raise ValueError(f"{path}: expected averaged weights ({EMA_FILE}), found none")
    return "raw" if weights == "raw" or not has_ema else "ema"


def check_is_model(path: Path) -> None:
    """Raises FileNotFoundError or ValueError, of one line, where there is no model."""
    finish_model(path)
    if not (path / "config.json").is_file() or recognise(path).kind == "decoder":
        raise refusal(path, MODEL)


def weights_files(folder: Path, variant: str | None) -> list[Path]:
    """The file of a model's weights, or those that `save_pretrained` with a `max_shard_size` cut them into.

    Raises:
        ValueError: for an index that does not name files beside it.
    """
    file = folder / (f"model.{variant}.safetensors" if variant else WEIGHTS_FILE)
    index = folder / f"{WEIGHTS_FILE}.index{f'.{variant}' if variant else ''}.json"
    return weight_files_of(index) if index.is_file() and not file.is_file() else [file]


def finish_model(folder: Path) -> None:
    """Finish moving a new model's files into a folder, where a process was killed that did so.

    Raises:
        ValueError: when they cannot be moved, or files of two models may be mixed.
    """
    aside = folder / MODEL_ASIDE
    finish_publishing(aside, folder)
    if is_sealed(aside) and not is_sealed(folder):
        raise ValueError(
            f"{folder}: expected one model, found another half moved into it ({aside.name}): "
            f"remove {aside.name}, and train again or restore the folder"
        )


def compare_shapes(expected: Mapping[str, list[int]], found: Mapping[str, list[int]]) -> dict[str, list[str]]:
    """Names of the tensors that are missing, unexpected or mismatched, that is of another shape."""
    return {
        "missing": [name for name in expected if name not in found],
        "unexpected": [name for name in found if name not in expected],
        "mismatched": [name for name in expected if name in found and expected[name] != found[name]],
    }


def count_and_show(kind: str, names: list[str], separator: str) -> str:
    """ "5 missing (a, b, c, ...)" """
    return f"{len(names)} {kind} ({separator.join(names[:3])}{f'{separator}...' if len(names) > 3 else ''})"


def refuse_misfits(where: str, **problems: Iterable[str]) -> None:
    """Raise a one-line ValueError when there are missing, unexpected or mismatched tensors."""
    named = {kind: [printable(name) for name in sorted(names)] for kind, names in problems.items()}
    said = [count_and_show(kind, names, ", ") for kind, names in named.items() if names]
    if said:
        raise ValueError(f"{where}: weights do not fit the configuration: " + "; ".join(said))


def _shapes(file: Path) -> dict[str, list[int]]:
    """The shapes that a file's header tells, of weights in a dtype that can be theirs."""
    if not file.is_file():
        raise FileNotFoundError(f"{file}: expected weights, found none")
    with damage_refused(file), safe_open(file, framework="pt") as tensors:
        found = {name: tensors.get_slice(name).get_shape() for name in tensors.keys()}  # noqa: SIM118
        kinds = {tensors.get_slice(name).get_dtype() for name in found}
    if not kinds <= WEIGHT_DTYPES:
        raise ValueError(f"{file}: expected weights in {sorted(WEIGHT_DTYPES)}, found {sorted(kinds)}")
    return found


def _align(model: nn.Module) -> None:
    """Move what a file maps to an odd address to memory of its own.

    A matrix library may take another path there, whose sums are rounded differently: a model would not give
    the same samples after saving and loading.
    """
    for tensor in (*model.parameters(), *model.buffers()):
        if tensor.device.type == "cpu" and tensor.data_ptr() % ALIGNMENT:
            tensor.data = tensor.data.clone()


def _with_storage_of_its_own(tensor: Tensor) -> Tensor:
    """The same memory seen through a storage that begins and ends with this tensor; nothing is copied."""
    plain = type(tensor) in (Tensor, nn.Parameter) and tensor.is_contiguous()
    if not plain or tensor.device.type not in ("cpu", "cuda"):
        return tensor
    return torch.from_dlpack(tensor.detach())
