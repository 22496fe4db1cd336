"""Adversaries: the one projected-gradient loop, the nearest adversarial examples, the dual attack.

Every first-order attack is a setting of `loop`. Imports `threats` only.
"""
