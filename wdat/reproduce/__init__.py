"""Running a profile's notebooks and building the paper: what must run again, one notebook in a kernel. No torch.

Imports the root's `records` only.

papermill and nbclient run the kernels, jupytext reads the sources, joblib hands out the runs inside them. What is left
here says what must run again: a notebook depends on the definitions its code reaches (`wdat.digest`), on the records of
those before it, and on its parameters. Looked at instead: jupyter-cache goes by code cells alone; ploomber (over
papermill, too) by the source of a task, not of what it imports; snakemake by times, parameters and the rule's own code;
doit and pytask by digests of files that each task lists, which would keep this key and save the order of a handful of
notebooks and one state file, for a dependency with a database of its own. Nor would any of them share one budget of
cores among the runs inside notebooks at the same time: that is a folder of files to lock (`studies.jobs.slot`).
"""
