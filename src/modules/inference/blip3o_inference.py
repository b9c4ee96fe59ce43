"""Inference, under the documented path."""

from blip3o_dit.inference.pipeline import BLIP3oInference

__all__ = ["BLIP3oInference"]
