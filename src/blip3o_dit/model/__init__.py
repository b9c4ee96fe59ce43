"""The diffusion transformer, its statistics, and conversion to and from other layouts."""
