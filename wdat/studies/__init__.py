"""Experiments: one call to evaluate a network, the cache behind it, sweeps, comparisons; plain numbers come out.

`evaluation` is the call for one network, `measures` what it computes and `cache` keeps, `allocated` what optimal
allocation makes of that; `sweeps`, `experiments` and `verification` ask it of many. Imports every room but `report` and
`reproduce`; the notebooks call what is here.
"""
