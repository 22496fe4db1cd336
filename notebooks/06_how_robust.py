# %% [markdown]
# # 6 · How robust is it really?
#
# *Question: what is A_δ, for every δ and every p at once?* Under 0-1 loss the best Wasserstein adversary solves a
# fractional knapsack over the images' minimal distances. With distances found by an attack this bounds A_δ from above,
# with certified radii from below, and both hold at every δ, not only to first order.
#
# *Place in the paper: 6.7 How robust is it really?; third-party networks: 7.*
# *Time: digits 2 min, zoo 1 h on two cores, cifar10 2 h on a GPU.*

# %% tags=["parameters"] needs=["00", "05"]
from_records = False  # True: show the committed results, compute nothing
data = "digits"
test_root = ""
n_test = 0  # images; 0 means all
networks = [".wdat/digits/made/zoo/trades.yaml"]
weights = ""
dataset = "cifar10"  # of RobustBench names, with their threat
threat = "Linf"
norms = ["inf", "2"]  # pixel norms
deltas = {"inf": ["1/32", "1/16", "2/16", "3/16"], "2": ["1/4", "1/2", "1"]}
losses = ["redlr", "ce", "dlr"]
steps = 50
budget_attack = True  # also W-PGD-Budget
dual = True  # also the dual attack on the loss
search = {}  # settings of wdat.attacks.nearest.minimal_distances
certified = 100  # images to certify
branching = 0.0  # minutes of branch and bound for each network and norm, beyond CROWN
attacked = []  # radii of AutoAttack, pointwise, in the first norm
autoattacked = 100  # images it is run on
longer = 10  # how many times longer the search is that tests convergence
batch_size = 128
jobs = 0  # runs at the same time; 0: as many as cores and memory allow
out = "figures/digits"
work = ".wdat/digits/made"

# %%
import torch

from wdat.accuracy.allocation import accuracy_curve
from wdat.report import figures, tables
from wdat.studies import experiments
from wdat.studies.notebook import Study
from wdat.studies.verification import verify
from wdat.threats.ball import Threat

study = Study(
    out, work, from_records, data=data, networks=networks, test_root=test_root, n_test=n_test, weights=weights,
    dataset=dataset, threat=threat,
)  # fmt: skip
balls = [Threat(d, 2, r) for r in norms for d in deltas[r]]

# %% [markdown]
# **By hand.** Five images with these distances to their nearest adversarial examples (the first is wrong already), p =
# 2, δ = 0.2: the adversary may pay 5·0.2² = 0.2 in all and flips the nearest images first. Three cost 0 + 0.01 + 0.04;
# of the fourth, which costs 0.25, the remaining 0.15 pays for a share of 0.6. Left: 1 + 0.4 of 5.

# %%
distance = torch.tensor([0.0, 0.1, 0.2, 0.5, 0.9]).double()
budget = 5 * 0.2**2
before = distance.square().cumsum(0) - distance.square()  # spent when an image's turn comes
share = ((budget - before) / distance.square().clamp_min(1e-9)).clamp(0, 1)
by_hand = 1 - share.mean()
assert torch.allclose(by_hand, torch.tensor(1.4 / 5).double())
assert torch.allclose(accuracy_curve(distance, 0.2, p=2), by_hand)

# %%
record = study.record(
    "06_how_robust", "evaluation", experiments.across_networks, study.networks, study.test,
    balls + [Threat(d, "inf", norms[0]) for d in attacked], study.work / "evaluation", losses=losses, steps=steps,
    budget_attack=budget_attack, dual=dual, search=search, certified=certified, branching_minutes=branching,
    autoattacked=autoattacked, orders=[1, 2, float("inf")], curve=121, batch_size=batch_size, jobs=jobs,
)  # fmt: skip

# %% [markdown]
# **The bracket.** Blue: optimal allocation (upper bound) with its 95 % band over the draw of test images. Markers:
# attacks at single radii. Dashed: the mixture of pointwise attacks. Green: certified (lower bound), on a part of the
# images where that is dear; rings are optimal allocation on the same ones. Shaded: the gap, dark what branch and bound
# closed of what CROWN alone had left, light what is open. Dotted: the first-order lower bound, which is no bound beyond
# small δ.

# %%
figures.bracket(record, norms[0])

# %%
figures.bracket(record, norms[-1])

# %% [markdown]
# **The gap close by.** The same bracket as far as anything is proved: between the two green lines is what branch and
# bound added to CROWN in its minutes. The adversary flips what resists least first, so radii raised a little on many
# images move the lower curve more than those raised far on few.

# %%
figures.gap(record, norms[0])

# %%
figures.gap(record, norms[-1])

# %% [markdown]
# **In numbers.** Columns: clean accuracy; W-PGD with ReDLR; optimal allocation (upper bound) with its 95 % band, on all
# test images; the bracket, certified (lower bound) to optimal allocation, and AutoAttack (p = ∞ alone; in brackets what
# the nearest adversarial examples leave), each on the n images that the heading names: compare them within a cell, not
# with the columns of all images. CROWN alone: the lower end before branch and bound.

# %%
tables.evaluation(record)

# %% [markdown]
# **Every order.** The same distances give the curve of every p. p = ∞ is the usual pointwise threat.

# %%
figures.curves(record)

# %% [markdown]
# **Ranks.** Does the order of the networks depend on the threat? In the table: Kendall's τ between the orders under W₂
# and W_∞ (1: the same, −1: reversed), and how many pairs of networks are in opposite order.

# %%
figures.ranks(record)

# %%
tables.ranks(record)

# %% [markdown]
# **The loss.** The dual attack shares the budget out by prices: each image gets the radius at which its loss is worth
# what the radius costs, the dual multiplier. Both are lower bounds on V(δ), the highest mean cross-entropy; columns:
# clean V(0), W-PGD's, the dual attack's, and what its own curves of loss over radius promised. (Not run in the profile
# digits, where notebook 01 compares the two.)

# %%
tables.dual(record)

# %% [markdown]
# **Where first-order bounds fail.** The smallest radius at which R^l lies above the ratio by optimal
# allocation, which itself bounds the true one from above.

# %%
tables.failures(record)

# %% [markdown]
# **Can it be believed?** Three checks. The adversary of the optimal allocation hands out its distribution, and its
# accuracy and W₂ cost are measured again. A search about ten times longer is run: what it still gains is what the
# curves may be too high by. And the certificates are attacked inside their balls, where nothing may be found.

# %%
record = study.record(
    "06_verification", "verification", verify, study.networks, study.test, balls, study.work / "evaluation",
    middle=balls[1], search=search, longer=longer, certified=certified, branching_minutes=branching,
    batch_size=batch_size, jobs=jobs,
)  # fmt: skip

# %% [markdown]
# Handed out and measured again: accuracies claimed and measured, the W_p cost over δ (at most 1), all pixels in [0, 1].

# %%
tables.verified(record)

# %% [markdown]
# The longer search: passes an image of both, the largest gain in points of accuracy and at which δ, and by how much its
# last restart still lowered the distances.

# %%
tables.converged(record)

# %% [markdown]
# Attacks on certificates: images with a certified ball, probes inside, and how many were misclassified (one refutes).

# %%
tables.probed(record)
