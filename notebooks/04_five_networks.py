# %% [markdown]
# # 4 · Five networks, before and after
#
# *Questions: which method leaves most accuracy under a W₂ adversary at equal clean accuracy, by how much, and on which
# networks? Does the answer depend on the radius? What does it cost pointwise, and the worst class?* Each network is
# fine-tuned by each method, at several settings of its knob, with several seeds and equal gradient passes; the test is
# the optimal allocation over minimal distances, W-PGD with ReDLR, and pointwise accuracy. Robustness can always be
# bought with clean accuracy, so methods are compared where they keep the same.
#
# *Place in the paper: 6.5 Five networks, before and after; third-party networks: 7.*
# *Time: digits 5 min, zoo four hours on a CPU, cifar10 days on a GPU.*

# %% tags=["parameters"] needs=["00"]
from_records = False  # True: show the committed results, compute nothing
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
variants = []  # [{"name": ..., settings that differ from base, "sweep": [{...}, ...]}], see wdat.studies.sweeps.expand
proposed = []  # proposed methods to compare ...
baselines = []  # ... with these baselines at equal clean accuracy
seeds = [0, 1, 2]
measure = {}  # further settings of wdat.studies.study.Sweep
jobs = 0  # runs at the same time; 0: as many as cores and memory allow
out = "figures/digits"
work = ".wdat/digits/made"

# %%
import torch
from torch import nn

from wdat.report import figures, tables
from wdat.studies import sweeps
from wdat.studies.comparison import frontier
from wdat.studies.notebook import Study
from wdat.studies.study import Sweep
from wdat.threats.ball import Threat
from wdat.training.loop import interpolate

study = Study(
    out, work, from_records, data=data, networks=networks, train_root=train_root, test_root=test_root, n_train=n_train,
    n_test=n_test, weights=weights, dataset=dataset, threat=threat,
)  # fmt: skip

# %% [markdown]
# **By hand.** Two settings of a method, (clean, A_δ) = (0.90, 0.40) and (0.80, 0.60): what does it offer at clean
# accuracy 0.85? The straight line between neighbouring settings says 0.50. Points between can be had without training:
# weights half-way between two networks, an interpolation coefficient of 0.5.

# %%
clean, robust = torch.tensor([[0.90], [0.80]]).double(), torch.tensor([[0.40], [0.60]]).double()
share = (0.85 - clean[0]) / (clean[1] - clean[0])
by_hand = robust[0] + share * (robust[1] - robust[0])
assert torch.allclose(frontier(clean, robust, torch.tensor([0.85]).double()), by_hand)

pretrained, tuned = nn.Linear(4, 2), nn.Linear(4, 2)
half = interpolate(pretrained, tuned, 0.5)
assert torch.allclose(half.weight, (pretrained.weight + tuned.weight) / 2)

# %%
threats = [Threat(d, 2, r) for d in deltas]
sweep = Sweep(base, variants, seeds, threats, proposed=proposed, baselines=baselines, **measure)
if not from_records:
    print(sweeps.forecast(study.networks, study.train, sweep))
record = study.record(
    "04_five_networks", "finetuning", sweeps.finetuning, study.networks, study.train, study.test, sweep,
    study.work / "04", jobs, config={"base": base}, seeds=seeds,
)  # fmt: skip

# %% [markdown]
# **Who wins.** One panel a network, one row a method, the best on top, at one point of clean accuracy below the
# pre-trained network. Zero is the best baseline; a proposed method whose bar (95 % of a paired bootstrap over test
# images) stays to the right of it is better by more than the draw of images explains. Rings: the best of all methods at
# that radius. The best is picked on these images on both sides.

# %%
figures.equal_clean(record)

# %% [markdown]
# The same in numbers: differences to the best baseline in points, with their intervals; the last row of a network takes
# the best proposed method at each radius.

# %%
tables.compared(record)

# %% [markdown]
# **The trade-off behind it.** What the best baseline and the best proposed method offer at each clean accuracy; small
# marks are all settings, and the networks on the way back to the pre-trained one (the star).

# %%
figures.tradeoff(record)

# %% [markdown]
# **Before and after**, the settings chosen on validation images (cut from the training images, which the networks have
# seen in pre-training: they choose among settings, they measure nothing). Columns: clean accuracy; W_∞, pointwise
# accuracy by the nearest adversarial examples found; A_δ, accuracy under W₂ at radius δ by optimal allocation (upper
# bound); the worst class under it at the smallest radius. † marks a method none of whose settings keeps clean and
# pointwise accuracy.

# %%
tables.finetuning(record)

# %% [markdown]
# **As attacks see it.** W-PGD with ReDLR; W_∞ at every radius; AutoAttack where it ran (first seed, part of the
# images), in brackets what the nearest adversarial examples leave of the same images; Υ of ReDLR; gradient passes per
# training image; the setting chosen.

# %%
tables.attacked(record)
