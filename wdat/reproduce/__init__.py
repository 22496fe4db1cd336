"""Running a profile's notebooks and building the paper: what must run again, one notebook in a kernel. No torch.

Imports the root's `records` only.
"""
