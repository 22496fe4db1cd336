"""What an adversary may do, and what is measured at single images: tensors in, tensors out.

The Wasserstein ball with its budgets and projections, losses, the sensitivity Υ, 8-bit images, and what an input must
be before any of it runs. Imports nothing else of `wdat`.
"""
