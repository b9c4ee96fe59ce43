"""The network, under the documented path."""

from blip3o_dit.model.nextdit import NextDiT, NextDiTBlock

__all__ = ["NextDiT", "NextDiTBlock"]
