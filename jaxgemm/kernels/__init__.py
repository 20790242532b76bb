"""Kernels, one file a family: each runs a resolved configuration and chooses none."""
