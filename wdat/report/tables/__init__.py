"""Tables from records: the same rows as HTML (notebooks), Markdown (README) and LaTeX (paper).

Each function takes the path of one record: NAME.json -> NAME.md and NAME.tex (or NAME-SUFFIX). No torch. Imports
`report.table` and `report.rows`.
"""

from wdat.report.tables.methods import attacked, best_proposed, compared, finetuning, pretraining
from wdat.report.tables.robustness import converged, dual, evaluation, failures, overview, probed, ranks, verified
