# %% [markdown]
# # 11 · Provably more accurate: a network behind noise
#
# *Question: what can be proved of a network of any size?* Gaussian noise in front of a network makes its probability
# g(x) of a right answer smooth: Φ⁻¹(g) changes by at most ‖x' − x‖₂/σ. Counting right answers among noise draws bounds
# g, and with it the accuracy of **one draw** under every W_p ball, at every δ and p, with a stated confidence.
#
# *Promised:* the accuracy of the randomised network under any distribution in the ball that was chosen before the draw.
# *Not promised:* that two draws agree, anything about the network without its noise, or robustness of every image
# (`wdat certify --autoattack N` reports AutoAttack's randomised setting at 8/255). l∞ comes in through √n, dear in high
# dimension. That the generator's normal numbers are normal is taken for granted.
#
# *Place in the paper: 6.8 Provably more accurate: a network behind noise; third-party networks: 7.*
# *Time: digits 2 min, zoo 2 h on a core, profile resnet18 1.5 h.*

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
sigmas = [0.25, 0.5]  # standard deviations of the noise, of pixels in [0, 1]
draws = [1000, 1000]  # of every image, in the mean, for each sigma
spread = False  # more draws where they move the curve, fewer elsewhere
precision = "float32"  # of the certified network's layers
recipe = {"objective": {"kind": "plain"}, "epochs": 10, "lr": 0.01}  # its noise is sigma
tunings = {  # recipes without noise, to compare with
    "W-TRADES": {
        "objective": {"kind": "w-trades", "delta": "1/2", "r": 2, "steps": 5},
        "epochs": 10, "lr": 0.01, "init": "perturb",
    },
    "PGD-AT": {
        "objective": {"kind": "at", "delta": "1/2", "r": 2, "steps": 5},
        "epochs": 10, "lr": 0.01, "init": "perturb",
    },
}  # fmt: skip
deltas = {"2": ["1/4", "1/2", "1"], "inf": ["1/32", "1/16"]}  # radii in each pixel norm
aims = {}  # points that should be proved more than is left, by threat ("W_2 l2 1/4"), and gained clean ("clean")
validation = 0.2  # share of the training images on which sigma is chosen
confidence = 0.999
attacked = 100  # images attacked through the noise
search = {}  # settings of wdat.attacks.nearest.minimal_distances, for the networks without noise
batch_size = 128
seed = 0
jobs = 0  # runs at the same time; 0: as many as cores and memory allow
out = "figures/digits"
work = ".wdat/digits/made"

# %%
import torch

from wdat.randomised.certificate import lower_curve
from wdat.report import randomised as report
from wdat.studies.notebook import Study
from wdat.studies.randomisation import randomised
from wdat.threats.ball import Threat

study = Study(
    out, work, from_records, data=data, networks=networks, train_root=train_root, test_root=test_root, n_train=n_train,
    n_test=n_test, weights=weights, dataset=dataset, threat=threat,
)  # fmt: skip

# %% [markdown]
# **By hand.** A linear classifier of two classes, right where ⟨w, x⟩ > 0. Behind noise it is right with probability
# g = Φ(⟨w, x⟩ / (σ‖w‖)), and the worst move of length r goes along −w: g falls to Φ(Φ⁻¹(g) − r/σ), exactly what the
# certificate allows. Below: g, g after the move counted among 100,000 draws, and the certificate for p = ∞.

# %%
generator, sigma, r = torch.Generator().manual_seed(seed), 0.5, 0.3
w, x = torch.randn(64, generator=generator), torch.rand(64, generator=generator)
x = x + (0.4 - w @ x / w.norm()) * w / w.norm()  # 0.4 from the boundary
noise = sigma * torch.randn(100_000, 64, generator=generator)
z = torch.tensor([0.4 / sigma])
moved = ((x - r * w / w.norm() + noise) @ w > 0).double().mean()
proved = lower_curve(z, [r], "inf", sigma=sigma, pixels=64)
print(f"g {float(torch.special.ndtr(z)):.4f}, after the move {float(moved):.4f}, certified {float(proved):.4f}")

# %% [markdown]
# **The data set.** Each network is fine-tuned with noise, right answers are counted, and the counts are turned into
# bounds; some images are attacked through the noise, which is the bracket's upper end. The network itself and its
# fine-tunings by W-TRADES and by PGD-AT, both in l2 balls of one radius, are attacked without noise. σ is chosen for
# each network and radius on validation images cut from the training images.

# %%
record = study.record(
    "11_randomised", "randomised", randomised, study.networks, study.train, study.test,
    [Threat(d, 2, norm) for norm in deltas for d in deltas[norm]], study.work / "11", sigmas=sigmas, draws=draws,
    recipe=recipe, tunings=tunings, search=search, aims=aims, validation=validation, confidence=confidence,
    attacked=attacked, curve=61, spread=spread, precision=precision, batch_size=batch_size, seed=seed, jobs=jobs,
)  # fmt: skip

# %% [markdown]
# **More proved than left?** Left by attack, the most of the network and of its fine-tunings: optimal allocation over
# the nearest adversarial examples found, an *upper* bound. Proved: one draw behind the chosen noise, a *lower* bound.

# %%
report.certified_aims(record)

# %% [markdown]
# **Every number.** Left by attack: the network as it was and fine-tuned, *upper* bounds. Certified: the randomised
# network, a *lower* bound with its confidence; "by" names the statement: on every image at once, or on the mean alone,
# where luck cancels. Vote: the majority of many draws.

# %%
report.certified(record)

# %% [markdown]
# **Every radius.** One draw and the vote, from the same counts; the statement is that on every image at once, triangles
# are the tighter one, open triangles what the attack through the noise leaves.

# %%
report.certified_curves(record, 2)

# %%
report.certified_curves(record, "inf")
