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

# %% tags=["parameters"]
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
from wdat import records
from wdat.report import tables
from wdat.studies import experiments

root, device = records.root(), records.pick_device()
print(records.device_line())

# %%
train = experiments.load_images(data, "train", root, train_root, n_train)
results = experiments.pretrain(train, root / work / "zoo", recipes, architecture, arguments, device, seed, jobs)
record = records.write(root / out / "00_pretrain.json", "pretraining", results, recipes, seeds=[seed])

# %%
tables.pretraining(record)

# %% [markdown]
# Each network is kept as a weight file with a card beside it (architecture, normalisation, checksum), which
# `wdat.zoo.models.load_model` reads. Training is a pure function of recipe and seed, so on a CPU a second run gives the
# same weights.
