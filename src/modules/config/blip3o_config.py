"""Configurations, under the documented path."""

from blip3o_dit.flow.config import FlowMatchingConfig
from blip3o_dit.model.config import BLIP3oDiTConfig
from blip3o_dit.training.config import TrainingConfig

__all__ = ["BLIP3oDiTConfig", "FlowMatchingConfig", "TrainingConfig"]
