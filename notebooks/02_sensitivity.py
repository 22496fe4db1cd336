# %% [markdown]
# # 2 · Sensitivity Υ, and how cheaply it can be known
#
# *Question: how does Υ = (E‖∇J‖ₛ^q)^(1/q) vary across networks, losses and orders; how large a subset estimates it; and
# how should it be kept up to date while the network changes?* Every budget in training is proportional to
# 1/Υ^(q−1), so an Υ that lags is a δ that is off.
#
# *Place in the paper: 6.3 Sensitivity and how cheaply it is known; third-party networks: 7.*
# *Time: digits 1 min, zoo 5 min on a CPU, cifar10 30 min on a GPU.*

# %% tags=["parameters"] needs=["00"]
from_records = False  # True: show the committed results, compute nothing
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
import torch

from wdat.report import figures
from wdat.studies import experiments
from wdat.studies.notebook import Study
from wdat.threats.ball import parse_number
from wdat.threats.sensitivity import MovingAverage, upsilon_of_norms

study = Study(
    out, work, from_records, data=data, networks=networks, train_root=train_root, test_root=test_root, n_train=n_train,
    n_test=n_test, weights=weights, dataset=dataset, threat=threat,
)  # fmt: skip

# %% [markdown]
# **By hand.** Dual norms of eight images drawn from 100, q = 2: Υ is a root of a mean, so its standard error is that of
# the mean of squares, carried through the root, times √(1 − 8/100) for drawing without replacement. The moving average
# is taken over the q-th powers, not over Υ: only they are means over images.

# %%
norms, later = torch.tensor(
    [[3.0, 0.5, 1.0, 2.0, 0.0, 4.0, 1.5, 1.0], [2.0, 1.0, 1.0, 1.0, 0.0, 3.0, 1.0, 1.0]]
).double()
square = norms.square()
upsilon = square.mean().sqrt()
error = square.std() / (2 * upsilon) * ((1 - 8 / 100) / 8) ** 0.5
found = upsilon_of_norms(norms, q=2, total=100)
assert abs(found.value - upsilon) < 1e-12 and abs(found.error - error) < 1e-12

average = MovingAverage(q=2, weight=0.1)
average.update(norms)
average.update(later)
by_hand = ((0.9 * square.mean() + later.square().mean()) / 1.9).sqrt()  # weights sum to one
assert abs(average.value - by_hand) < 1e-12

# %%
record = study.record(
    "02_sensitivity", "sensitivity", experiments.sensitivity, study.networks, study.test, r=parse_number(r),
    orders=[parse_number(p) for p in orders], losses=losses, sizes=sizes, repeats=repeats, seed=seed,
    batch_size=batch_size, seeds=[seed],
)  # fmt: skip

# %% [markdown]
# Υ falls with p, since q falls. In the right panel points are the root mean square error of random subsets and
# lines are what the estimator claims for itself: where they agree, the standard error can be trusted.

# %%
figures.sensitivity(record)

# %%
record = study.record(
    "02_upsilon_rules", "upsilon-rules", experiments.upsilon_rules, study.last, study.train, config=recipe,
    recipe=recipe, rules=rules, every=every, seed=seed, batch_size=batch_size, jobs=jobs, seeds=[seed],
)  # fmt: skip

# %% [markdown]
# The thick line is the full pass over the training set, measured while training; the thin line is what the rule
# believed. Titles give the relative root mean square error and what the rule adds to the arithmetic of training. The
# last network of the list is fine-tuned.

# %%
figures.rules(record)
