"""Reading the graph of a traced step: what it reduces, what it multiplies, what it holds in memory at once.

The bodies of loops and the branches of conditions are counted apart, each once (`"step"` is what is outside of them):
only the caller knows how often they run. What a graph reduces is counted whether or not anybody uses the value, since a
collective between machines is stateful and is never pruned; what it multiplies and holds only where it is needed.
"""

import dataclasses
import math

import tensorflow as tf

TAG = "reduced_over_replicas"  # in the name of an identity: what it hands on is reduced
PRODUCTS = {"MatMul", "BatchMatMulV2", "Einsum", "Conv2D", "Conv2DBackpropInput", "Conv2DBackpropFilter"}
# operations that hand on the memory of their input, and those that have it from a variable or a caller
ALIASES = {
    "Identity", "IdentityN", "Reshape", "Squeeze", "ExpandDims", "StopGradient", "PreventGradient", "EnsureShape",
}  # fmt: skip
BORROWED = {"ReadVariableOp", "Const", "Placeholder", "NoOp"}


@dataclasses.dataclass(frozen=True)
class Count:
    """Counts of one section of a step: the step itself, or the body of one of its loops or conditions.

    Attributes:
        reductions: Reductions that were asked for; one of them may be of many tensors at once, which can be packed.
        tensors: Tensors in them.
        words: Numbers in these tensors, on each replica.
        flops: Floating-point operations of the matrix products and convolutions, on one device with the whole batch.
    """

    reductions: int = 0
    tensors: int = 0
    words: int = 0
    flops: int = 0

    def __add__(self, other):
        return Count(*(a + b for a, b in zip(dataclasses.astuple(self), dataclasses.astuple(other))))


# Walks.


def sections(graph, count):
    """`{section: Count}` of the sections that are not empty; `count(graph)` counts one graph without what it calls."""
    found = {}

    def visit(graph, name):
        found[name] = found.get(name, Count()) + count(graph)
        for op in graph.get_operations():
            for key, inner in called(op, graph):
                own = name if key == "f" else _section(op)
                visit(inner, own if name == "step" or key == "f" else f"{name}/{own}")

    visit(graph, "step")
    return {name: value for name, value in found.items() if value != Count()}


def _section(op):
    """The name of a loop or condition; of the loop of a `map_fn` that of the map."""
    *outer, last = op.name.split("/")
    return outer[-1] if outer and outer[-1].split("_")[0] == "map" else last


def called(op, graph):
    """`(key, graph)` of the functions that an operation calls: `f` where it is a plain call."""
    keys = [a.name for a in op.op_def.attr if a.type == "func"]
    return [(key, graph._get_function(op.get_attr(key).name).graph) for key in keys]


def needed(graph):
    """The operations that outputs and effects depend on, in the order in which they were traced."""
    waiting, reached = [t.op for t in graph.outputs] + list(graph.control_outputs), set()
    while waiting:
        op = waiting.pop()
        if op not in reached:
            reached.add(op)
            waiting.extend([t.op for t in op.inputs] + list(op.control_inputs))
    return [op for op in graph.get_operations() if op in reached]


def dimensions(tensor, rank=0):
    """The shape in integers: an unknown dimension counts as one, a shape of unknown rank as `rank` of these."""
    return [n or 1 for n in tensor.shape] if tensor.shape.rank is not None else [1] * rank


def numbers(tensor):
    """How many numbers a tensor holds; an unknown dimension counts as one."""
    return math.prod(dimensions(tensor))


# Counts.


def reductions(graph):
    """The `Count` of what is marked."""
    marks = [op for op in graph.get_operations() if TAG in op.name]
    asked = {op.name.split(TAG)[1].split("_")[1] for op in marks}
    return Count(len(asked), len(marks), sum(numbers(op.outputs[0]) for op in marks))


def operations(floor=1):
    """A counter of the floating-point operations of the needed products that have at least `floor` of them."""

    def count(graph):
        made = [flops(op) for op in needed(graph) if op.type in PRODUCTS]
        return Count(flops=sum(f for f in made if f >= floor))

    return count


