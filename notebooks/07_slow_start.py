# %% [markdown]
# # 7 · Slow start, fast decay: robust in ten epochs?
#
# *Question: does the learning-rate schedule alone turn a natural network into a robust one at a fraction of the cost?*
# Jeddi, Shafiee and Wong (2020) claim that ten epochs of PGD fine-tuning with a rate that rises slowly and falls fast
# equal adversarial training from scratch at 8 to 10 times less cost, and without its over-fitting.
#
# *Promised:* the natural network fine-tuned by every schedule at equal cost, and the same objective from fresh weights
# at several costs, by the same measures; cost counted in passes, last epoch against best. A result against the claim is
# reported as it is.
#
# *Place in the paper: 6.9 Slow start, fast decay; third-party networks: 7.*
# *Time: digits 1 min, zoo 1 h on a CPU.*

# %% tags=["parameters"] needs=["00"]
from_records = False  # True: show the committed results, compute nothing
data = "digits"
train_root = ""
test_root = ""
n_train = 0  # images; 0 means all
n_test = 0
networks = [".wdat/digits/made/zoo/standard.yaml"]  # naturally trained
weights = ""
dataset = "cifar10"  # of RobustBench names, with their threat
threat = "Linf"
size = 0  # side in pixels of folders of larger images; 0: as they are
natural = 0  # passes a training image that the natural network cost; 0: not known
r = "inf"
pointwise = "2/16"  # radius of PGD and AutoAttack
deltas = ["1/16", "2/16"]  # W_2 radii
base = {}  # recipe, settings of wdat.training.loop.Recipe
variants = []  # [{"name": ..., settings that differ from base}]; init: scratch starts from fresh weights
best = []  # variants whose best epoch is measured too
seeds = [0]
validation = 0.1  # share of the training images held out, the judge of epochs
steps = 20  # of PGD
autoattacked = 0  # images of AutoAttack, first seed
search = {}  # settings of wdat.attacks.nearest.minimal_distances
batch_size = 128
jobs = 0  # runs at the same time; 0: as many as cores and memory allow
out = "figures/digits"
work = ".wdat/digits/made"

# %%
from wdat.report import slow_start as report
from wdat.studies.checkpoints import Measures
from wdat.studies.notebook import Study
from wdat.studies.slow_start import slow_start
from wdat.threats.ball import Threat
from wdat.training.schedules import slow_start_fast_decay

study = Study(
    out, work, from_records, data=data, networks=networks, train_root=train_root, test_root=test_root, n_train=n_train,
    n_test=n_test, weights=weights, dataset=dataset, threat=threat, size=size,
)  # fmt: skip

# %% [markdown]
# **By hand.** Ten epochs from a first rate of 0.01: up by as much every epoch to the peak in the fifth, then halved
# every epoch. The sum is 19.84 times the first rate, about two fifths of ten epochs at the peak.

# %%
by_hand = [0.01, 0.02, 0.03, 0.04, 0.05, 0.025, 0.0125, 0.00625, 0.003125, 0.0015625]
rates = [slow_start_fast_decay(epoch, 10, 0.01) for epoch in range(10)]
assert max(abs(one - other) for one, other in zip(rates, by_hand, strict=True)) < 1e-12
print(", ".join(f"{rate:g}" for rate in rates), "sum", f"{sum(rates) / 0.01:.5f} times the first")

# %%
record = study.record(
    "07_slow_start", "slow-start", slow_start, study.first, study.train, study.test, base, variants, seeds,
    Measures(Threat(pointwise, "inf", r), [Threat(d, 2, r) for d in deltas], steps, search, batch_size, autoattacked),
    study.work / "07", seeds=seeds, validation=validation, natural=natural or None, best=best, jobs=jobs,
)  # fmt: skip

# %% [markdown]
# **Every schedule, and from scratch.** Accuracy after the last epoch: clean, under PGD (and AutoAttack, where it ran),
# under W₂ by optimal allocation. "best − last" is over-fitting, on validation images: what the last epoch lost against
# the best.

# %%
report.schedules(record)

# %% [markdown]
# **Against cost.** One mark a run; fine-tuned networks stand at the natural network's passes plus their own.

# %%
report.cost(record)

# %% [markdown]
# **Epoch by epoch.** The rate each schedule sets, and validation accuracy, clean and under attack.

# %%
report.epochs(record)

# %% [markdown]
# **Last or best?** The same measures on test images at the epoch that validation images under attack would have chosen,
# with the worst class.

# %%
report.best_epochs(record)
