"""The runs of the paper as records: what each of them is, and the figure it should reach.

Krishnan, Xiao and Saurous, "Neumann Optimizer" (ICLR 2018), Tables 2 and 3. From the paper are: model, optimizer,
batch size, epochs and updates of Table 3, the periods (warm-up 5 epochs, K from 10 epochs doubling), the stairs (x0.3
every 40 epochs; baselines 0.045, x0.94 every 2), and the errors. Not stated there, and chosen here: the learning rate
of Neumann (0.1 per 256 images, Goyal et al., 2017), weight decay and label smoothing (those of the networks' own
papers), the epochs of Table 2 where Table 3 has none (200, where the published curves end). Its SGD baselines were
trained asynchronously; here every step is synchronous. Its Inceptions had the auxiliary head, which
`keras.applications` lacks.
"""

import dataclasses


@dataclasses.dataclass(frozen=True)
class Recipe:
    """What is trained, how, for how long; `published` is the top-1 error in percent that the paper reports."""

    model: str = "resnet50"
    optimizer: str = "neumann"
    batch_size: int = 1600
    epochs: int = 226
    learning_rate: float | None = None  # at the top of the ramp; None: base_learning_rate * batch_size / 256
    base_learning_rate: float | None = None  # None: by optimizer
    warmup_epochs: float = 5
    stair_epochs: float = 40
    stair_factor: float = 0.3
    reset_epochs: float = 10
    label_smoothing: float = 0.0
    weight_decay: float = 1e-4
    published: float | None = None
    source: str = ""


INCEPTION = {"label_smoothing": 0.1, "weight_decay": 4e-5}
# The baselines of Table 2; RMSProp and SGD with momentum 0.9.
STAIRS = {"learning_rate": 0.045, "stair_factor": 0.94, "stair_epochs": 2, "warmup_epochs": 0}

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
for name, (baseline, batch, worse, better, settings) in TABLE_2.items():
    epochs = 226 if name == "resnet50" else 200
    PRESETS[f"paper/{name}"] = Recipe(name, epochs=epochs, published=better, source="Table 2", **settings)
    PRESETS[f"paper/{name}-baseline"] = Recipe(
        name, baseline, batch, epochs, published=worse, source="Table 2", **settings, **STAIRS
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
            f"{name:<34} {r.optimizer:<10} {r.batch_size:>6} {r.epochs:>7} {steps:>8} {r.published:>11.1f}%  {r.source}"
        )
    return "\n".join(lines)
