# %% [markdown]
# # 4 · Five networks, before and after
#
# *Question: does distributional fine-tuning raise W₂ robustness across networks, seen by an evaluation it was not
# trained on, and at what price?* Each network is fine-tuned by each method, at several settings of its knob, with
# several seeds and equal gradient passes; the test is the exact allocation over minimal distances, W-PGD with ReDLR,
# and pointwise accuracy. Methods are compared at equal clean accuracy, since robustness can always be bought with it.
#
# *Place in the paper: 6.5 Five networks, before and after; third-party networks: 7.*
# *Time: digits 15 min, zoo four hours on a CPU, cifar10 days on a GPU.*

# %% tags=["parameters"]
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
variants = []  # [{"name": ..., settings that differ from base, "sweep": [{...}, ...]}], see wdat.studies.sweeps.expand
ours = []  # methods to compare ...
controls = []  # ... with these at equal clean accuracy
seeds = [0, 1, 2]
measure = {}  # further settings of wdat.studies.study.Sweep
jobs = 0  # runs at the same time; 0: as many as cores and memory allow
out = "figures/digits"
work = ".wdat/digits/made"

# %%
from wdat import records
from wdat.report import figures, tables
from wdat.studies import experiments, sweeps
from wdat.studies.study import Sweep
from wdat.threats.ball import Threat

root, device = records.root(), records.pick_device()
print(records.device_line())

# %%
train = experiments.load_images(data, "train", root, train_root, n_train)
test = experiments.load_images(data, "test", root, test_root, n_test)
models = experiments.load_networks(networks, root, weights, device, dataset=dataset, threat=threat)
sweep = Sweep(base, variants, seeds, [Threat(d, 2, r) for d in deltas], ours=ours, controls=controls, **measure)
print(sweeps.forecast(models, train, sweep))
results = sweeps.finetuning(models, train, test, sweep, root / work / "04", jobs)
record = records.write(root / out / "04_five_networks.json", "finetuning", results, {"base": base}, seeds=seeds)

# %% [markdown]
# **The trade-off.** Each method is a line along its settings; thin lines lead from each setting through weights
# between (`interpolate`) back to the network before, at no further training. Rings mark what was chosen on validation
# images (cut from the training images, which the networks have seen in pre-training: they choose among settings, they
# measure nothing); crosses, where AutoAttack ran, add what it left more than the nearest points on the same images.

# %%
figures.tradeoff(record)

# %% [markdown]
# **Before and after**, the chosen settings. Columns: clean accuracy; AA, AutoAttack at the radius given, where it was
# run (first seed, part of the images); `W_∞ best`, pointwise accuracy by the nearest flipping points found; W₂ by W-PGD
# with ReDLR and by exact allocation; the worst class under the exact allocation at the smallest radius; Υ of ReDLR;
# gradient passes per training image. † marks a method none of whose settings keeps clean and pointwise accuracy.

# %%
tables.finetuning(record)

# %% [markdown]
# **At equal clean accuracy.** What each of our methods adds to the best pointwise control, with the interval of a
# paired bootstrap over the test images. To the right of the line the distributional objective pays.

# %%
tables.compared(record) if ours else None

# %%
figures.equal_clean(record) if ours else None
