"""Figures, tables and the paper's numbers, drawn from records and nothing else. No torch.

Imports the root's `records` only.
"""
