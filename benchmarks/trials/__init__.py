"""Trials: what becomes of runs that are killed, of bad input, of hostile files, of a million images; see README.md."""
