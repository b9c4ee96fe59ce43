"""Metrics as pure functions of tensors and arrays; they know neither models nor stores."""
