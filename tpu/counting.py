"""Traces the train step of every optimizer and counts in it; see `graphs.py` for what.

    python tpu/counting.py tiny,wide sgd hessian_free        # prints the counts as JSON; without names, of all

A step is traced and not run: once on one device, for arithmetic and memory, and once on two replicas, for what they
reduce. Replicas are two logical CPUs under a `MirroredStrategy` whose two ways to reduce (a tensor, a batch of
tensors) leave a named identity in the graph for each tensor. Every reduction of `tf.distribute` goes through these two:
gradients, losses, metrics that are read, variables that are averaged when written. One process can hold one
`MirroredStrategy`, so import nothing from here that traces: run it.
"""

import json
import math
import os
import sys

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")  # TensorFlow's greetings, before it is imported

import keras
import tensorflow as tf
from graphs import PRODUCTS, TAG, activations, flops, needed, operations, peak, reductions, sections
from keras.src.backend.tensorflow.trainer import reduce_per_replica
from matrices import kernels
from methods import LEFT_OUT, OPTIMIZERS

import keras_curvature as kc
from keras_curvature.linearization.estimates.local_losses import matches
from keras_curvature.linearization.layers import ends, kronecker

# Models to trace.


def dense(widths, examples):
    """`(model, x, y)`: a perceptron under a squared error, whose second derivative is no matrix product."""
    layers = [keras.layers.Dense(n, activation="tanh") for n in widths[1:-1]]
    model = keras.Sequential([keras.Input((widths[0],)), *layers, keras.layers.Dense(widths[-1])])
    return model, "mse", tf.zeros((examples, widths[0])), tf.zeros((examples, widths[-1]))


def sliced(model, *rest):
    """The same, the batch in two slices one after the other."""
    return kc.curved(model, micro_batches=2), *rest


def resnet50(examples):
    """`(model, x, y)` of `keras.applications`, 224x224 pixels, 1000 classes."""
    model = keras.applications.ResNet50(weights=None, classifier_activation=None)
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    return model, loss, tf.zeros((examples, 224, 224, 3)), tf.zeros((examples,), tf.int32)


def images(examples):
    """Layers that are applied at several positions, by groups of channels too."""
    layers = [keras.layers.Conv2D(4, 3), keras.layers.Conv2D(6, 2, groups=2, use_bias=False), keras.layers.Flatten()]
    model = keras.Sequential([keras.Input((6, 6, 2)), *layers, keras.layers.Dense(3)])
    return model, "mse", tf.zeros((examples, 6, 6, 2)), tf.zeros((examples, 3))


def large(examples):
    """A layer with more than a million weights, at more positions than a sketch of it keeps."""
    layers = [keras.layers.Conv2D(512, 3, padding="same"), keras.layers.GlobalAveragePooling2D()]
    model = keras.Sequential([keras.Input((6, 6, 256)), *layers, keras.layers.Dense(3)])
    return model, "mse", tf.zeros((examples, 6, 6, 256)), tf.zeros((examples, 3))


TINY = (5, 7, 6, 4)  # widths
MODELS = {
    "tiny": lambda: dense(TINY, 8),
    "sliced": lambda: sliced(*dense(TINY, 8)),
    "wide": lambda: dense((256,) * 7, 1),  # weights are all that counts
    "tall": lambda: dense((8,) * 7, 4096),  # activations are all that counts
    "images": lambda: images(8),
    "large": lambda: large(8),
    "resnet50": lambda: resnet50(32),
}
FOR_MEMORY = ("wide", "tall")
CURVED = ("sliced",)


def traced(problem, optimizer, strategy=None):
    """`(graph, model)` of the train step as `fit` makes it; nothing is run."""
    make, curve = OPTIMIZERS[optimizer]
    scope = tf.distribute.get_strategy() if strategy is None else strategy
    with scope.scope():
        model, loss, x, y = MODELS[problem]()
        model = kc.curved(model) if curve else model
        model.compile(make(), loss, jit_compile=False)
        model._symbolic_build(data_batch=(x, y, None))  # as `fit` does before its first step
        model.make_train_function()  # a curved model creates its reports by this

    @tf.function(autograph=False)
    def step(x, y):
        return reduce_per_replica(scope.run(model.train_step, args=((x, y),)), scope, "auto")

    slices = [scope.experimental_distribute_values_from_function(lambda _, a=a: a) for a in (x, y)]
    return step.get_concrete_function(*(slices if strategy else (x, y))).graph, model


