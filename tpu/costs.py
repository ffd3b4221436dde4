"""What a step costs on thousands of replicas, on paper: a formula per optimizer, and a model of time.

`METHODS` holds one formula per optimizer: what a step, and each turn of its loops and conditions, reduces over the
replicas and multiplies. `counting.py` counts the same in the traced step; `tests/test_scaling.py` compares the two.

Time of a step = arithmetic / (peak * utilization) + sum over collectives of 2 (n - 1)/n bytes/bandwidth + 2 log2(n)
latency: all-reduce by rings for the bytes, by trees for the latency. Nothing overlaps, which is true of conjugate
gradients (each product waits for the last) and pessimistic for first-order methods. Vector arithmetic, input and
stragglers are left out. Nothing of this was measured on an accelerator.
"""

import dataclasses
import math
import os

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")  # TensorFlow's greetings, before it is imported

import keras_curvature as kc

WORD = 4  # bytes: weights and what is reduced are float32
ITERATIONS = 30  # of conjugate gradients in a step, an assumption; the rule stops between 10 and 250 of them


# Models.


@dataclasses.dataclass(frozen=True)
class Model:
    """A model on one replica's slice of a batch.

    Attributes:
        name: What it is called.
        examples: Examples in the slice.
        weights: `P`, trainable numbers.
        tensors: `T`, the variables that they are in.
        layers: Floating-point operations of each product of a forward pass; the first takes the input, and so needs
            no gradient of it.
        activations: Bytes that a forward pass leaves for the backward pass.
        utilization: Share of the accelerator's peak that it reaches, an assumption.
    """

    name: str
    examples: int
    weights: int
    tensors: int
    layers: tuple
    activations: int = 0
    utilization: float = 0.4

    @property
    def forward(self):
        """Operations of a forward pass."""
        return sum(self.layers)

    @property
    def backward(self):
        """Operations of a backward pass, or of a forward-mode one: two products for each, one for the first."""
        return 2 * self.forward - self.layers[0]


def transformer(layers=24, width=1792, heads=14, vocabulary=50304, length=1024, examples=4):
    """A decoder-only transformer of a billion weights, by its formulas; tied embedding, learned positions.

    Activations in 16 bits after Korthikanti et al., "Reducing activation recomputation in large transformer models"
    (2022), `s b h (34 + 5 a s / h)` per layer, nothing recomputed, and the logits in 32 bits.
    """
    matrices, tokens = 12 * width**2, length * examples
    weights = layers * (matrices + 13 * width) + (vocabulary + length + 2) * width
    products = [tokens * (2 * matrices + 4 * length * width)] * layers + [2 * tokens * vocabulary * width]
    kept = layers * tokens * width * (34 + 5 * heads * length / width) + 4 * tokens * vocabulary
    # the first product takes no input from outside, its embedding has a gradient
    return Model("1B transformer", examples, weights, 12 * layers + 4, (0, *products), activations=round(kept))


# Methods.


@dataclasses.dataclass(frozen=True)
class Work:
    """What one section of a step does: the step itself, or one turn of a loop or condition in it.

    Attributes:
        reductions: Calls that reduce; what one call is given can travel as one message.
        vectors: Vectors of weight space in them, `P` numbers in `T` tensors each.
        scalars: Scalars in them.
        joined: How many of the scalars travel in the tensor of another.
        forward: Forward passes.
        backward: Backward and forward-mode passes.
    """

    reductions: int = 0
    vectors: int = 0
    scalars: int = 0
    joined: int = 0
    forward: int = 0
    backward: int = 0

    def collectives(self, model):
        """`(reductions, tensors in them, numbers in these)`."""
        tensors = self.vectors * model.tensors + self.scalars - self.joined
        return self.reductions, tensors, self.vectors * model.weights + self.scalars

    def flops(self, model):
        """Floating-point operations of the products."""
        return self.forward * model.forward + self.backward * model.backward


@dataclasses.dataclass(frozen=True)
class Method:
    """The formula of an optimizer.

    Attributes:
        sections: `{section: Work}`; the names are those of the loops and conditions in the graph.
        state: Vectors that it remembers.
        vectors: Vectors that a step holds at once at most, the gradient among them.
        recordings: How many times a first-order step's activations it holds at once at most.
        turns: `{section: how often in a step}`, where that is not once.
        iterates: Vectors that conjugate gradients store on the way.
    """

    sections: dict
    state: int
    vectors: int
    recordings: int = 1
    turns: dict = dataclasses.field(default_factory=dict)
    iterates: int = 0

    def collectives(self, model):
        """`(reductions, tensors in them, numbers in these)` of a step."""
        counts = [work.collectives(model) for work in self.sections.values()]
        return tuple(sum(turns * n for turns, n in zip(self._turns(), column)) for column in zip(*counts))

    def flops(self, model):
        """Floating-point operations of a step."""
        return sum(turns * work.flops(model) for turns, work in zip(self._turns(), self.sections.values()))

    def _turns(self):
        return [self.turns.get(name, 1) for name in self.sections]

    def memory(self, model):
        """Bytes on each replica: weights, state, what a step holds."""
        vectors = 1 + self.state + self.vectors + self.iterates
        return WORD * vectors * model.weights + self.recordings * model.activations


