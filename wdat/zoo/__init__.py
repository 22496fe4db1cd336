"""Networks and images: data sets, architectures, model cards with their weights, RobustBench, and which function a
network is.

Imports `threats` and root files.
"""
