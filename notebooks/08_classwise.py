# %% [markdown]
# # 8 · Who pays? Robustness class by class
#
# *Question: does a distributional adversary make classes more unequal than a pointwise one, whose images does it spend
# its budget on, and can the worst class be raised?* Robustness differs strongly between classes (Tian et al. 2021).
# The optimal W_p adversary takes the nearest images first, whatever their class. So of every class it leaves exactly
# what a pointwise adversary leaves at the largest distance it pays for, t(δ) > δ: inequality is one curve along
# the average, and p only says how far a radius takes us along it.
#
# *Temperature-PGD:* cross-entropy of logits / T climbs other slopes than at T = 1; the worst case over T is the attack.
#
# *Place in the paper: 6.10 Who pays: class by class; third-party networks: 7.*
# *Time: digits 1 min, zoo 2 h on a CPU.*

# %% tags=["parameters"] needs=["00"]
from_records = False  # True: show the committed results, compute nothing
data = "digits"
train_root = ""
test_root = ""
n_train = 0  # images; 0 means all
n_test = 0
networks = [".wdat/digits/made/zoo/trades.yaml"]
start_from = ".wdat/digits/made/zoo/standard.yaml"  # network whose worst class is raised
weights = ""
dataset = "cifar10"  # of RobustBench names, with their threat
threat = "Linf"
size = 0  # side in pixels of folders of larger images; 0: as they are
r = "inf"
deltas = ["1/32", "1/16", "2/16"]  # W_2 radii, and pointwise ones beside them
attacked = ["2/16"]  # radii of Temperature-PGD
temperatures = [1, 2, 0.5, 0.2, 0.1, 0.02]
images = 0  # Temperature-PGD on so many images; 0: all
steps = 20  # of PGD
shown = ""  # network of the confusion matrices; "" means the last
search = {}  # settings of wdat.attacks.nearest.minimal_distances
rounds = {}  # settings of wdat.studies.worst_class.Rounds
pointwise = "2/16"  # radius of PGD where the worst class is raised
seeds = [0]
batch_size = 128
jobs = 0  # runs at the same time; 0: as many as cores and memory allow
out = "figures/digits"
work = ".wdat/digits/made"

# %%
import torch

from wdat.report import classwise as report
from wdat.studies.checkpoints import Measures
from wdat.studies.classwise import classwise
from wdat.studies.notebook import Study
from wdat.studies.worst_class import Rounds, worst_class
from wdat.threats.ball import Threat
from wdat.threats.losses import ce, tempered_ce

study = Study(
    out, work, from_records, data=data, networks=networks, train_root=train_root, test_root=test_root, n_train=n_train,
    n_test=n_test, weights=weights, dataset=dataset, threat=threat, size=size,
)  # fmt: skip
balls = [Threat(d, 2, r) for d in deltas]

# %% [markdown]
# **By hand.** An image that is 60 logits on the safe side: in float32 the probability of its class rounds to 1, the
# gradient of cross-entropy to 0, and PGD does not move. Divided by T = 0.1 it is 600 logits, and worse. What
# cross-entropy climbs, T·log Σ_{k≠y} exp(z_k / T) − z_y, has slope softmax_{k≠y}(z / T) − e_y at every T.

# %%
z, y = torch.tensor([[120.0, 60.0, 59.0]], requires_grad=True), torch.tensor([0])
(stalled,) = torch.autograd.grad(ce(z / 0.1, y).sum(), z)
(slope,) = torch.autograd.grad(tempered_ce(z, y, 1.0).sum(), z)
print("cross-entropy at T = 0.1:", stalled.tolist(), "stable, at T = 1:", slope.tolist())
assert stalled.abs().max() == 0 and torch.allclose(slope[0, 1:], z[0, 1:].softmax(0)) and slope[0, 0] == -1

# %%
record = study.record(
    "08_classwise", "classwise", classwise, study.networks, study.test, balls, study.work / "08", attacked=attacked,
    temperatures=temperatures, images=images, steps=steps, search=search, batch_size=batch_size, jobs=jobs,
)  # fmt: skip

# %% [markdown]
# **Every class.** Grey: clean. At the same radius the distributional adversary (blue) reaches further than the
# pointwise one (orange): it saves on the images that are near. Dotted: the averages.

# %%
report.bars(record)

# %% [markdown]
# **One curve.** Between the worst and the best class, along the average; below the dashed line classes are worse off
# than the average. Both adversaries move on it; at the same radius W₂ stands further down.

# %%
report.spread(record)

# %% [markdown]
# Columns: the average, the worst class, the difference of the best and the worst, the standard deviation; "reach" is
# t(δ), the largest distance paid for.

# %%
report.disparity(record)

# %% [markdown]
# **Who pays.** Share of the budget over share of the images, classes ranked at the smallest radius. Above 1 the
# adversary spends more on a class than on an average one. A class that is wrong already costs nothing.

# %%
report.budget(record)

# %% [markdown]
# **Taken for what.** Rows are classes, columns what they are taken for, in percent of the class, once the adversary has
# moved what it pays for to the nearest adversarial examples.

# %%
report.confusion(record, shown)

# %% [markdown]
# **Temperature-PGD.** Accuracy at each temperature, all at equal steps, and image by image the worst case over them.

# %%
report.temperatures(record)

# %% [markdown]
# **Raising the worst class.** One network is trained adversarially; then every method goes on from there for as many
# rounds: nothing changed; the adversarial loss weighted towards classes that stand badly under attack on validation
# images; radii by class, larger for classes that stand well. A bias on the logits comes after training, chosen on
# validation images under attack. All are attacked as they are.

# %%
start = Study(
    out, work, from_records, data=data, networks=[start_from], train_root=train_root, test_root=test_root,
    n_train=n_train, n_test=n_test, weights=weights, size=size,
)  # fmt: skip
raised = study.record(
    "08_worst_class", "worst-class", worst_class, start.first, start.train, start.test, Rounds(**rounds), seeds,
    Measures(Threat(pointwise, "inf", r), balls[1:], steps, search, batch_size), study.work / "08", seeds=seeds,
    jobs=jobs,
)  # fmt: skip

# %%
report.worst_class(raised)
