# %% [markdown]
# # 3 · Fine-tuning, one choice at a time
#
# *Questions: from where, which layers, how fast, and with which Υ rule should a robust network be fine-tuned? Which of
# these choices moves the result by more than a seed does? And is what W-PGD sees what optimal allocation sees?* One
# network, W-TRADES, every variant changing one thing of the base recipe; plain fine-tuning, pointwise adversarial
# training and TRADES at the same number of epochs stand beside it, because a gain over the pre-trained network alone
# proves nothing.
#
# *Place in the paper: 6.4 Fine-tuning, one choice at a time; third-party networks: 7.*
# *Time: digits 1 min, zoo 10 min on a CPU, cifar10 hours on a GPU.*

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
variants = []  # [{"name": ..., settings that differ from base}]
shown = []  # variants in the figure of histories; none means the first six
seeds = [0]
measure = {}  # further settings of wdat.studies.study.Sweep
jobs = 0  # runs at the same time; 0: as many as cores and memory allow
out = "figures/digits"
work = ".wdat/digits/made"

# %%
import torch
from torch import nn

from wdat.report import figures, tables
from wdat.studies import sweeps
from wdat.studies.notebook import Study
from wdat.studies.study import Sweep
from wdat.threats.ball import Threat
from wdat.threats.losses import kl
from wdat.threats.sensitivity import dual_norms
from wdat.zoo.data import load_data

study = Study(
    out, work, from_records, data=data, networks=networks[:1], train_root=train_root, test_root=test_root,
    n_train=n_train, n_test=n_test, weights=weights, dataset=dataset, threat=threat,
)  # fmt: skip

# %% [markdown]
# **By hand.** W-TRADES adds β KL(p(x) ‖ p(x′)) to cross-entropy, with x′ inside a ball of radius εᵢ around each image.
# KL can not set these budgets: its gradient is zero at x′ = x, where it is smallest. So they come from the clean
# batch's ReDLR (or cross-entropy) gradients, and KL is climbed from a start beside x.

# %%
few = load_data("digits", "test").take(8)
torch.manual_seed(0)
net, x = nn.Sequential(nn.Flatten(), nn.Linear(64, 10)), few.x.requires_grad_()

log_p = net(x).log_softmax(1)
divergence = (log_p.detach().exp() * (log_p.detach() - log_p)).sum(1)
(gradient,) = torch.autograd.grad(divergence.sum(), x)
assert gradient.abs().max() < 1e-6 and dual_norms(net, few.x, few.y, Threat(0.1), "ce").min() > 0.1

beside = (x + 0.1).clamp(0, 1)
by_hand = (log_p.exp() * (log_p - net(beside).log_softmax(1))).sum(1)
assert torch.allclose(kl(net(beside), net(x)), by_hand, atol=1e-6)

# %%
shown = shown or [variant["name"] for variant in variants[:6]]
sweep = Sweep(base, variants, seeds, [Threat(d, 2, r) for d in deltas], watched=shown, **measure)
if not from_records:
    print(sweeps.forecast(study.networks, study.train, sweep))
record = study.record(
    "03_finetuning", "finetuning", sweeps.finetuning, study.networks, study.train, study.test, sweep,
    study.work / "03", jobs, config={"base": base}, seeds=seeds,
)  # fmt: skip

# %% [markdown]
# **The variants.** Columns: clean accuracy; A_δ, accuracy under a W₂ adversary of radius δ by optimal allocation over
# the nearest adversarial examples found (an upper bound); the accuracy of the worst class under the same adversary.
# Each row changes one thing of the base recipe, or replaces its objective.

# %%
tables.finetuning(record)

# %% [markdown]
# The vertical line is the pre-trained network. Gains are comparable only at equal clean accuracy, and one seed moves
# them by about a point: what moves less than that is no finding.

# %%
figures.variants(record)

# %% [markdown]
# **As attacks see it.** W-PGD at the same radii, Υ of ReDLR after training, gradient passes per training image. Where
# W-PGD rises and A_δ does not, the attack was made to fail rather than the network made robust.

# %%
tables.attacked(record)

# %% [markdown]
# During training: validation accuracies (validation images are cut from the training set and choose nothing; W-PGD at
# the middle radius), the tracked Υ, and the mean gradient norm relative to the first epoch. A norm that collapses
# while A_δ does not rise means masked gradients, not robustness.

# %%
figures.histories(record, shown)
