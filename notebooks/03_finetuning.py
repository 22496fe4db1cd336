# %% [markdown]
# # 3 · Fine-tuning, one choice at a time
#
# *Question: from where, which layers, how fast, and with which Υ rule should a robust network be fine-tuned?* One
# network, W-TRADES, every variant changing one thing of the base recipe; plain fine-tuning, pointwise adversarial
# training and TRADES at the same number of epochs stand beside it, because a gain over "before" alone proves nothing.
#
# *Place in the paper: 6.4 Fine-tuning, one choice at a time; third-party networks: 7.*
# *Time: digits 2 min, zoo 10 min on a CPU, cifar10 hours on a GPU.*

# %% tags=["parameters"]
data = "digits"
train_root = ""
test_root = ""
n_train = 0  # images; 0 means all
n_test = 0
networks = [".wdat/digits/made/zoo/trades.yaml"]
weights = ""
dataset = "cifar10"  # of RobustBench names, with their threat
threat = "Linf"
r = "inf"
deltas = ["1/16", "2/16", "3/16"]  # W_2 radii of the evaluation
base = {}  # recipe, settings of wdat.training.loop.Recipe
variants = []  # [{"name": ..., settings that differ from base}]
shown = []  # variants in the figure of histories; none means the first six
seeds = [0]
measure = {}  # further settings of wdat.studies.study.Sweep
jobs = 0  # runs at the same time; 0: as many as cores and memory allow
out = "figures/digits"
work = ".wdat/digits/made"

# %%
from wdat import records
from wdat.report import figures, tables
from wdat.studies import experiments, sweeps
from wdat.studies.study import Sweep
from wdat.threats.ball import Threat

root, device = records.root(), records.pick_device()
print(records.device_line())

# %%
train = experiments.load_images(data, "train", root, train_root, n_train)
test = experiments.load_images(data, "test", root, test_root, n_test)
models = experiments.load_networks(networks[:1], root, weights, device, dataset=dataset, threat=threat)
sweep = Sweep(base, variants, seeds, [Threat(d, 2, r) for d in deltas], **measure)
print(sweeps.forecast(models, train, sweep))
results = sweeps.finetuning(models, train, test, sweep, root / work / "03", jobs)
record = records.write(root / out / "03_finetuning.json", "finetuning", results, {"base": base}, seeds=seeds)

# %%
tables.finetuning(record)

# %% [markdown]
# Each row changes one thing; the line is the network before fine-tuning. Gains are comparable only at equal clean
# accuracy, and one seed moves them by about a point.

# %%
figures.variants(record)

# %% [markdown]
# During training: validation accuracies (validation images are cut from the training set and choose nothing; W-PGD at
# the middle radius), the tracked Υ, and the mean gradient norm relative to the first epoch. A norm that collapses
# while the exact accuracy does not rise means masked gradients, not robustness.

# %%
figures.histories(record, shown)