def _gradient(state, vectors=1):
    return Method({"step": Work(reductions=1, vectors=1, forward=1, backward=1)}, state, vectors)


_with_loss = Work(reductions=2, vectors=1, scalars=1, forward=1, backward=1)
_loss = Work(reductions=1, scalars=1, forward=1)
_stored = sum(i <= ITERATIONS for i in kc.HessianFree().solver._stored_steps()) + 1  # and the last one

METHODS = {
    "sgd": _gradient(1),
    "adam": _gradient(2),
    "lamb": _gradient(2),
    # besides the gradient the distance to the average v
    "neumann": _gradient(2, vectors=2),
    "neumann_curved": Method({"step": _with_loss}, state=2, vectors=2),
    # J z, then G z + g in one backward pass, then J dz; the loss, and three inner products at once. The check: a loss
    "curveball": Method(
        {
            "step": Work(reductions=3, vectors=1, scalars=4, joined=2, forward=1, backward=3), "cond": _loss,
        },
        state=1, vectors=2, recordings=3, turns={"cond": 1 / kc.CurveBall().damping.every},
    ),
    # the loop: a gradient at a shifted point, and with it the loss there, which nobody reads
    "two_loop_neumann": Method(
        {"step": _with_loss, "while": dataclasses.replace(_with_loss, reductions=1)},
        state=0, vectors=4, turns={"while": kc.TwoLoopNeumann().solver.steps},
    ),
    # loss and gradient; squares by example, from passes of their own; the product with the start; the loss of the last
    # iterate; a quadratic form. Loops: an iteration, a step of walking back, a trial of the line search
    "hessian_free": Method(
        {
            "step": Work(reductions=6, vectors=3, scalars=3, forward=3, backward=5),
            "while": Work(reductions=1, vectors=1, backward=2), "while_1": _loss, "while_2": _loss,
        },
        state=1, vectors=8, recordings=3, turns={"while": ITERATIONS, "while_1": 1, "while_2": 0}, iterates=_stored,
    ),
}  # fmt: skip


# Machines.


@dataclasses.dataclass(frozen=True)
class Machine:
    """An accelerator in a cluster of its kind: assumptions from public data sheets, and a latency that is a guess.

    Attributes:
        name: What it is called.
        peak: Operations per second in bfloat16, dense.
        memory: Bytes.
        bandwidth: Bytes per second that one accelerator can send in an all-reduce.
        latency: Seconds for one hop of a small message, software included.
    """

    name: str
    peak: float
    memory: float
    bandwidth: float
    latency: float


MACHINES = [
    # Google's documents of v3 and v4: peak, memory, and the all-reduce bandwidth of a pod over its chips, 340 TB/s over
    # 1024 and 1.1 PB/s over 4096
    Machine("TPU v3", 123e12, 32 * 2**30, 340e12 / 1024, 1e-6),
    Machine("TPU v4", 275e12, 32 * 2**30, 1.1e15 / 4096, 1e-6),
    # ... of v5p: 1200 GB/s between chips, both directions together
    Machine("TPU v5p", 459e12, 95 * 2**30, 600e9, 1e-6),
    # NVIDIA's of A100 80 GB and H100 SXM, in boxes of eight with 200 and 400 Gbit/s to the network per GPU: an
    # all-reduce that sums inside the box first sends an eighth through each, so eight of them serve every GPU
    Machine("A100", 312e12, 80e9, 8 * 25e9, 5e-6),
    Machine("H100", 989e12, 80e9, 8 * 50e9, 5e-6),
]


def time_of(method, model, machine, replicas, packed=True):
    """`(arithmetic, bytes, latency)`: seconds of a step, by where they go.

    `packed`: what one call reduces travels as one message, as NCCL and XLA's combiner have it; else each tensor alone.
    """
    calls, tensors, numbers = method.collectives(model)
    arithmetic = method.flops(model) / (machine.peak * model.utilization)
    ring = 2 * (replicas - 1) / replicas * WORD * numbers / machine.bandwidth
    return arithmetic, ring, (calls if packed else tensors) * 2 * math.log2(replicas) * machine.latency


def efficiency(*args, **kwargs):
    """Share of the time that is not spent on communication."""
    arithmetic, *rest = time_of(*args, **kwargs)
    return arithmetic / (arithmetic + sum(rest))
