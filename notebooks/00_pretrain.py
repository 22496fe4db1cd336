# %% [markdown]
# # 0 · Networks to study
#
# The paper studies five *pre-trained* robust networks. Where none are at hand, as in the default profile, this
# notebook trains five small ones on the embedded digits by five recipes: standard training, PGD adversarial training,
# TRADES, slow-start-fast-decay fine-tuning of the standard network, and TRADES with augmentation and twice the epochs.
# Profiles whose networks come from elsewhere leave `recipes` empty.
#
# *Place in the paper: 6.1 Setting.*
# *Time: digits 1 min, others none.*

# %% tags=["parameters"] needs=[]
from_records = False  # True: show the committed results, compute nothing
data = "digits"  # see wdat.zoo.data.load_data
train_root = ""  # folder of the training images; not used by digits
n_train = 0  # images; 0 means all
architecture = "digits_cnn"  # see wdat.zoo.networks
arguments = {}  # of the architecture
recipes = {}  # name -> settings of wdat.training.loop.Recipe
seed = 0
jobs = 0  # runs at the same time; 0: as many as cores and memory allow
out = "figures/digits"  # below the repository
work = ".wdat/digits/made"

# %%
import torch
from torch import nn

from wdat.report import tables
from wdat.studies import experiments
from wdat.studies.notebook import Study
from wdat.zoo.networks import Normalised

study = Study(out, work, from_records, data=data, train_root=train_root, n_train=n_train)

# %% [markdown]
# **By hand.** A network here takes pixels in [0, 1] and normalises them itself, so that a radius δ is always in pixel
# units: attacks never see normalised images. Five lines of plain torch, then the library's layer.

# %%
torch.manual_seed(0)
x, mean, std = torch.rand(5, 1, 8, 8), 0.3, 0.4
inner = nn.Sequential(nn.Flatten(), nn.Linear(64, 10))
logits = inner((x - mean) / std)
assert torch.allclose(logits, Normalised([mean], [std], inner)(x), atol=1e-6)

# %%
record = study.record(
    "00_pretrain", "pretraining", experiments.pretrain, study.train, study.work / "zoo", recipes, architecture,
    arguments, study.device, seed, jobs, config=recipes, seeds=[seed],
)  # fmt: skip

# %% [markdown]
# **The networks.** Columns: how each was trained (objective with its radius, epochs, learning-rate schedule), and the
# percentage of training images right in the last epoch, clean or attacked as the objective sees them. That is no
# measure of robustness: the later notebooks measure it on test images.

# %%
tables.pretraining(record)

# %% [markdown]
# Each network is kept as a weight file with a card beside it (architecture, normalisation, checksum), which
# `wdat.zoo.models.load_model` reads. Training is a pure function of recipe and seed, so on a CPU a second run gives the
# same weights.
