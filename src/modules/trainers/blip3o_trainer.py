"""The trainer, under the documented path."""

from blip3o_dit.training.trainer import BLIP3oTrainer

__all__ = ["BLIP3oTrainer"]