def forward(problem):
    """`[flops]` of the products of a forward pass, in order."""
    model, _, x, _ = MODELS[problem]()
    graph = tf.function(lambda x: model(x, training=True)).get_concrete_function(x).graph
    return [flops(op) for op in needed(graph) if op.type in PRODUCTS]


def two_replicas():
    """A `MirroredStrategy` over two logical CPUs that marks in the graph what it reduces."""
    devices = [tf.config.LogicalDeviceConfiguration()] * 2
    tf.config.set_logical_device_configuration(tf.config.list_physical_devices("CPU")[0], devices)
    strategy = tf.distribute.MirroredStrategy(["CPU:0", "CPU:1"])
    extended, asked = strategy.extended, iter(range(10**9))
    reduce_one, reduce_many = extended._reduce_to, extended._batch_reduce_to

    def marked(value, number):
        if not isinstance(value, tf.distribute.DistributedValues) or isinstance(value, tf.Variable):
            return value
        first, *rest = value.values
        return type(value)((tf.identity(first, f"{TAG}_{number}_"), *rest))

    def one(op, value, destinations, options):
        number = next(asked)
        return reduce_one(op, tf.nest.map_structure(lambda v: marked(v, number), value), destinations, options)

    def many(op, pairs, options):
        number = next(asked)
        return reduce_many(op, [(marked(v, number), to) for v, to in pairs], options)

    extended._reduce_to, extended._batch_reduce_to = one, many
    return strategy


# What is counted of a model.


def measures(problem):
    """The attributes of a `Model` of `costs.py`, but for its activations."""
    model, loss, x, _ = MODELS[problem]()
    given = {"examples": x.shape[0], "layers": forward(problem), "squares": loss == "mse"}
    return {**given, **weights_of(model)}


def weights_of(model):
    """What a formula takes of the weights of a built model."""
    shapes = [tuple(w.shape) for w in model.trainable_variables]
    blocks, outside, _ = kronecker.blocks(model)
    hidden, at_ends = kernels(model.trainable_variables, ends.ends_of_model(model))
    return {
        "weights": sum(map(math.prod, shapes)), "tensors": len(shapes), "shapes": shapes,
        "blocks": [tuple(block.shape) for block in blocks], "matched": list(map(matches, blocks)),
        "positions": list(map(positions, blocks)),
        "outside": [math.prod(shapes[i]) for i in outside],
        "hidden": hidden, "ends": at_ends, "outputs": math.prod(model.output_shape[1:]),
    }  # fmt: skip


def positions(block):
    """How often a layer is applied to an example: at each pixel, or once."""
    *groups, _, d_out = block.shape
    return math.prod(block.weights.layer.output.shape[1:]) // (math.prod(groups) * d_out)


def counted(problem, optimizer, strategy):
    """Counts of a step by section, numbers in the state, bytes of the peak and of what a first-order step keeps."""
    graph, model = traced(problem, optimizer)
    state = sum(math.prod(v.shape) for v in model.optimizer.variables if len(v.shape))
    share = getattr(model.optimizer, "curvature_batch", None) or 1
    # tiny products, of 2x2 systems or second derivatives of losses, are not passes
    floor = share * min(forward(problem))
    found = {
        "flops": {name: c.flops for name, c in sections(graph, operations(floor)).items()},
        "state": state, "peak": peak(graph), "activations": activations(graph),
    }  # fmt: skip
    if problem not in FOR_MEMORY:
        replicated, _ = traced(problem, optimizer, strategy)
        found["collectives"] = {
            name: [c.reductions, c.tensors, c.words] for name, c in sections(replicated, reductions).items()
        }
    return found


def main(problems, optimizers):
    """Print `{problem: {..., optimizer: counts}}`."""
    strategy, found = two_replicas(), {}
    for problem in problems.split(","):
        found[problem] = measures(problem)
        names = [o for o in optimizers or OPTIMIZERS if OPTIMIZERS[o][1] or problem not in CURVED]
        names = [o for o in names if o not in LEFT_OUT.get(problem, ())]
        found[problem]["optimizers"] = {name: counted(problem, name, strategy) for name in names}
    print(json.dumps(found))


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2:])
