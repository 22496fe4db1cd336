# %% [markdown]
# # 9 · Many workers: the same training, faster or cheaper
#
# *Question: what do more workers, larger batches and compressed gradients cost in accuracy, and what do they save?*
# Zhang et al. (2022) train adversarially on many machines: each attacks its share of the images, gradients are
# quantised and averaged, steps are layer-wise (LAMB) so that batches can be large.
#
# *Promised:* accuracy by batch size, optimiser and compression, bytes counted; step times by workers, as medians under
# a stated load; a cost model fitted to them, and projected with assumptions that are named. *Not promised:* that
# processes that share two cores say how GPUs scale. Workers talk by gloo here; NCCL, which GPUs use, is untested.
#
# *Place in the paper: 6.13 Many workers; third-party networks: 7.*
# *Time: digits 1 min.*

# %% tags=["parameters"] needs=[]
from_records = False  # True: show the committed results, compute nothing
data = "digits"
train_root = ""
test_root = ""
n_train = 0  # images; 0 means all
n_test = 0
architecture = "digits_cnn"
arguments = {"width": 8}
recipe = {"objective": {"kind": "at", "delta": "2/16", "steps": 2}, "epochs": 8, "clip": 1.0}  # of all runs
batches = {  # what differs; the first is trained with every compression
    "64, SGD": {"batch_size": 64, "lr": 0.05},
    "256, SGD": {"batch_size": 256, "lr": 0.05, "optimiser": {"reference": 64, "warmup": 1}},
    "256, LARS": {"batch_size": 256, "lr": 0.05, "optimiser": {"kind": "lars", "warmup": 1}},
    "256, LAMB": {"batch_size": 256, "lr": 0.05, "optimiser": {"kind": "lamb", "warmup": 1}},
}
compressions = {
    "fp16": {"kind": "fp16"}, "PowerSGD": {"kind": "powersgd"},
    "quantised, one-sided": {"kind": "quantised", "both": False}, "quantised, two-sided": {"kind": "quantised"},
}  # fmt: skip
workers = [1, 2, 4]  # processes; every run of the two tables is by the second
timed = [64, 256]  # batch sizes whose steps are timed by every number of workers
timed_epochs = 2
transfers = [4000, 400000, 4000000]  # bytes of all-reduces that are timed
seeds = [0, 1, 2]
pointwise = "1/16"  # radius, image by image
deltas = ["1/16"]  # W_2 radii
r = "inf"
distances = {"steps": 8, "rivals": 3}  # settings of wdat.attacks.nearest.minimal_distances
projection = {  # assumed, not measured: ImageNet, batches of all GPUs together, 4 attack steps and a training step;
    # ResNet-50 on one A100 in TF32, as NVIDIA publishes it (DeepLearningExamples); seconds a message; 200 Gb/s a GPU
    "gpus": [8, 64, 512], "images": 1281167, "batch": 4096, "passes": 5, "images_per_second": 938.0,
    "parameters": 25600000.0, "latency": 0.000005, "bandwidth": 25e9,
}  # fmt: skip
out = "figures/digits"
work = ".wdat/digits/made"

# %%
import torch
from torch import nn

from wdat.report import scaling as report
from wdat.studies.notebook import Study
from wdat.studies.scaling import scaling
from wdat.training.compression import quantise, restored
from wdat.zoo.data import load_data

study = Study(
    out, work, from_records, data=data, train_root=train_root, test_root=test_root, n_train=n_train, n_test=n_test,
)  # fmt: skip

# %% [markdown]
# **By hand.** Two workers with half a batch each: the average of their gradients is the joined batch's. And five
# numbers quantised: each goes to one of the two levels beside it, at random so that the mean is right. Over many draws
# the mean comes to the numbers, and the squared error stays below min(d/s², √d/s) ‖g‖².

# %%
few = load_data("digits", "test").take(8)
torch.manual_seed(0)
net = nn.Sequential(nn.Flatten(), nn.Linear(64, 10))
halves = [(few.x[:4], few.y[:4]), (few.x[4:], few.y[4:])]
own = [torch.autograd.grad(nn.functional.cross_entropy(net(x), y), net[1].weight)[0] for x, y in halves]
whole = torch.autograd.grad(nn.functional.cross_entropy(net(few.x), few.y), net[1].weight)[0]
assert torch.allclose((own[0] + own[1]) / 2, whole, atol=1e-7)

g, levels = torch.tensor([0.3, -0.1, 0.02, 0.0, 0.5]), 4
step = g.norm() / levels
lower = (g.abs() / step).floor()
share = g.abs() / step - lower  # how often the upper level is taken
assert torch.allclose(g.sign() * step * ((1 - share) * lower + share * (lower + 1)), g)
generator = torch.Generator().manual_seed(0)
draws = torch.stack([restored(*quantise([g], levels, generator), [5], levels) for _ in range(4000)])
error, bound = (draws - g).square().sum(1).mean() / g.norm() ** 2, min(5 / levels**2, 5**0.5 / levels)
for name, values in {"numbers": g, "one draw": draws[0], "mean": draws.mean(0)}.items():
    print(f"{name:9}", ", ".join(f"{value:6.3f}" for value in values.tolist()))
print(f"squared error {error:.3f} of at most {bound:.3f}")

# %% [markdown]
# **The data set.** Fresh networks, trained by two workers with every batch size, optimiser and compression; then steps
# timed by every number of workers, and all-reduces of several sizes. Times are medians.

# %%
record = study.record(
    "09_distributed", "scaling", scaling, study.train, study.test, study.work / "09", seeds,
    architecture=architecture, arguments=arguments, recipe=recipe, workers=workers, batches=batches,
    compressions=compressions, timed=timed, timed_epochs=timed_epochs, transfers=transfers, pointwise=pointwise,
    deltas=deltas, r=r, distances=distances, projection=projection, seeds=seeds,
    config={"architecture": architecture, "recipe": recipe, "batches": batches, "compressions": compressions},
)  # fmt: skip

# %% [markdown]
# **Accuracy and bytes.** Large batches take fewer steps an epoch; whether layer-wise rates make up for it is in the
# first rows. Below, the same training with compressed gradients: "change" is against uncompressed ones, by seed.

# %%
report.recipes(record)

# %% [markdown]
# **Throughput.** Workers that exceed the cores wait for each other, and so does a machine that has other work: the load
# average says how many processes wanted a core.

# %%
report.steps(record)

# %% [markdown]
# **What a step costs.** seconds = overhead + compute × images + latency × messages + bytes / bandwidth, by non-negative
# least squares of relative errors. Left: steps (marks) and fit (lines); middle: all-reduces; right: the same formula
# with the assumed figures of GPUs and network.

# %%
report.costs(record)

# %% [markdown]
# **Projected to ImageNet.** No number of this table is measured but the shares of bytes.

# %%
report.projected(record)
