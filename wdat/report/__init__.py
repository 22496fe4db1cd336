"""Figures, tables and the paper's numbers, drawn from records and nothing else. No torch.

`figures` and `tables` take a record's path and save beside it (`recorded`); `canvas`, `looks` and `table` are the form,
`rows` and `quotable` the content; `numbers` writes what the paper quotes. Imports the root's `records` only.
"""
