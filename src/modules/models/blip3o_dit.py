"""The model, under the documented path."""

from blip3o_dit.model.blip3o_dit import BLIP3oDiTModel
from blip3o_dit.model.config import BLIP3oDiTConfig

__all__ = ["BLIP3oDiTConfig", "BLIP3oDiTModel"]
