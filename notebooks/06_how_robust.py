# %% [markdown]
# # 6 · How robust is it really?
#
# *Question: what is A_δ, for every δ and every p at once?* Under 0-1 loss the best Wasserstein adversary solves a
# fractional knapsack over the images' minimal distances. With distances found by an attack this bounds A_δ from above,
# with certified radii from below, and both hold at every δ, not only to first order.
#
# *Place in the paper: 6.7 How robust is it really?; third-party networks: 7.*
# *Time: digits 4 min, zoo 45 min on a CPU, cifar10 2 h on a GPU.*

# %% tags=["parameters"]
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
attacked = []  # radii of AutoAttack, pointwise, in the first norm
autoattacked = 100  # images it is run on
longer = 10  # how many times longer the search is that tests convergence
batch_size = 128
jobs = 0  # runs at the same time; 0: as many as cores and memory allow
out = "figures/digits"
work = ".wdat/digits/made"

# %%
from wdat import records
from wdat.report import figures, tables
from wdat.studies import experiments
from wdat.studies.verification import verify
from wdat.threats.ball import Threat

root, device = records.root(), records.pick_device()
print(records.device_line())

# %%
test = experiments.load_images(data, "test", root, test_root, n_test)
models = experiments.load_networks(networks, root, weights, device, dataset=dataset, threat=threat)
results = experiments.across_networks(
    models, test, [Threat(d, 2, r) for r in norms for d in deltas[r]] + [Threat(d, "inf", norms[0]) for d in attacked],
    root / work / "06", losses=losses, steps=steps, budget_attack=budget_attack, dual=dual, search=search,
    certified=certified, autoattacked=autoattacked, orders=[1, 2, float("inf")], curve=121,
    batch_size=batch_size, jobs=jobs,
)  # fmt: skip
record = records.write(root / out / "06_how_robust.json", "evaluation", results, {"networks": networks})

# %% [markdown]
# **The sandwich.** Blue: exact allocation with its 95 % band over the draw of test images. Markers: attacks at single
# radii. Dashed: the mixture of pointwise attacks. Green: certified lower bound, on a part of the images where that is
# dear. Dotted: the first-order lower bound, which is no bound beyond small δ.

# %%
figures.sandwich(record, norms[0])

# %%
figures.sandwich(record, norms[-1])

# %%
tables.evaluation(record)

# %% [markdown]
# **Every order.** The same distances give the curve of every p. p = ∞ is the usual pointwise threat.

# %%
figures.curves(record)

# %% [markdown]
# **Ranks.** Does the order of the networks depend on the threat?

# %%
figures.ranks(record)

# %%
tables.ranks(record)

# %% [markdown]
# **The loss.** The dual attack shares the budget out by prices: each image gets the radius at which its loss is worth
# what the radius costs. Both are lower bounds on V(δ).

# %%
tables.dual(record)

# %% [markdown]
# **Where first-order bounds fail.** The smallest radius at which R^l lies above the exact allocation, which itself
# bounds the true ratio from above.

# %%
tables.failures(record)

# %% [markdown]
# **Can it be believed?** Three checks. The exact adversary hands out its distribution, and its accuracy and W₂ cost are
# measured again. A search about ten times longer is run: what it still gains is what the curves may be too high by. And
# the certificates are attacked inside their balls, where nothing may be found.

# %%
middle = Threat(deltas[norms[0]][1], 2, norms[0])
checks = verify(
    models, test, [Threat(d, 2, r) for r in norms for d in deltas[r]], root / work / "06", middle=middle, search=search,
    longer=longer, certified=certified, batch_size=batch_size, jobs=jobs,
)  # fmt: skip
record = records.write(root / out / "06_verification.json", "verification", checks, {"networks": networks})

# %%
tables.verified(record)

# %%
tables.converged(record)

# %%
tables.probed(record)
