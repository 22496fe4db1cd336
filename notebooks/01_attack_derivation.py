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

# %% tags=["parameters"] needs=["00"]
from_records = False  # True: show the committed results, compute nothing
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
batch_size = 128
jobs = 0  # runs at the same time; 0: as many as cores and memory allow
out = "figures/digits"
work = ".wdat/digits/made"

# %%
import torch
from torch import nn
from torch.nn.functional import cross_entropy

from wdat import records
from wdat.attacks.pgd import attack
from wdat.report import figures
from wdat.studies import experiments
from wdat.studies.notebook import Study
from wdat.threats.ball import Threat, parse_number
from wdat.threats.sensitivity import dual_norms
from wdat.zoo.data import load_data

study = Study(
    out, work, from_records, data=data, networks=networks[:1], test_root=test_root, n_test=n_test, weights=weights,
    dataset=dataset, threat=threat,
)  # fmt: skip

# %% [markdown]
# **By hand.** Eight digits, an untrained linear network, cross-entropy, p = 2 and pixels measured by ℓ∞, whose dual
# norm is ℓ₁. Five lines give Υ and the budgets; the library gives the same for any network, loss, p and r. The
# budgets' p-mean is δ: what one image gets more, the others get less.

# %%
few = load_data("digits", "test").take(8)
torch.manual_seed(0)
net, x, delta = nn.Sequential(nn.Flatten(), nn.Linear(64, 10)), few.x.requires_grad_(), 0.1

(gradient,) = torch.autograd.grad(cross_entropy(net(x), few.y, reduction="sum"), x)
norms = gradient.flatten(1).abs().sum(1)
upsilon = norms.square().mean().sqrt()
budgets = delta * norms / upsilon
assert torch.allclose(budgets.square().mean().sqrt(), torch.tensor(delta))

ball = Threat(delta, p=2, r="inf")
assert torch.allclose(dual_norms(net, few.x, few.y, ball, "ce"), norms)
assert torch.allclose(ball.budgets(norms), budgets)
print(budgets)

# %%
record = study.record(
    "01_attack_derivation", "attack-theory", experiments.attack_theory, study.first, study.test, r=parse_number(r),
    orders=[parse_number(p) for p in orders], losses=losses, deltas=deltas, steps=steps,
    batch_size=batch_size, jobs=jobs,
)  # fmt: skip

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
# **The published attack.** The authors’ code makes three choices that the default does not (`reference=True`): at
# p = ∞ one iterate is returned for the whole set instead of each image's best; at p = ∞ in ℓ₂ every displacement is
# stretched to exactly δ, also one inside the ball; and a tie in accuracy is not broken by the loss. A small network,
# trained here, shows what that is worth at equal steps: images still classified correctly, in %, and passes an image.
# At p = 2 the two find the same, the default for fewer passes; at p = ∞ in ℓ₂ stretching flips a few images more.

# %%
train, test = (load_data("digits", split) for split in ("train", "test"))
small = nn.Sequential(nn.Flatten(), nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 10))
optimiser = torch.optim.Adam(small.parameters(), 0.02)
for _ in range(100):
    optimiser.zero_grad()
    cross_entropy(small(train.x), train.y).backward()
    optimiser.step()

for ball in (Threat(d, p, norm) for norm, d in (("inf", "1/16"), ("2", "1/2")) for p in (2, "inf")):
    published, default = (attack(small, test.x, test.y, ball, steps=steps, reference=own) for own in (True, False))
    print(f"{ball}: published {published.accuracy:.1%}, {published.passes:.0f} passes; "
          f"default {default.accuracy:.1%}, {default.passes:.0f} passes")  # fmt: skip

# %% [markdown]
# **p = ∞ is the usual threat.** The largest pixel difference between W-FGSM and FGSM, and between W-PGD and PGD:

# %%
records.read(record)["results"]["pointwise"]
