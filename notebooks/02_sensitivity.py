# %% [markdown]
# # 2 · Sensitivity Υ, and how cheaply it can be known
#
# *Question: how does Υ = (E‖∇J‖ₛ^q)^(1/q) vary across networks, losses and orders; how large a subset estimates it; and
# how should it be kept up to date while the network changes?* Every budget in training is proportional to
# 1/Υ^(q−1), so an Υ that lags is a δ that is off.
#
# *Place in the paper: 6.3 Sensitivity and how cheaply it is known; third-party networks: 7.*
# *Time: digits 1 min, zoo 5 min on a CPU, cifar10 30 min on a GPU.*

# %% tags=["parameters"]
data = "digits"
train_root = ""
test_root = ""
n_train = 0  # images; 0 means all
n_test = 0
networks = [".wdat/digits/made/zoo/standard.yaml", ".wdat/digits/made/zoo/trades.yaml"]
weights = ""
dataset = "cifar10"  # of RobustBench names, with their threat
threat = "Linf"
r = "inf"
orders = [1.5, 2, 4, "inf"]
losses = ["ce", "redlr"]
sizes = [16, 32, 64, 128, 256, 512]  # images in the subset
repeats = 200  # random subsets per size
recipe = {}  # W-TRADES fine-tuning during which the rules are compared, settings of wdat.training.loop.Recipe
rules = {}  # name -> settings of wdat.training.trackers.Rule
every = 5  # steps between measurements of the true upsilon
seed = 0
batch_size = 128
jobs = 0  # runs at the same time; 0: as many as cores and memory allow
out = "figures/digits"
work = ".wdat/digits/made"

# %%
from wdat import records
from wdat.report import figures
from wdat.studies import experiments
from wdat.threats.ball import parse_number

root, device = records.root(), records.pick_device()
print(records.device_line())

# %%
train = experiments.load_images(data, "train", root, train_root, n_train)
test = experiments.load_images(data, "test", root, test_root, n_test)
models = experiments.load_networks(networks, root, weights, device, dataset=dataset, threat=threat)
results = experiments.sensitivity(
    models, test, r=parse_number(r), orders=[parse_number(p) for p in orders], losses=losses, sizes=sizes,
    repeats=repeats, seed=seed, batch_size=batch_size,
)  # fmt: skip
record = records.write(root / out / "02_sensitivity.json", "sensitivity", results, {"networks": networks}, seeds=[seed])

# %% [markdown]
# Υ falls with p, since q falls. In the right panel points are the root mean square error of random subsets and
# lines are what the estimator claims for itself: where they agree, the standard error can be trusted.

# %%
figures.sensitivity(record)

# %%
drift = experiments.upsilon_rules(
    list(models.values())[-1], train, recipe=recipe, rules=rules, every=every, seed=seed, batch_size=batch_size,
    jobs=jobs,
)  # fmt: skip
record = records.write(root / out / "02_upsilon_rules.json", "upsilon-rules", drift, recipe, seeds=[seed])

# %% [markdown]
# The grey line is the full pass over the training set, measured while training; the thin line is what the rule
# believed. Titles give the relative root mean square error and what the rule adds to the arithmetic of training. The
# last network of the list is fine-tuned.

# %%
figures.rules(record)
