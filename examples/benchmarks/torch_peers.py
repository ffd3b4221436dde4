"""PyHessian and curvlinops on a network of `monitor_cost.py`, which runs this program in its own process.

    python examples/benchmarks/torch_peers.py network.npz '{"ask": "references", "points": [...]}'

torch and TensorFlow each bring a copy of LLVM, and two copies crash a process. Prints one line of JSON. The packages
are called as in their documentation; each product is counted where it is made.
"""

import json
import statistics
import sys
import warnings

import curvlinops
import numpy as np
import pyhessian
import torch
from measuring import least, off, root_mean_square, timed  # which stands beside this file
from scipy.sparse.linalg import eigsh
from torch import nn

BLOCK = 8  # vectors that curvlinops multiplies at once: it would take all of a trace's, with as much memory
ACTIVATIONS = {"relu": nn.ReLU, "tanh": nn.Tanh, "linear": nn.Identity}


# The network.


class Network(nn.Sequential):
    """Keras' network in torch; PyHessian calls `zero_grad` once for every product."""

    products = 0

    def zero_grad(self, *args, **kwargs):
        self.products += 1
        super().zero_grad(*args, **kwargs)


class ChannelsLast(nn.Module):
    """Channels to the end, as Keras has them when it flattens: (batch, c, h, w) -> (batch, h, w, c)."""

    def forward(self, x):
        return x.permute(0, 2, 3, 1)


def network(layers, weights):
    """`layers` is a list of `[class, what it does]`, `weights` Keras' arrays in their order."""
    weights, stack = iter(weights), []
    for kind, what in layers:
        if kind == "Dense":
            stack += [_with(nn.Linear, (1, 0), next(weights), next(weights)), ACTIVATIONS[what]()]
        elif kind == "Conv2D":
            kernel, bias = next(weights), next(weights)  # (h, w, in, out)
            stack += [_with(nn.Conv2d, (3, 2, 0, 1), kernel, bias, kernel.shape[:2], padding="same")]
            stack += [ACTIVATIONS[what]()]
        elif kind == "MaxPooling2D":
            stack += [nn.MaxPool2d(what)]
        else:  # "Flatten"
            stack += [ChannelsLast(), nn.Flatten()]
    return Network(*stack)


def _with(layer, order, kernel, bias, *args, **options):
    """A layer of torch with Keras' kernel, whose axes come in another order."""
    made = layer(*kernel.shape[-2:], *args, **options)
    made.weight.data = torch.tensor(np.ascontiguousarray(kernel.transpose(order)))
    made.bias.data = torch.tensor(bias)
    return made


class Subject:
    """What is in the file, at one of its points."""

    def __init__(self, path, point, dtype=torch.float32):
        with np.load(path) as file:
            layers = json.loads(str(file["layers"]))
            weights = [file[f"{point}/{i}"] for i in range(sum(2 for kind, _ in layers if kind in ("Dense", "Conv2D")))]
            x, y = file["x"], file["y"]
        self.network, self.criterion = network(layers, weights).to(dtype), nn.CrossEntropyLoss()
        # images come channels first: (batch, h, w, c) -> (batch, c, h, w)
        x = np.ascontiguousarray(np.moveaxis(x, -1, 1)) if x.ndim == 4 else x
        self.data = torch.tensor(x).to(dtype), torch.tensor(y.astype("int64"))

    def loss(self):
        x, y = self.data
        return self.criterion(self.network(x), y).item()


# The packages.


class PyHessian:
    """`pyhessian.hessian` on one batch in memory, its fastest way: it keeps the graph of the gradient."""

    def __init__(self, subject):
        self.network = subject.network
        self.hessian = pyhessian.hessian(subject.network, subject.criterion, data=subject.data, cuda=False)

    def ask(self, method, seed=0, **options):
        """`(value, products)` of one of its methods."""
        torch.manual_seed(seed)
        self.network.products = 0
        return getattr(self.hessian, method)(**options), self.network.products

    def product(self):
        """One, of no interest."""
        self.ask("eigenvalues", maxIter=1)


class Curvlinops(curvlinops.HessianLinearOperator):
    """`curvlinops.HessianLinearOperator`, counting."""

    def __init__(self, subject):
        self.products = 0
        parameters = [p for p in subject.network.parameters() if p.requires_grad]
        super().__init__(subject.network, subject.criterion, parameters, [subject.data])

    def __matmul__(self, vectors):
        many = isinstance(vectors, torch.Tensor) and vectors.ndim == 2
        self.products += vectors.shape[1] if many else 1
        if many and vectors.shape[1] > BLOCK:
            pieces = [super(Curvlinops, self).__matmul__(v) for v in vectors.split(BLOCK, dim=1)]
            return torch.cat(pieces, dim=1)
        return super().__matmul__(vectors)

    def pairs(self, k, tolerance, start=None, which="LA"):
        """`((values, vectors), products)` by SciPy's `eigsh`, the largest first."""
        self.products = 0
        start = np.random.default_rng(0).standard_normal(self.shape[0]) if start is None else start
        values, vectors = eigsh(self.to_scipy(), k=k, which=which, tol=tolerance, v0=start)
        return (values[::-1], vectors[:, ::-1]), self.products

    def ask(self, function, *args, seed=0):
        """`(value, products)` of one of the package's functions."""
        torch.manual_seed(seed)
        self.products = 0
        return function(self, *args), self.products

    def product(self):
        """One, of no interest."""
        self @ torch.ones(self.shape[0])


# What is asked.


