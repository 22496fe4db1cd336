"""Fine-tuning: objectives, their terms, how Υ is kept, schedules, recipes, the loop with its checkpoints, its memory.

Imports `threats`, `attacks`, `accuracy` and `zoo`.
"""
