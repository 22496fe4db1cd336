"""Adversarial winning tickets: tangent kernels, masks, and the search for one that keeps a network's training dynamics.

A masked network is a network: it is trained by the one loop, with any objective, and saved as a card of its density.
Imports `threats`, `attacks` and `zoo`.
"""
