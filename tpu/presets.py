"""The runs of the paper as records: what each of them is, and the figure it should reach; and baselines beside them.

Krishnan, Xiao and Saurous, "Neumann Optimizer" (ICLR 2018), Tables 2 and 3. From the paper are: model, optimizer,
batch size, epochs and updates of Table 3, the periods (warm-up 5 epochs, K from 10 epochs doubling), the stairs (x0.3
every 40 epochs; baselines x0.94 every 2), and Neumann's errors. Not stated there, and chosen here: the learning rate
of Neumann (0.1 per 256 images, Goyal et al., 2017), weight decay and label smoothing (those of the networks' own
papers), the epochs of Table 2 where Table 3 has none (200, where the published curves end). Its Inceptions had the
auxiliary head, which `keras.applications` lacks.

Its baselines were trained asynchronously: their rate of 0.045 belongs to updates of 32 images. Here every step is
synchronous, so the baselines take the rate of their whole batch, by the same rule as Neumann, with a warm-up. That is
another protocol, and nothing is said about the error that they should reach.
"""

import dataclasses
from typing import Any

from schedule import DECAYS


def option(default, help, choices=None):
    """A field of a recipe, with what `--help` says about it."""
    return dataclasses.field(default=default, metadata={"help": help, "choices": choices})


@dataclasses.dataclass(frozen=True)
class Recipe:
    """What is trained, how, for how long; `published` is the top-1 error in percent that the paper reports."""

    model: str = "resnet50"
    optimizer: str = "neumann"
    batch_size: int = option(1600, "images in a step, of all replicas together")
    epochs: int = option(226, "passes over the training images")
    learning_rate: float | None = option(None, "at the top of the ramp; by default from --base_learning_rate")
    base_learning_rate: float | None = option(
        None, "per 256 images: times (batch / 256), for Adam and LAMB its square root; by default of the optimizer"
    )
    warmup_epochs: float = option(5, "epochs of the ramp; with Neumann, of SGD")
    decay: str = option("stairs", "of the learning rate after the ramp, to 0 unless stairs", DECAYS)
    stair_epochs: float = option(40, "epochs between two stairs")
    stair_factor: float = option(0.3, "on the learning rate at each stair")
    reset_epochs: float = option(10, "epochs until Neumann's second reset, twice as many until the next; 0: none")
    label_smoothing: float = option(0.0, "share of the label that is spread over all classes")
    weight_decay: float = option(1e-4, "of kernels; for Adam and LAMB times the learning rate, not in the loss")
    alpha: float | None = option(None, "Neumann's cubic regularizer; by default 1e-7 (the paper's Table 1)")
    beta: float | None = option(None, "Neumann's repulsion; by default 1e-5")
    gamma: float | None = option(None, "decay of Neumann's average of the weights; by default 0.99")
    mu_end: float | None = option(None, "Neumann's largest momentum; by default 0.9")
    batch_norm_momentum: float | None = option(None, "of the moving statistics; by default the network's")
    zero_last_gamma: bool = option(False, "begin every residual block as the identity (ResNets v1.5)")
    published: float | None = None
    source: str = ""


INCEPTION = {"label_smoothing": 0.1, "weight_decay": 4e-5}
# The baselines of Table 2, RMSProp and SGD with momentum 0.9, made synchronous.
STAIRS = {"stair_factor": 0.94, "stair_epochs": 2}

# batch: (top-1 error %, epochs); 50, 125, 250, 500, 1000 workers of 32 images
TABLE_3 = {1600: (23.0, 226), 4000: (23.0, 230), 8000: (23.1, 258), 16000: (23.5, 210), 32000: (24.0, 237)}
# model: (baseline's optimizer, its batch, its error %, Neumann's error %, settings)
TABLE_2 = {
    "inception_v3": ("rmsprop", 3200, 21.7, 20.8, INCEPTION),
    "resnet50": ("sgd", 1600, 23.9, 23.0, {}),
    "resnet101": ("sgd", 1600, 22.6, 21.7, {}),
    "inception_resnet_v2": ("rmsprop", 3200, 20.3, 19.5, INCEPTION),
}

PRESETS = {
    f"paper/resnet50-b{batch}": Recipe(batch_size=batch, epochs=epochs, published=error, source="Table 3")
    for batch, (error, epochs) in TABLE_3.items()
}
for name, (baseline, batch, _, better, settings) in TABLE_2.items():
    epochs = 226 if name == "resnet50" else 200
    PRESETS[f"paper/{name}"] = Recipe(name, epochs=epochs, published=better, source="Table 2", **settings)
    PRESETS[f"paper/{name}-baseline"] = Recipe(
        name, baseline, batch, epochs, source="Table 2, made synchronous", **settings, **STAIRS
    )

# Batches that slices of 8 to 4096 replicas divide. LARS: rate, warm-up and decay of TensorFlow's own TPU models (25 at
# up to 16384 images, here in proportion below; 34 at 32768). LAMB: You et al. (2020), 0.04 at 32768, its square-root
# rule and a warm-up in proportion to the batch.
LARS = {4096: (25.0 / 4, 5), 8192: (25.0 / 2, 5), 32768: (34.0, 12)}
V1_5 = {"zero_last_gamma": True, "label_smoothing": 0.1, "decay": "polynomial"}
for batch, (rate, warmup) in LARS.items():
    PRESETS[f"slice/resnet50-b{batch}"] = Recipe("resnet50_v1_5", batch_size=batch, zero_last_gamma=True)
    PRESETS[f"slice/resnet50-b{batch}-lars"] = Recipe(
        "resnet50_v1_5", "lars", batch, 90, learning_rate=rate, warmup_epochs=warmup, **V1_5
    )
    PRESETS[f"slice/resnet50-b{batch}-lamb"] = Recipe(
        "resnet50_v1_5", "lamb", batch, 90, warmup_epochs=20 * batch / 32768, weight_decay=0.01, **V1_5
    )


def get(name):
    """The recipe of a preset.

    Raises:
        ValueError: There is no such preset.
    """
    if name not in PRESETS:
        raise ValueError(f"`--preset` must be one of {', '.join(PRESETS)}. Received: {name!r}")
    return PRESETS[name]


def table():
    """All presets, one per line, with what each should reach."""
    lines = [f"{'preset':<34} {'optimizer':<10} {'batch':>6} {'epochs':>7} {'steps':>8} {'top-1 error':>12}  source"]
    for name, r in PRESETS.items():
        steps = r.epochs * (1_281_167 // r.batch_size)
        lines.append(
            f"{name:<34} {r.optimizer:<10} {r.batch_size:>6} {r.epochs:>7} {steps:>8} {error_of(r):>12}  {r.source}"
        )
    return "\n".join(line.rstrip() for line in lines)


def error_of(recipe):
    """The error that a run should reach, for a table; a dash where its protocol was not published."""
    return "-" if recipe.published is None else f"{recipe.published:.1f}%"


def changed(recipe, **given: Any):
    """The recipe with what was given, but for what it says of the paper where the run is another one then."""
    same = all(getattr(recipe, name) == value for name, value in given.items())
    return dataclasses.replace(recipe, **given, **({} if same else {"published": None, "source": ""}))
