# %% [markdown]
# # 5 · Bounds on the robustness ratio
#
# *Question: where do the first-order bounds R^u and R^l enclose the true ratio R_δ = A_δ / A?* R^u comes from an
# attack, R^l from the loss and Υ. The black curve is the optimal allocation over minimal distances, an upper bound that
# holds at every δ.
#
# *Place in the paper: 6.6 Where first-order bounds end; third-party networks: 7.*
# *Time: digits 1 min, zoo 5 min on a CPU, cifar10 1 h on a GPU.*

# %% tags=["parameters"] needs=["00"]
from_records = False  # True: show the committed results, compute nothing
data = "digits"
test_root = ""
n_test = 0  # images; 0 means all
networks = [".wdat/digits/made/zoo/trades.yaml"]
weights = ""
dataset = "cifar10"  # of RobustBench names, with their threat
threat = "Linf"
r = "inf"
deltas = ["1/64", "1/32", "1/16", "2/16", "3/16"]
losses = ["redlr", "ce"]
steps = 50
search = {}  # settings of wdat.attacks.nearest.minimal_distances
batch_size = 128
jobs = 0  # runs at the same time; 0: as many as cores and memory allow
out = "figures/digits"
work = ".wdat/digits/made"

# %%
import torch
from torch import nn

from wdat.accuracy.bounds import ratio_bounds
from wdat.report import figures, tables
from wdat.studies import experiments
from wdat.studies.notebook import Study
from wdat.threats.ball import Threat
from wdat.threats.losses import redlr
from wdat.threats.sensitivity import upsilon
from wdat.zoo.data import load_data

study = Study(
    out, work, from_records, data=data, networks=networks, test_root=test_root, n_test=n_test, weights=weights,
    dataset=dataset, threat=threat,
)  # fmt: skip

# %% [markdown]
# **By hand.** ReDLR is 0 on misclassified images and negative on the others, so an adversary that leaves the share A_δ
# right has a mean loss of at least about A_δ/A times the clean one, V(0). To first order it reaches at most V(0) + δΥ:
# hence R̄^l = 1 + δΥ/V(0), from clean images alone.

# %%
few = load_data("digits", "test").take(64)
torch.manual_seed(0)
net, ball = nn.Sequential(nn.Flatten(), nn.Linear(64, 10)), Threat("1/64")
values, right = redlr(net(few.x), few.y).detach(), (net(few.x).argmax(1) == few.y).double()
v0, slope = float(values.mean()), upsilon(net, few.x, few.y, ball, "redlr").value
by_hand = 1 + ball.delta * slope / v0
found = ratio_bounds(float(right.mean()), float(right.mean()), v0, 0.0, v0, slope, ball.delta)
assert abs(found.r_bar_l - by_hand) < 1e-9

# %%
record = study.record(
    "05_bounds", "evaluation", experiments.across_networks, study.networks, study.test,
    [Threat(d, 2, r) for d in deltas], study.work / "evaluation", losses=losses, steps=steps, search=search, orders=[2],
    curve=61, batch_size=batch_size, jobs=jobs,
)  # fmt: skip

# %%
figures.bounds(record)

# %% [markdown]
# R^u comes from one attack, so it can only lie above the true ratio; its gap to the black curve is what W-PGD leaves
# on the table. R̃^l and R̄^l are lower bounds only up to o(δ): where one lies above the black curve, which itself
# bounds the true ratio from above, it is no bound any more. Negative values say nothing and are cut.
#
# **Where they fail.** For each loss the smallest radius measured at which R^l, the smaller of the two, exceeds the
# ratio by optimal allocation (in brackets both); – where it never does.

# %%
tables.failures(record)
