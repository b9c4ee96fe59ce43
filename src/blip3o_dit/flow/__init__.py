"""Flow matching: paths, loss, solvers. Knows a callable v(x, t), no network."""
