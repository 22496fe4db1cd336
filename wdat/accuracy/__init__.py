"""Accuracy under a Wasserstein threat from numbers per image: optimal allocation, bounds, certified radii.

`allocation` turns distances into A_δ for every δ and p; `graph` traces a network, `relaxation` bounds it over balls,
`crown` makes certified radii of these bounds; `branch` proves balls by branch and bound, with what `halfspace` knows
of counterexamples, and `raising` says which balls next. Imports `threats` only.
"""
