"""Configurations, under the documented path."""

from blip3o_dit.config import BLIP3oDiTConfig, FlowMatchingConfig, TrainingConfig

__all__ = ["BLIP3oDiTConfig", "FlowMatchingConfig", "TrainingConfig"]
