"""Hostile and broken input: seeded damage to every format, and a judge of how the library bears it."""
