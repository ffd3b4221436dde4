"""What a step costs on thousands of replicas, on paper: what a formula consists of, and a model of time.

`formulas.py` has a formula for each optimizer: what a step, and each turn of its loops and conditions, reduces over the
replicas and multiplies. `counting.py` counts the same in the traced step; `tests/test_scaling.py` compares the two.

Time of a step = arithmetic / (peak * utilization) + vectors read and written by the update / memory bandwidth
+ sum over collectives of 2 (n - 1)/n bytes/bandwidth + 2 log2(n) latency: all-reduce by rings for the bytes, by trees
for the latency. Nothing overlaps, which is true of conjugate gradients (each product waits for the last) and
pessimistic for first-order methods. Input and stragglers are left out. Nothing of this was measured on an accelerator.
"""

import dataclasses
import math
from collections.abc import Callable

WORD = 4  # bytes: weights and what is reduced are float32


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
        shapes: Of the variables.
        blocks: Of the layers with Kronecker factors the shapes of the matrices, with a row for the bias: `(rows,
            columns)`, or `(groups, rows, columns)`.
        positions: Of these layers, how often each is applied to an example; `()` stands for once.
        matched: Whether these layers have an activation with a matching loss; see `LocoProp`.
        outside: Sizes of the variables outside of these layers.
        hidden, ends: Sizes of the kernels as matrices, between the ends of the model and at them.
        outputs: Numbers that it puts out for each example.
        squares: Whether its loss is a mean of squares, without regularizers.
        apart: Whether no layer mixes the examples, as batch normalization does.
    """

    name: str
    examples: int
    weights: int
    tensors: int
    layers: tuple
    activations: int = 0
    utilization: float = 0.4
    shapes: tuple = ()
    blocks: tuple = ()
    positions: tuple = ()
    matched: tuple = ()
    outside: tuple = ()
    hidden: tuple = ()
    ends: tuple = ()
    outputs: int = 0
    squares: bool = False
    apart: bool = True

    @property
    def rows(self):
        """Rows of the Jacobian of the slice: one for each output of each example."""
        return self.examples * self.outputs

    @property
    def forward(self):
        """Operations of a forward pass."""
        return sum(self.layers)

    @property
    def backward(self):
        """Operations of a backward pass, or of a forward-mode one: two products for each, one for the first."""
        return 2 * self.forward - self.layers[0]

    @property
    def slopes(self):
        """Operations of a backward pass to the activations alone."""
        return self.forward - self.layers[0]

    @property
    def hessian(self):
        """Operations of a product with the Hessian: both passes of a gradient, differentiated along a vector."""
        return 2 * self.backward + 2 * self.slopes


def transformer(layers=24, width=1792, heads=14, vocabulary=50304, length=1024, examples=4):
    """A decoder-only transformer of a billion weights, by its formulas; tied embedding, learned positions.

    Activations in 16 bits after Korthikanti et al., "Reducing activation recomputation in large transformer models"
    (2022), `s b h (34 + 5 a s / h)` per layer, nothing recomputed, and the logits in 32 bits.
    """
    in_layer, tokens = 12 * width**2, length * examples
    weights = layers * (in_layer + 13 * width) + (vocabulary + length + 2) * width
    products = [tokens * (2 * in_layer + 4 * length * width)] * layers + [2 * tokens * vocabulary * width]
    kept = layers * tokens * width * (34 + 5 * heads * length / width) + 4 * tokens * vocabulary
    matrices = ((width, 3 * width), (width, width), (width, 4 * width), (4 * width, width))
    shapes = [shape for rows, columns in matrices for shape in ((rows, columns), (columns,))] + 4 * [(width,)]
    ends = ((vocabulary, width), (length, width), (width,), (width,))
    return Model(
        "1B transformer", examples, weights, 12 * layers + 4,
        (0, *products),  # the first product takes no input from outside, its embedding has a gradient
        activations=round(kept), shapes=(*layers * shapes, *ends),
        blocks=layers * tuple((rows + 1, columns) for rows, columns in matrices),
        positions=(length,) * (layers * len(matrices)),
        outside=(*(4 * layers) * (width,), *map(math.prod, ends)), hidden=layers * tuple(map(math.prod, matrices)),
        ends=tuple(map(math.prod, ends[:2])), outputs=length * vocabulary,
    )  # fmt: skip


# Methods.


@dataclasses.dataclass(frozen=True)
class Work:
    """What one section of a step does: the step itself, or one turn of a loop or condition in it.

    Attributes:
        reductions: Calls that reduce vectors and scalars; what one call is given can travel as one message.
        vectors: Vectors of weight space in them, `P` numbers in `T` tensors each.
        scalars: Scalars in them.
        joined: How many of the scalars travel in the tensor of another.
        others: A function of the model and the number of replicas: further calls, each a list of sizes of tensors.
        forward: Forward passes.
        backward: Backward and forward-mode passes.
        slopes: Backward passes to the activations alone.
        hessians: Products with the Hessian.
        share: Of the slice's examples that these passes take.
    """

    reductions: int = 0
    vectors: int = 0
    scalars: int = 0
    joined: int = 0
    others: Callable | None = None
    forward: int = 0
    backward: int = 0
    slopes: int = 0
    hessians: int = 0
    share: float = 1

    def collectives(self, model, replicas=2):
        """`(reductions, tensors in them, numbers in these)`."""
        calls = self.others(model, replicas) if self.others else []
        tensors = self.vectors * model.tensors + self.scalars - self.joined + sum(map(len, calls))
        numbers = self.vectors * model.weights + self.scalars + sum(map(sum, calls))
        return self.reductions + len(calls), tensors, numbers

    def flops(self, model):
        """Floating-point operations of the products."""
        passes = self.forward * model.forward + self.backward * model.backward
        return self.share * (passes + self.slopes * model.slopes + self.hessians * model.hessian)


GRADIENT = Work(reductions=1, vectors=1, forward=1, backward=1)
WITH_LOSS = Work(reductions=2, vectors=1, scalars=1, forward=1, backward=1)
LOSS = Work(reductions=1, scalars=1, forward=1)
PRODUCT = Work(reductions=1, vectors=1, hessians=1)


@dataclasses.dataclass(frozen=True)
class Method:
    """The formula of an optimizer.

    Attributes:
        sections: `{section: Work}`; the names are those of the loops and conditions in the graph.
        state: Vectors that it remembers.
        vectors: Vectors that a step holds at once at most, the gradient among them; the method's matrices
            count as those of layers that are as wide as long.
        recordings: How many times a first-order step's activations it holds at once at most.
        turns: `{section: how often in a step}`, where that is not once: a number, or a function of the model.
        iterates: Vectors that conjugate gradients store on the way.
        kept: A function of the model: numbers that it remembers beside the vectors. Optional.
        matrices: Whether it multiplies matrices of its own, so that `flops` is a lower bound: passes alone.
        traffic: Vectors of weight space that the update reads and writes, an estimate by reading the method.
        dense: Matrices of float64, with a row and a column for each weight, that a step holds at once at most.
        rows: Arrays of the rows of the Jacobian that a step holds at once at most.
    """

    sections: dict
    state: int
    vectors: int
    recordings: int = 1
    turns: dict = dataclasses.field(default_factory=dict)
    iterates: int = 0
    kept: Callable | None = None
    matrices: bool = False
    traffic: int = 0
    dense: int = 0
    rows: int = 0

    def collectives(self, model, replicas=2):
        """`(reductions, tensors in them, numbers in these)` of a step."""
        counts = [work.collectives(model, replicas) for work in self.sections.values()]
        return tuple(sum(turns * n for turns, n in zip(self._turns(model), column)) for column in zip(*counts))

    def tensors(self, model, replicas):
        """How many tensors the program of a step reduces, each section once."""
        return sum(work.collectives(model, replicas)[1] for work in self.sections.values())

    def numbers(self, model, replicas):
        """How many numbers the program of a step reduces, each section once."""
        return sum(work.collectives(model, replicas)[2] for work in self.sections.values())

    def flops(self, model):
        """Floating-point operations of a step."""
        return sum(turns * work.flops(model) for turns, work in zip(self._turns(model), self.sections.values()))

    def _turns(self, model):
        found = [self.turns.get(name, 1) for name in self.sections]
        return [turns(model) if callable(turns) else turns for turns in found]

    def remembered(self, model):
        """Numbers in the state."""
        return self.state * model.weights + (self.kept(model) if self.kept else 0)

    def memory(self, model):
        """Bytes on each replica: weights, state, what a step holds; of the rows of all replicas those of one."""
        vectors = 1 + self.vectors + self.iterates + self.rows * model.rows
        numbers = vectors * model.weights + 2 * self.dense * model.weights**2 + self.remembered(model)
        return WORD * numbers + self.recordings * model.activations


# Time.


def time_of(method, model, machine, replicas, packed=True):
    """`(arithmetic, update, bytes, latency)`: seconds of a step, by where they go.

    `packed`: what one call reduces travels as one message, as NCCL and XLA's combiner have it; else each tensor alone.
    """
    calls, tensors, numbers = method.collectives(model, replicas)
    arithmetic = method.flops(model) / (machine.peak * model.utilization)
    ring = 2 * (replicas - 1) / replicas * WORD * numbers / machine.bandwidth
    update = WORD * method.traffic * model.weights / machine.memory_bandwidth
    return arithmetic, update, ring, (calls if packed else tensors) * 2 * math.log2(replicas) * machine.latency


def efficiency(*args, **kwargs):
    """Share of the time that is not spent on communication."""
    *own, ring, latency = time_of(*args, **kwargs)
    return sum(own) / (sum(own) + ring + latency)
