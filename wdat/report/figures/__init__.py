"""Figures from records: each function takes the path of one record, draws one figure and writes it beside the record.

NAME.json -> NAME.pdf and NAME.png (or NAME-SUFFIX). No torch and no model: what is not in the record can not be drawn.
Accuracies are fractions in records and percentages here. A figure that is returned shows itself in a notebook. Imports
`report.canvas` and `report.rows`.
"""

from wdat.report.figures.first_order import images, losses, rules, sensitivity, theory
from wdat.report.figures.methods import equal_clean, histories, tradeoff, variants
from wdat.report.figures.robustness import bounds, bracket, curves, gap, ranks
