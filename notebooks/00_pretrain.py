# %% [markdown]
# # 0 · A two-minute tour, and the networks to study
#
# *Question: what does all of this do?* First everything once on one small network, so that a figure is there after a
# minute; then the networks that the other notebooks study. The paper studies five *pre-trained* robust networks. Where
# none are at hand, as in the default profile, this notebook trains five small ones on the embedded digits by five
# recipes: standard training, PGD adversarial training, TRADES, slow-start-fast-decay fine-tuning of the standard
# network, and TRADES with augmentation and twice the epochs. Profiles whose networks come from elsewhere leave
# `recipes` empty.
#
# *Place in the paper: 6.1 Setting.*
# *Time: digits 2 min, others less.*

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

from wdat.attacks.pgd import attack
from wdat.report import figures, tables
from wdat.studies import experiments
from wdat.studies.notebook import Study
from wdat.threats.ball import Threat
from wdat.threats.sensitivity import upsilon
from wdat.training.loop import finetune
from wdat.training.objectives import ibp, w_trades
from wdat.training.recipes import Recipe
from wdat.zoo.data import load_data
from wdat.zoo.networks import Normalised, build

study = Study(out, work, from_records, data=data, train_root=train_root, n_train=n_train)

# %% [markdown]
# **The tour: a network and an attack.** A small network learns the embedded digits. The adversary may move 200 test
# images by δ = 1/16 on average (W₂, pixels by ℓ∞) and shares that out among the images as it likes. Υ is how fast
# the loss can rise with δ; W-PGD looks for the images.

# %%
digits, test = load_data("digits", "train"), load_data("digits", "test", n=200)
ball = Threat("1/16", p=2, r="inf")
torch.manual_seed(seed)
natural = finetune(build("digits_cnn", width=8), digits, Recipe({"kind": "plain"}, epochs=15, lr=0.05)).model
found = attack(natural, test.x, test.y, ball, batch_size=len(test))
print(f"Υ = {upsilon(natural, test.x, test.y, ball).value:.1f}; W-PGD moves the images by {found.distance:.4f} in the "
      f"2-mean, at most {float(found.norms.max()):.4f}, and leaves {found.accuracy:.1%} right")  # fmt: skip

# %% [markdown]
# **The tour: better, and how much.** W-TRADES fine-tunes the network against this adversary; interval bound
# propagation (IBP) fine-tunes it for what can be *proved* of it, in balls twice as large, the water level of such an
# adversary. For each network one search of minimal distances gives A_δ at *every* δ by optimal allocation, an upper
# bound, and certified radii give a lower one: the truth lies between blue and green, which nearly meet where a network
# was trained for it.

# %%
tuned = finetune(natural, digits, Recipe(w_trades(ball), epochs=5, lr=0.02)).model
provable = finetune(natural, digits, Recipe(ibp("2/16"), epochs=20, lr=0.05)).model
tour = study.record(
    "00_tour", "evaluation", experiments.across_networks, {"natural": natural, "W-TRADES": tuned, "IBP": provable},
    test, [Threat("1/32", 2, "inf"), ball, Threat("2/16", 2, "inf")], study.work / "tour", losses=["redlr"],
    certified=200, orders=[1, 2, float("inf")], curve=61, batch_size=len(test),
    config={"networks": ["natural", "W-TRADES", "IBP"]}, seeds=[seed],
)  # fmt: skip

# %%
figures.bracket(tour)

# %%
tables.evaluation(tour)

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
