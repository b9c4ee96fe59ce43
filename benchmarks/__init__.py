"""Benchmarks: see `python -m benchmarks --help`."""

import os

from blip3o_dit.utils.logging import quiet_torchao

os.environ.setdefault("PYTORCH_NVML_BASED_CUDA_CHECK", "1")  # asking for a GPU must not begin to use it
quiet_torchao()  # before diffusers and transformers are imported, which import it