def flops(op):
    """Floating-point operations of a product, two for each multiplication.

    A lower bound where static shapes are missing, as in loops that TensorFlow vectorizes.
    """
    if op.type == "Einsum":
        return 2 * math.prod(_labelled(op).values())
    if op.type == "Conv2D":
        image, kernel = op.outputs[0], op.inputs[1]
    elif op.type == "Conv2DBackpropInput":
        image, kernel = op.inputs[2], op.inputs[1]
    elif op.type == "Conv2DBackpropFilter":
        image, kernel = op.inputs[2], op.outputs[0]
    else:
        names = ("transpose_a", "transpose_b") if op.type == "MatMul" else ("adj_x", "adj_y")
        axes = (-2 if op.get_attr(names[0]) else -1), (-1 if op.get_attr(names[1]) else -2)
        summed = max(dimensions(t, 2)[axis] for t, axis in zip(op.inputs, axes))  # one of the two may know it
        return 2 * numbers(op.outputs[0]) * summed
    return 2 * numbers(image) * math.prod(dimensions(kernel)[:3])


def _labelled(op):
    """The length of each label of an Einsum: the largest that an input knows."""
    found = {}
    for term, tensor in zip(op.get_attr("equation").decode().split("->")[0].split(","), op.inputs):
        for label, n in zip(term, dimensions(tensor)):
            found[label] = max(n, found.get(label, 1))
    return found


# Memory.


def peak(graph):
    """Bytes of the temporary tensors that are alive at once at most, in the order in which the step was traced.

    A lower bound of the plainest executor: an operation but a product may write over an input that nobody needs any
    more; variables are not counted; of a function that is called, what it needs besides its arguments; of branches the
    larger one. A loop holds its variables, which its body makes anew. Fusion and reordering can do better, concurrency
    worse.
    """
    ops = needed(graph)
    owner, last = owners(ops), {}
    for i, op in enumerate(ops):
        for t in op.inputs:
            last[owner[t.ref()]] = i
    for t in graph.outputs:
        last[owner[t.ref()]] = len(ops)
    alive = most = 0
    for i, op in enumerate(ops):
        dying = {owner[t.ref()] for t in op.inputs if last[owner[t.ref()]] == i} - {None}
        freed = sum(_bytes(r) for r in dying)
        own = [t.ref() for t in op.outputs if owner[t.ref()] == t.ref()]
        made = sum(_bytes(r) for r in own)
        inside = max((peak(inner) for _, inner in called(op, graph)), default=0)
        most = max(most, alive + made - (0 if op.type in PRODUCTS else freed), alive + inside)
        alive += made - freed - sum(_bytes(r) for r in own if r not in last)
    return most


def _bytes(reference):
    tensor = reference.deref()
    return numbers(tensor) * tensor.dtype.size


def activations(graph):
    """Bytes that the forward pass leaves for the backward pass, from the traced step of a first-order optimizer.

    The backward pass is what TensorFlow puts under `gradient_tape` and whatever follows from it; what it reads of
    the rest is kept until then.
    """
    backward, kept, owner = set(), set(), owners(needed(graph))
    for op in needed(graph):
        if "gradient_tape" in op.name or any(t.op in backward for t in op.inputs):
            backward.add(op)
        if "gradient_tape" in op.name:  # and not an optimizer, which reads its slots
            kept |= {owner[t.ref()] for t in op.inputs if t.op not in backward}
    return sum(_bytes(r) for r in kept - {None})


def owners(ops):
    """Of each tensor the reference of the one whose memory it is; `None` where that is a variable's or a caller's."""
    owner = {}
    for op in ops:
        for i, t in enumerate(op.outputs):
            borrowed = op.type in BORROWED or t.dtype in (tf.resource, tf.variant)
            owner[t.ref()] = None if borrowed else owner[op.inputs[i].ref()] if op.type in ALIASES else t.ref()
    return owner
