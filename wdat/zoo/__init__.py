"""Networks and images: data sets, architectures, model cards with their weights, RobustBench.

Imports `threats` and the records' files.
"""
