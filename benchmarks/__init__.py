"""Benchmarks: see `python -m benchmarks --help`."""

from blip3o_dit.utils.logging import quiet_torchao

quiet_torchao()  # before diffusers and transformers are imported, which import it
