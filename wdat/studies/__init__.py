"""Experiments: one call to evaluate a network, the cache behind it, sweeps, comparisons; plain numbers come out.

Imports every room but `report` and `reproduce`; the notebooks call what is here.
"""
