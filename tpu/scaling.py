"""What a step costs on thousands of replicas: traced, checked against the formulas of `costs.py`, tables and a figure.

    python tpu/scaling.py        # traces ResNet-50 (an hour), writes results/scaling.txt and images/scaling.png
    python tpu/scaling.py sgd neumann curveball        # traces with some of the optimizers; formulas of all

Nothing of this was measured on an accelerator: counts are exact, times are a model with the assumptions of `MACHINES`.
"""

import json
import os
import subprocess
import sys

from costs import WORD, Model, efficiency, time_of, transformer
from formulas_newton import ITERATIONS
from machines import MACHINES
from methods import DENSE, formulas

METHODS = formulas()
# without those whose matrix with a row for each weight fits no machine
LARGE = {name: method for name, method in METHODS.items() if name not in DENSE}

HERE = os.path.dirname(os.path.abspath(__file__))
SHOWN = (1, 16, 256, 4096)
RESNET_UTILIZATION = 0.25  # of the peak: convolutions of few channels and normalization are bound by memory


def traced(problems, *optimizers):
    """What `counting.py` counts, `{problem: {..., optimizer: counts}}`; from a process of its own."""
    paths = os.pathsep.join([os.path.dirname(HERE), os.environ.get("PYTHONPATH", "")])
    command = [sys.executable, os.path.join(HERE, "counting.py"), ",".join(problems), *optimizers]
    done = subprocess.run(command, env={**os.environ, "PYTHONPATH": paths}, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(done.stderr)
    return json.loads(done.stdout.splitlines()[-1])


def model_of(name, found, **kwargs):
    """The `Model` of what was traced."""
    kept = next(iter(found["optimizers"].values()))["activations"]
    given = {key: found[key] for key in ("examples", "weights", "tensors", "outputs", "squares")}
    given |= {key: tuple(found[key]) for key in ("layers", "matched", "positions", "outside", "hidden", "ends")}
    given |= {key: tuple(map(tuple, found[key])) for key in ("shapes", "blocks")}
    return Model(name, activations=kept, **given, **kwargs)


def predicted(method, model):
    """`{"collectives", "flops", "state"}` as `counting.py` writes them, by the formulas."""
    reduced = {name: list(work.collectives(model)) for name, work in method.sections.items()}
    return {
        "collectives": {name: counts for name, counts in reduced.items() if any(counts)},
        "flops": {name: work.flops(model) for name, work in method.sections.items()},
        "state": method.remembered(model),
    }


def agrees(method, model, counts):
    """Whether all that was counted is as predicted; with matrices of its own, at least as many operations."""
    expected = predicted(method, model)
    if not method.matrices:
        return all(counts[key] == value for key, value in expected.items())
    more = all(counts["flops"].get(name, 0) >= flops for name, flops in expected.pop("flops").items())
    return more and all(counts[key] == value for key, value in expected.items())


# Tables.


def table_of_counts(model, found=None):
    """Lines: what a step reduces, multiplies and holds; with `found`, beside what was counted."""
    yield f"{model.name}: {model.weights / 1e6:.1f} million weights in {model.tensors} tensors,"
    yield f"{model.examples} examples per replica, {model.forward / 1e9:.0f} GFLOP forward,"
    yield f"{model.activations / 1e9:.2f} GB of activations kept by a first-order step"
    yield ""
    more = f" {'traced':>8}  counted = formula" if found else ""
    yield f"{'':<30} {'collectives':>12} {'tensors':>8} {'MB':>9} {'forward = 1':>12} {'memory GB':>10}{more}"
    for name, method in LARGE.items():
        calls, tensors, numbers = method.collectives(model)
        line = f"{name:<30} {calls:>12.1f} {tensors:>8.0f} {WORD * numbers / 1e6:>9.1f}"
        line += f" {method.flops(model) / model.forward:>11.1f}{'+' if method.matrices else ' '}"
        line += f" {method.memory(model) / 1e9:>10.2f}"
        if found and name in found["optimizers"]:
            counts = found["optimizers"][name]
            held = counts["peak"] + WORD * (model.weights * (1 + method.iterates) + counts["state"])
            line += f" {held / 1e9:>8.2f}  {'yes' if agrees(method, model, counts) else 'NO'}"
        yield line


def table_of_times(model, machine):
    """Lines: the time of a step against the number of replicas."""
    yield f"{model.name} on {machine.name}, ms per step on n replicas, and the share that is not communication"
    yield ""
    yield f"{'n':<30} {''.join(f'{n:>9}' for n in SHOWN)}  {f'share at {SHOWN[-1]}':>14} {'tensors unpacked':>17}"
    for name, method in LARGE.items():
        times = "".join(f"{1e3 * sum(time_of(method, model, machine, n)):>9.1f}" for n in SHOWN)
        shares = [efficiency(method, model, machine, SHOWN[-1], packed=packed) for packed in (True, False)]
        fits = "" if method.memory(model) <= machine.memory else "  does not fit"
        yield f"{name:<30} {times}  {shares[0]:>14.2f} {shares[1]:>17.2f}{fits}"


def table_of_machines(model, replicas=1024):
    """Lines: the share of the time that is not communication, on every machine."""
    yield f"{model.name}, share of the time that is not communication on {replicas} replicas; -: does not fit"
    yield ""
    yield f"{'':<30} {''.join(f'{m.name:>9}' for m in MACHINES)}"
    for name, method in LARGE.items():
        fits = [method.memory(model) <= m.memory for m in MACHINES]
        shares = [f"{efficiency(method, model, m, replicas):.2f}" for m in MACHINES]
        yield f"{name:<30} {''.join(f'{s if fit else chr(45):>9}' for s, fit in zip(shares, fits))}"


# Figure.

LINES = {
    "neumann": ("SGD, Adam, LAMB, Neumann, TwoLoopNeumann", "#1f77b4"),
    "curveball": ("CurveBall", "#2ca02c"),
    "hessian_free": (f"HessianFree, {ITERATIONS} iterations", "#d62728"),
}
BARS = {"sgd": "SGD", "neumann": "Neumann", "curveball": "CurveBall", "two_loop_neumann": "TwoLoopNeumann",
        "hessian_free": "HessianFree"}  # fmt: skip
PARTS = {"arithmetic": "#bbbbbb", "update": "#8c564b", "bytes": "#ff7f0e", "latency": "#9467bd"}


def figure(pairs, path, replicas=1024):
    """One row for each `(model, machine)`: the share of arithmetic against replicas, and where the time goes."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    fig, axes = plt.subplots(len(pairs), 2, figsize=(12, 4 * len(pairs)), layout="constrained", width_ratios=(3, 2))
    counts = [2**k for k in range(1, 14)]
    for (model, machine), (left, right) in zip(pairs, axes):
        for name, (label, color) in LINES.items():
            for packed, style in ((True, "-"), (False, "--")):
                shares = [efficiency(METHODS[name], model, machine, n, packed=packed) for n in counts]
                left.plot(counts, shares, style, color=color, label=label if packed else None)
        left.set(xscale="log", ylim=(0, 1.02), xlabel="replicas", ylabel="share of arithmetic in the time of a step")
        left.set_xticks(counts[1::2], [str(n) for n in counts[1::2]])
        left.minorticks_off()
        left.set_title(f"{model.name}, {model.examples} examples per replica, {machine.name}", fontsize=11)
        left.grid(alpha=0.3)
        for row, name in enumerate(BARS):
            times, begin = time_of(METHODS[name], model, machine, replicas), 0.0
            for (part, color), t in zip(PARTS.items(), times):
                right.barh(row, t / sum(times), left=begin, color=color, label=part if row == 0 else None)
                begin += t / sum(times)
            fits = "" if METHODS[name].memory(model) <= machine.memory else "\ndoes not fit"
            right.text(1.02, row, f"{1e3 * sum(times):,.0f} ms{fits}", va="center")
        right.set_yticks(range(len(BARS)), BARS.values())
        right.invert_yaxis()
        right.set(xlim=(0, 1.28), xlabel=f"where the time of a step goes, {replicas} replicas")
        right.set_xticks([0, 0.25, 0.5, 0.75, 1.0])
        right.spines[["top", "right"]].set_visible(False)
    axes[0][0].plot([], [], "--", color="black", label="the same, every tensor a message of its own")
    axes[0][0].legend(loc="lower left", fontsize=9)
    handles, labels = axes[0][1].get_legend_handles_labels()
    axes[0][1].legend(handles, labels, loc="lower center", bbox_to_anchor=(0.4, 1.0), ncols=3, frameon=False)
    fig.savefig(path, dpi=110)
    plt.close(fig)


def main(names):
    found = traced(["resnet50"], *names)["resnet50"]
    resnet, large = model_of("ResNet-50", found, utilization=RESNET_UTILIZATION), transformer()
    machines = {machine.name: machine for machine in MACHINES}
    pairs = [(resnet, machines["TPU v4"]), (large, machines["H100"])]
    tables = [table_of_counts(resnet, found), table_of_counts(large), *[table_of_times(*pair) for pair in pairs]]
    tables += [table_of_machines(model) for model, _ in pairs]
    text = "\n\n\n".join("\n".join(table) for table in tables) + "\n"
    print(text)
    for folder in ("results", "images"):
        os.makedirs(os.path.join(HERE, folder), exist_ok=True)
    with open(os.path.join(HERE, "results", "scaling.txt"), "w") as file:
        file.write(text)
    figure(pairs, os.path.join(HERE, "images", "scaling.png"))


if __name__ == "__main__":
    main(sys.argv[1:])