def references(path, point, top):
    """Converged values; the eigenvalues in float64."""
    operator = Curvlinops(Subject(path, point, torch.float64))
    largest = list(operator.pairs(top, 1e-6)[0][0])
    (lowest,), _ = operator.pairs(1, 1e-2, which="SA")[0]
    by_size = largest if -lowest < largest[-1] else list(operator.pairs(top, 1e-6, which="LM")[0][0])
    subject = Subject(path, point)
    return {"loss": subject.loss(), "top": largest, "by size": _by_size(by_size), "trace": exact_trace(subject)}


def exact_trace(subject):
    """The trace of the Hessian of a network of ReLUs, by the gradients of single examples for each class.

    Such a network is linear in the weights of each layer where it can be differentiated, so the Hessian and the
    Gauss-Newton matrix have the same blocks of layers on the diagonal, and the latter's trace is, for the mean
    cross-entropy, `mean_n sum_c p_c |d log p_c / dw|^2`.
    """
    weights = {name: p.detach() for name, p in subject.network.named_parameters()}
    x, _ = subject.data

    def log_p(weights, row, c):
        return torch.func.functional_call(subject.network, weights, row[None]).log_softmax(1)[0, c]

    def of_class(row, c):
        return sum(g.square().sum() for g in torch.func.grad(log_p)(weights, row, c).values())

    p = subject.network(x).softmax(1).detach()
    squares = [torch.vmap(of_class, in_dims=(0, None), chunk_size=64)(x, c) for c in range(p.shape[1])]
    return (p * torch.stack(squares, 1)).sum(1).mean().item()


def questions(path, point, earlier, reference, sharpness, trace, like_ours, steps, most, seeds):
    """Rows `{question, who, products, seconds, set_up, off}`, or with `failed` in place of the last four.

    Args:
        path: The file.
        point: Which weights of it.
        earlier: The weights of the warm start.
        reference: What `references` gave.
        sharpness: Relative error asked of a sharpness and of `top`.
        trace: Relative error asked of a trace.
        like_ours: Products for curvlinops' traces, `{estimator: products}`.
        steps: Lanczos steps of a density.
        most: Steps of power iteration at most.
        seeds: Seeds of the traces.
    """
    subject, rows = Subject(path, point), []
    top = len(reference["top"])

    def add(question, who, asked, error=None, set_up=0.0):
        """Asks by the clock; `error` makes a number of what came."""
        try:
            (value, products), seconds = timed(asked)
        except RuntimeError as failure:  # what a package cannot do with this torch
            rows.append({"question": question, "who": who, "failed": str(failure).split(". ")[0]})
            return
        row = {"products": products, "seconds": seconds, "set_up": set_up, "off": error and error(value)}
        rows.append({"question": question, "who": who, **row})

    def one(values):
        return off(values[0][0], reference["top"][0])

    def near(products):
        return one(power.ask("eigenvalues", maxIter=products, tol=0.0)[0]) <= sharpness

    power, set_up = timed(first_product, PyHessian, subject)
    fewest = least(near, most) or most
    cold = "sharpness, cold"
    who = f"PyHessian, {'fewest' if near(fewest) else 'most'}"
    add(cold, who, lambda: power.ask("eigenvalues", maxIter=fewest, tol=0.0), one, set_up)
    add(cold, "PyHessian, its rule", lambda: power.ask("eigenvalues", tol=sharpness, maxIter=most), one, set_up)
    add("top", "PyHessian, its rule", lambda: power.ask("eigenvalues", top_n=top, tol=sharpness, maxIter=most),
        lambda found: off(np.abs(_by_size(found[0])), np.abs(reference["by size"])), set_up)  # fmt: skip
    rows.append(traced("PyHessian, its rule", lambda seed: power.ask("trace", seed=seed, tol=trace), reference, seeds))
    add("density", "PyHessian", lambda: power.ask("density", iter=steps, n_v=1), None, set_up)

    operator, set_up = timed(first_product, Curvlinops, subject)
    add(cold, "curvlinops, eigsh", lambda: operator.pairs(1, sharpness), one, set_up)
    start = Curvlinops(Subject(path, earlier)).pairs(1, sharpness)[0][1][:, 0]
    add("sharpness, warm", "curvlinops, eigsh", lambda: operator.pairs(1, sharpness, start), one, set_up)
    add("top", "curvlinops, eigsh", lambda: operator.pairs(top, sharpness),
        lambda found: off(found[0], reference["top"]), set_up)  # fmt: skip
    for name, function in {"Hutchinson": curvlinops.hutchinson_trace, "XTrace": curvlinops.xtrace}.items():
        asked = lambda seed, f=function, n=like_ours[name]: operator.ask(f, n, seed=seed)  # noqa: E731
        rows.append(traced(f"curvlinops, {name}", asked, reference, seeds))
    add("density", "curvlinops", lambda: operator.ask(curvlinops.lanczos_approximate_spectrum, steps), None, set_up)
    return rows


def first_product(package, subject):
    """The package's object, with one product behind it: what torch does once only is done."""
    made = package(subject)
    made.product()
    return made


def traced(who, asked, reference, seeds):
    """The row of a trace: means over the seeds, and the root mean square of the relative errors."""
    found = [timed(asked, seed) for seed in seeds]
    errors = [off(np.mean(np.asarray(value)), reference["trace"]) for (value, _), _ in found]
    return {
        "question": "trace", "who": who, "products": statistics.mean(products for (_, products), _ in found),
        "seconds": statistics.mean(seconds for _, seconds in found), "set_up": None,
        "off": root_mean_square(errors),
    }  # fmt: skip


def _by_size(values):
    return sorted(map(float, values), key=abs, reverse=True)


if __name__ == "__main__":
    warnings.filterwarnings("ignore")  # torch on PyHessian's kept graph
    asked = json.loads(sys.argv[2])
    print(json.dumps({"references": references, "questions": questions}[asked.pop("ask")](sys.argv[1], **asked)))
