# %% [markdown]
# # 5 · Bounds on the robustness ratio
#
# *Question: where do the first-order bounds R^u and R^l enclose the true ratio R_δ = A_δ / A?* R^u comes from an
# attack, R^l from the loss and Υ. The black curve is the exact allocation over minimal distances.
#
# *Place in the paper: 6.6 Where first-order bounds end; third-party networks: 7.*
# *Time: digits 1 min, zoo 5 min on a CPU, cifar10 1 h on a GPU.*

# %% tags=["parameters"]
data = "digits"
test_root = ""
n_test = 0  # images; 0 means all
networks = [".wdat/digits/made/zoo/trades.yaml"]
weights = ""
dataset = "cifar10"  # of RobustBench names, with their threat
threat = "Linf"
r = "inf"
deltas = ["1/64", "1/32", "1/16", "2/16", "3/16"]
losses = ["redlr", "ce"]
steps = 50
search = {}  # settings of wdat.attacks.nearest.minimal_distances
batch_size = 128
jobs = 0  # runs at the same time; 0: as many as cores and memory allow
out = "figures/digits"
work = ".wdat/digits/made"

# %%
from wdat import records
from wdat.report import figures
from wdat.studies import experiments
from wdat.threats.ball import Threat

root, device = records.root(), records.pick_device()
print(records.device_line())

# %%
test = experiments.load_images(data, "test", root, test_root, n_test)
models = experiments.load_networks(networks, root, weights, device, dataset=dataset, threat=threat)
results = experiments.across_networks(
    models, test, [Threat(d, 2, r) for d in deltas], root / work / "05", losses=losses, steps=steps, search=search,
    orders=[2], curve=61, batch_size=batch_size, jobs=jobs,
)  # fmt: skip
record = records.write(root / out / "05_bounds.json", "evaluation", results, {"networks": networks})

# %%
figures.bounds(record)

# %% [markdown]
# R^u comes from one attack, so it can only lie above the true ratio; its gap to the black curve is what W-PGD leaves on
# the table. R̃^l and R̄^l are lower bounds only up to o(δ): where one lies above the black curve, which itself bounds the
# true ratio from above, it is no bound any more. Negative values say nothing and are cut.
