# %% [markdown]
# # 12 · Trained for the noise: clean accuracy against what is proved
#
# *Question: which training proves most?* Noise alone, adversarial examples found through the noise (SmoothAdv; with one
# radius, or with budgets by image), consistency of an image's draws, MACER's radius, and the certificate of notebook 11
# itself as objective; all at equal passes, each with its setting chosen on validation images.
#
# *Place in the paper: 6.11 Trained for the noise; third-party networks: 7.*
# *Time: digits 1 min, zoo 20 min on a core.*

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
deltas = ["1/4", "1/2", "1"]  # W_2 radii in l2
base = {}  # recipe, settings of wdat.training.recipes.Recipe
variants = []  # [{"name": ..., settings that differ from base, "sweep": [...]}]
starts = {}  # other networks for the first variant: cards, or recipes that fine-tune the first network
sigmas = [0.25, 0.5]  # standard deviations of the noise, of pixels in [0, 1]
seeds = [0, 1]
validation = 0.2  # share of the training images held out
draws = 200  # of every image
confidence = 0.999  # of each run's bounds
jobs = 0  # runs at the same time; 0: as many as cores and memory allow
out = "figures/digits"
work = ".wdat/digits/made"

# %%
import torch

from wdat.report import frontier as report
from wdat.studies.frontier import frontier
from wdat.studies.notebook import Study
from wdat.threats.ball import Threat
from wdat.training.smoothing import worst

study = Study(
    out, work, from_records, data=data, networks=networks, train_root=train_root, test_root=test_root, n_train=n_train,
    n_test=n_test, weights=weights, dataset=dataset, threat=threat,
)  # fmt: skip

# %% [markdown]
# **By hand.** Four images with z = Φ⁻¹(g) = −1, 0.5, 1.5, 4 and δ = σ, p = 2. At the best price λ the adversary moves
# each image by the u = r/σ that minimises Φ(z − u) + λu²; the bound grows with zᵢ like φ(zᵢ − uᵢ)/4, with u and λ held
# (Danskin, envelope theorem). It is this that training follows: the image that is lost and the one that is too dear for
# the adversary hardly count.

# %%
z = torch.tensor([-1.0, 0.5, 1.5, 4.0], requires_grad=True)
values, price = worst(z, d=1.0, p=2)
bound = values.mean() - price
bound.backward()
print(f"bound {float(bound.detach()):.3f}; price {float(price):.3f}; weights", [round(v, 4) for v in z.grad.tolist()])

# %% [markdown]
# **The data set.** Every method, setting, σ and seed is a run; settings and, at each radius, σ are chosen by what
# validation draws suggest; the chosen runs are certified on the test images. The first method also starts from other
# networks: one trained naturally, and one fine-tuned by W-TRADES.

# %%
record = study.record(
    "12_noise_training", "frontier", frontier, study.networks, study.train, study.test,
    [Threat(d, 2, 2) for d in deltas], study.work / "12", base=base, variants=variants, sigmas=sigmas, repeats=seeds,
    validation=validation, draws=draws, confidence=confidence, starts=starts, jobs=jobs, seeds=seeds,
)  # fmt: skip

# %% [markdown]
# **The frontier.** What each method gains on noise alone, at the σ chosen at that radius: further right is more
# accurate without an adversary, further up is proved under one.

# %%
report.frontiers(record)

# %%
report.frontier(record)
