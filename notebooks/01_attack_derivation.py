# %% [markdown]
# # 1 · From first-order theory to attacks
#
# *Question: how well does V(δ) ≈ V(0) + δΥ describe the loss under a distributional attack, and what does the
# attack it suggests do to images?* A Wasserstein adversary of order p may spend much on one image and nothing on
# another, as long as the p-mean of the displacements is at most δ. To first order it gives image i the budget
# ε_i = δ(‖∇J_i‖ₛ/Υ)^(q−1).
#
# *Place in the paper: 6.2 First order against measurement; third-party networks: 7.*
# *Time: digits 1 min, zoo 5 min on a CPU, cifar10 10 min on a GPU.*

# %% tags=["parameters"]
data = "digits"
test_root = ""  # folder of the test images; not used by digits
n_test = 0  # images; 0 means all
networks = [".wdat/digits/made/zoo/trades.yaml"]  # the first is studied
weights = ""  # folder of the weights, if they do not lie beside the cards
dataset = "cifar10"  # of RobustBench names, with their threat
threat = "Linf"
r = "inf"  # pixel norm
orders = [2, 4, "inf"]  # Wasserstein orders p
losses = ["ce", "dlr", "redlr"]
deltas = ["1/160", "1/80", "1/40", "1/20", "1/10"]  # radii of the ball, in pixel units of [0, 1]
steps = 50  # of W-PGD
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
test = experiments.load_images(data, "test", root, test_root, n_test)
models = experiments.load_networks(networks[:1], root, weights, device, dataset=dataset, threat=threat)
results = experiments.attack_theory(
    *models.values(), test, r=parse_number(r), orders=[parse_number(p) for p in orders], losses=losses, deltas=deltas,
    steps=steps, jobs=jobs,
)  # fmt: skip
record = records.write(root / out / "01_attack_derivation.json", "attack-theory", results, {"networks": networks[:1]})

# %% [markdown]
# **Slope.** Left: the mean loss under W-FGSM, W-PGD and, for CE, the dual attack (budgets from the price at which the
# set's W_p distance is δ, instead of clean gradients) against V(0) + δΥ. Many pixels of real images sit exactly at 0
# or 1, and an attack that must return images cannot push them outward: the dashed line uses only the components of the
# gradient that stay in the box. Right: what the first order leaves out. On a smooth network it shrinks like δ²; a ReLU
# network is piecewise linear, so the remainder is smaller at small δ and grows in steps.

# %%
figures.theory(record)

# %% [markdown]
# **Budgets on images.** From the smallest to the largest budget: images far from the boundary, or already
# misclassified (ReDLR has no gradient there), get nothing; the budget goes where the loss is steep.

# %%
figures.images(record)

# %% [markdown]
# **Which loss.** CE and DLR spend part of the budget on images that are wrong already (right panel). ReDLR, the
# negative part of DLR, spends nothing there. At p = ∞ every image has the same radius and the choice matters less.

# %%
figures.losses(record)

# %% [markdown]
# **p = ∞ is the usual threat.** The largest pixel difference between W-FGSM and FGSM, and between W-PGD and PGD:

# %%
results["pointwise"]
