"""Accuracy under a Wasserstein threat from numbers per image: optimal allocation, bounds, certified radii.

`allocation` turns distances into A_δ for every δ and p; `crown` over `graph` gives certified radii, and `branch` raises
them where the curve moves. Imports `threats` only.
"""
