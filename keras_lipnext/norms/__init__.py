"""Proven upper bounds of the norms of matrices and convolutions, in NumPy float64."""
