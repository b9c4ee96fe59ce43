"""The import paths of the original documentation; the code is in `blip3o_dit`."""
