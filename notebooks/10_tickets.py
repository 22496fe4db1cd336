# %% [markdown]
# # 10 · Adversarial winning tickets
#
# *Question: is there a sparse network, found before any training, that trains to the robustness of the dense one?*
# Under gradient flow, training on adversarial images X′ moves logits by the tangent kernel Θ = JJᵀ, J = ∂f/∂θ. A mask
# whose outputs and adversarial kernel are those of the dense network should therefore train alike. And if it keeps the
# dynamics of *pointwise* adversarial training, does it also keep robustness against a *distributional* adversary?
#
# *Place in the paper: 6.12 Adversarial winning tickets; third-party networks: 7.*
# *Time: digits 1 min, zoo half an hour on a CPU.*

# %% tags=["parameters"] needs=[]
from_records = False  # True: show the committed results, compute nothing
data = "digits"
train_root = ""
test_root = ""
n_train = 0  # images; 0 means all
n_test = 0
architecture = "digits_cnn"
arguments = {"width": 8}
searches = {"clean ticket": "W_inf linf 0", "adversarial ticket": "W_inf linf 2/16"}  # whose images a search sees
search = {"iterations": 100, "refresh": 25, "batch_size": 16}  # of wdat.tickets.search.Search
rates = [0.003, 0.01, 0.03]  # of the searches, chosen from on validation images
validation = 0.15  # share of the training images
densities = [0.1, 0.3]  # shares of weights kept
seeds = [0, 1, 2]
recipe = {  # of all networks
    "objective": {"kind": "at", "delta": "2/16", "steps": 3},
    "epochs": 15,
    "lr": 0.05,
    "batch_size": 64,
    "clip": 1.0,
}
pointwise = ["1/16", "2/16"]  # radii, image by image
deltas = ["1/32", "1/16", "2/16"]  # W_2 radii
watched = 8  # images whose kernel is followed
epochs = [1, 5, 15]  # when
distances = {"steps": 8, "rivals": 3}  # settings of wdat.attacks.nearest.minimal_distances
jobs = 0  # runs at the same time; 0: as many as cores and memory allow
out = "figures/digits"
work = ".wdat/digits/made"

# %%
import torch
from torch import nn

from wdat.report import tickets as report
from wdat.studies.notebook import Study
from wdat.studies.tickets import tickets
from wdat.threats.ball import Threat
from wdat.tickets.kernels import tangent_kernel
from wdat.zoo.data import load_data

study = Study(
    out, work, from_records, data=data, train_root=train_root, test_root=test_root, n_train=n_train, n_test=n_test,
)  # fmt: skip

# %% [markdown]
# **By hand.** The kernel of a linear network is known: each logit is moved by ⟨x, x′⟩ + 1 (weights and bias), and by no
# other logit. For any network a small step of gradient descent on the mean loss of N images moves their logits by
# −(h/N) Θ ∇ℓ, up to h²: halving the step quarters what is left over.

# %%
few = load_data("digits", "test").take(8)
torch.manual_seed(0)
net = nn.Sequential(nn.Flatten(), nn.Linear(64, 10))
theta = tangent_kernel(net, few.x)
assert torch.allclose(theta[:, 3, :, 3], few.x.flatten(1) @ few.x.flatten(1).T + 1, atol=1e-4)
assert theta[:, 3, :, 4].abs().max() < 1e-6

deep = nn.Sequential(nn.Flatten(), nn.Linear(64, 16), nn.Tanh(), nn.Linear(16, 10))
logits = deep(few.x)
slopes = torch.autograd.grad(nn.functional.cross_entropy(logits, few.y), logits, retain_graph=True)[0]
promised = -torch.einsum("iajb,jb->ia", tangent_kernel(deep, few.x), slopes)
gradients = torch.autograd.grad(nn.functional.cross_entropy(logits, few.y), list(deep.parameters()))
names = [name for name, _ in deep.named_parameters()]
for step in (0.1, 0.05):
    moved = {n: w - step * g for n, w, g in zip(names, deep.parameters(), gradients, strict=True)}
    left = torch.func.functional_call(deep, moved, (few.x,)) - logits - step * promised
    print(f"step {step:g}: left over {left.detach().norm():.2e}")

# %% [markdown]
# **The data set.** For every seed a fresh dense network; masks by each baseline (random; the largest weights; SNIP, the
# largest |weight × gradient|) and by each search (on clean and on adversarial images); then the same adversarial
# training for all, and minimal distances on the test images. The learning rate of a search is chosen before, at the
# largest density, by the accuracy under attack on validation images cut from the training images, over all seeds.

# %%
record = study.record(
    "10_tickets", "tickets", tickets, study.train, study.test, [Threat(d) for d in deltas], study.work / "10", seeds,
    architecture=architecture, arguments=arguments, searches=searches, search=search, rates=rates, densities=densities,
    recipe=recipe, pointwise=pointwise, watched=watched, epochs=epochs, distances=distances, device=study.device,
    validation=validation, jobs=jobs, seeds=seeds,
    config={"architecture": architecture, "recipe": recipe, "search": search},
)  # fmt: skip

# %% [markdown]
# **Before and after training.** Columns: clean accuracy; accuracy at pointwise radii (W_∞) and under W₂, both by the
# nearest adversarial examples found (upper bounds); relative distance of the adversarial kernel to the dense network's,
# at initialisation and at the end.

# %%
report.tickets(record)

# %% [markdown]
# **Against density.** The grey line is the dense network. A mask keeps pointwise robustness where its line meets the
# grey one in the middle panel, and distributional robustness where it does on the right.

# %%
report.density(record)

# %% [markdown]
# **Along training.** How far each kernel is from the dense network's at the same epoch. The grey line is how far the
# dense kernel has moved from its own start: where it is high, the kernel at initialisation says little about the end.

# %%
report.kernel(record)
