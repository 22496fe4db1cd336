# %% [markdown]
# # 4 · Five networks, before and after
#
# *Question: does distributional fine-tuning raise W₂ robustness across networks, seen by an evaluation it was not
# trained on, and at what price?* Each network is fine-tuned by each method with several seeds; the test is W-PGD with
# ReDLR, the exact allocation over minimal distances, and pointwise accuracy.
#
# *Place in the paper: section 5.4, the main table. Time: digits 5 min, zoo hours on a CPU, cifar10 a day on a GPU.*

# %% tags=["parameters"]
data = "digits"
train_root = ""
test_root = ""
n_train = 0  # images; 0 means all
n_test = 0
networks = [".wdat/digits/work/zoo/trades.yaml"]
weights = ""
dataset = "cifar10"  # of RobustBench names, with their threat
threat = "Linf"
r = "inf"
deltas = ["1/16", "2/16", "3/16"]  # W_2 radii of the evaluation
base = {}  # recipe, settings of wdat.finetuning.Recipe
variants = []  # [{"name": ..., settings that differ from base}]
seeds = [0, 1, 2]
measure = {}  # settings of wdat.studies.summarise
out = "figures/digits"
work = ".wdat/digits/work"

# %%
from wdat import plots, records, studies, tables
from wdat.threat import Threat

root, device = records.root(), records.pick_device()
print(records.device_line())

# %%
train = studies.load_images(data, "train", root, train_root, n_train)
test = studies.load_images(data, "test", root, test_root, n_test)
models = studies.load_networks(networks, root, weights, device, dataset=dataset, threat=threat)
results = studies.finetuning(
    models, train, test, base=base, variants=variants, seeds=seeds, threats=[Threat(d, 2, r) for d in deltas],
    work=root / work / "04", measure=measure,
)  # fmt: skip
record = records.write(root / out / "04_five_networks.json", "finetuning", results, {"base": base}, seeds=seeds)

# %% [markdown]
# Columns: clean accuracy; AA, AutoAttack at the radius given, where it was run; `W_∞ best`, pointwise accuracy by the
# nearest flipping points found; W₂ by W-PGD with ReDLR and by exact allocation; the worst class under the exact
# allocation at the smallest radius; Υ of ReDLR; gradient passes per training image.

# %%
tables.finetuning(record)

# %%
plots.tradeoff(record)
