"""Registries of tiny models and losses: every kind of layer and of loss that the package says it works with.

`MODELS` and `LOSSES` map a name to `builder(seed) -> Case`. The number type is Keras' own at the time of the call:
`with float64():` for a comparison that is sharp.
"""

import contextlib
import dataclasses
import importlib.metadata

import keras
import numpy as np
import tensorflow as tf
from keras import layers

BATCH = 6
# `tensorflow-tpu` has no XLA compiler for the host: Keras' default of `jit_compile` does not train there
HAS_XLA = not any(d.metadata["Name"].replace("_", "-") == "tensorflow-tpu" for d in importlib.metadata.distributions())
MODELS, LOSSES = {}, {}
# Those whose rows are refused, as tests name them that take models and losses together.
WITHOUT_ROWS = {"loss_cosine_similarity", "loss_squared_logarithmic", "loss_focal", "loss_own_compute_loss",
                "loss_own_compute_loss_without_training"}  # fmt: skip
# Tests that are dear for every kind run these with `-m slow` alone: another kind does the same, or nearly the same.
ALIKE = {
    "dense_selu", "conv1d", "conv3d", "separable_conv", "max_pooling_odd", "max_pooling_overlapping", "max_pooling_1d",
    "average_pooling", "batch_normalization_2d", "unit_normalization", "gaussian_dropout", "alpha_dropout", "gru",
    "unrolled_lstm", "stacked_lstm", "recurrent_dropout", "bidirectional", "embedding_lstm", "nested",
    "subclassed_without_training",
    "mae", "log_cosh", "hinge", "squared_hinge", "kl_divergence", "binary_smoothed", "categorical_smoothed",
    "categorical_from_softmax", "own_compute_loss_without_training",
}  # fmt: skip


@dataclasses.dataclass
class Case:
    """A model that is not compiled yet, one batch, and the loss to compile with."""

    model: keras.Model
    x: object
    y: object
    loss: object = "mse"
    sample_weight: object = None
    loss_weights: object = None

    def compile(self, optimizer="sgd", **kwargs):
        """Compile the model; returns the case."""
        self.model.compile(optimizer=optimizer, loss=self.loss, loss_weights=self.loss_weights, **kwargs)
        return self

    @property
    def batch(self):
        """`(x, y, sample_weight)`."""
        return self.x, self.y, self.sample_weight


def usual(names):
    """Those of the names of models and losses, `loss_` before these or not, that are not `ALIKE` another."""
    return [name for name in names if name.removeprefix("loss_") not in ALIKE]


@contextlib.contextmanager
def float64():
    """Keras in float64 while open: the float type, and the dtype policy that Keras remembers from the first layer."""
    floatx, policy = keras.config.floatx(), keras.config.dtype_policy()
    keras.config.set_floatx("float64")
    keras.config.set_dtype_policy("float64")
    try:
        yield
    finally:
        keras.config.set_floatx(floatx)
        keras.config.set_dtype_policy(policy)


def flat(tensors):
    """Tensors or Keras variables as one numpy vector."""
    return np.concatenate([t.numpy().ravel() for t in tensors])


def put(variables, vector):
    """Assign one numpy vector to Keras variables."""
    sizes = np.cumsum([int(np.prod(v.shape)) for v in variables])[:-1]
    for variable, part in zip(variables, np.split(np.asarray(vector), sizes)):
        variable.assign(part.reshape(variable.shape))


def by_central_differences(outputs, variables, h=1e-6):
    """The Jacobian of a function of no arguments in the variables."""
    w, rows = flat(variables), []
    for unit in np.eye(len(w)):
        sides = []
        for sign in (1, -1):
            put(variables, w + sign * h * unit)
            sides.append(np.ravel(outputs()))
        rows.append((sides[0] - sides[1]) / (2 * h))
    put(variables, w)
    return np.stack(rows, 1)


def model_case(builder):
    """Register `builder(random) -> Case` under its name, seeded."""
    MODELS[builder.__name__] = _seeded(builder)
    return builder


def loss_case(builder):
    """Register `builder(random) -> Case` under its name, seeded."""
    LOSSES[builder.__name__] = _seeded(builder)
    return builder


def _seeded(builder):
    def build(seed=0):
        keras.utils.set_random_seed(seed)
        random = np.random.default_rng(seed)
        case = builder(random)
        for variable in case.model.trainable_variables:  # biases and scales away from 0 and 1
            noise = 0.1 * random.standard_normal(variable.shape)
            variable.assign_add(noise.astype(variable.dtype))
        return case

    return build


def normal(random, *shape):
    """A standard normal batch of Keras' float type."""
    return random.standard_normal(shape).astype(keras.config.floatx())


def words(random, length=5, vocabulary=7):
    """Token ids, `(batch, length)`; the ends are 0, for masks."""
    tokens = random.integers(1, vocabulary, (BATCH, length))
    tokens[:, -1] = 0
    tokens[0, 2:] = 0
    return tokens.astype("int32")


def _sequential(shape, *stack, outputs=3):
    """A case of a stack of layers, a flattening where one is needed, and a linear output."""

    def build(random):
        model = keras.Sequential([keras.Input(shape), *[make() for make in stack]])
        if len(model.output_shape) > 2:
            model.add(layers.Flatten())
        model.add(layers.Dense(outputs))
        return Case(model, normal(random, BATCH, *shape), normal(random, BATCH, outputs))

    return build


STACKS = {
    "dense": ((4,), lambda: layers.Dense(5, activation="tanh")),
    "dense_selu": ((4,), lambda: layers.Dense(5, activation="selu"), lambda: layers.Dense(4, activation="swish")),
    "einsum_dense": ((3, 4), lambda: layers.EinsumDense("abc,cd->abd", (3, 3), bias_axes="d", activation="tanh")),
    "conv1d": ((6, 2), lambda: layers.Conv1D(3, 3, activation="tanh", padding="same")),
    "conv2d": ((5, 5, 2), lambda: layers.Conv2D(3, 3, activation="tanh", strides=2)),
    "conv3d": ((3, 3, 3, 2), lambda: layers.Conv3D(2, 2, activation="tanh")),
    "conv2d_transpose": ((3, 3, 2), lambda: layers.Conv2DTranspose(2, 2, strides=2, activation="tanh")),
    "depthwise_conv": ((4, 4, 2), lambda: layers.DepthwiseConv2D(2, depth_multiplier=2, activation="tanh")),
    "separable_conv": ((4, 4, 2), lambda: layers.SeparableConv2D(3, 2, activation="tanh")),
    "max_pooling": ((4, 4, 2), lambda: layers.Conv2D(3, 2, activation="tanh", padding="same"), layers.MaxPooling2D),
    "max_pooling_odd": ((5, 5, 2), lambda: layers.Conv2D(2, 1, activation="relu"), lambda: layers.MaxPooling2D(2)),
    "max_pooling_overlapping": ((5, 5, 2), lambda: layers.Conv2D(2, 1), lambda: layers.MaxPooling2D(3, 2, "same")),
    "max_pooling_1d": ((6, 2), lambda: layers.Conv1D(3, 2, activation="tanh"), layers.MaxPooling1D),
    "average_pooling": ((4, 4, 2), lambda: layers.Conv2D(3, 2, activation="tanh"), lambda: layers.AveragePooling2D(2)),
    "global_average_pooling": ((4, 4, 2), lambda: layers.Conv2D(3, 2), layers.GlobalAveragePooling2D),
    "global_max_pooling": ((4, 4, 2), lambda: layers.Conv2D(3, 2, activation="tanh"), layers.GlobalMaxPooling2D),
    "batch_normalization": (
        (4,), lambda: layers.Dense(5), layers.BatchNormalization, lambda: layers.Activation("tanh"),
    ),
    "batch_normalization_2d": (
        (4, 4, 2), lambda: layers.Conv2D(3, 2, use_bias=False), lambda: layers.BatchNormalization(momentum=0.5),
        lambda: layers.Activation("relu"),
    ),
    "layer_normalization": (
        (4,), lambda: layers.Dense(5), layers.LayerNormalization, lambda: layers.Activation("tanh"),
    ),
    "group_normalization": (
        (4, 4, 2), lambda: layers.Conv2D(4, 2), lambda: layers.GroupNormalization(2), lambda: layers.Activation("tanh"),
    ),
    "unit_normalization": ((4,), lambda: layers.Dense(5), layers.UnitNormalization),
    "rms_normalization": ((4,), lambda: layers.Dense(5), layers.RMSNormalization, lambda: layers.Activation("tanh")),
    "dropout": ((4,), lambda: layers.Dense(8, activation="tanh"), lambda: layers.Dropout(0.5, seed=3)),
    "spatial_dropout": ((4, 3), lambda: layers.Conv1D(4, 2, activation="tanh"), lambda: layers.SpatialDropout1D(0.5)),
    "gaussian_dropout": ((4,), lambda: layers.Dense(5, activation="tanh"), lambda: layers.GaussianDropout(0.3)),
    "gaussian_noise": ((4,), lambda: layers.GaussianNoise(0.3), lambda: layers.Dense(5, activation="tanh")),
    "alpha_dropout": ((4,), lambda: layers.Dense(5, activation="selu"), lambda: layers.AlphaDropout(0.3)),
    "simple_rnn": ((4, 3), lambda: layers.SimpleRNN(4)),
    "lstm": ((4, 3), lambda: layers.LSTM(3)),
    "gru": ((4, 3), lambda: layers.GRU(3)),
    "unrolled_lstm": ((3, 3), lambda: layers.LSTM(3, unroll=True)),
    "stacked_lstm": ((4, 2), lambda: layers.LSTM(3, return_sequences=True), lambda: layers.LSTM(2)),
    "recurrent_dropout": ((4, 3), lambda: layers.LSTM(3, dropout=0.3, recurrent_dropout=0.3)),
    "bidirectional": ((4, 2), lambda: layers.Bidirectional(layers.GRU(2))),
    "prelu": ((4,), lambda: layers.Dense(5), layers.PReLU),
    "time_distributed": ((3, 4), lambda: layers.TimeDistributed(layers.Dense(3, activation="tanh"))),
}  # fmt: skip
for _name, (_shape, *_stack) in STACKS.items():
    MODELS[_name] = _seeded(_sequential(_shape, *_stack))


@model_case
def embedding(random):
    model = keras.Sequential([keras.Input((5,), dtype="int32"), layers.Embedding(7, 3), layers.Flatten()])
    model.add(layers.Dense(2))
    return Case(model, words(random), normal(random, BATCH, 2))


@model_case
def embedding_lstm(random):
    """A mask from the embedding, through a recurrent layer."""
    model = keras.Sequential([keras.Input((5,), dtype="int32"), layers.Embedding(7, 3, mask_zero=True)])
    model.add(layers.LSTM(3))
    model.add(layers.Dense(4, activation="softmax"))
    y = random.integers(0, 4, (BATCH,)).astype("int32")
    return Case(model, words(random), y, keras.losses.SparseCategoricalCrossentropy())


@model_case
def masked_outputs(random):
    """A mask that reaches the outputs: Keras leaves masked steps out of the loss."""
    model = keras.Sequential([keras.Input((5,), dtype="int32"), layers.Embedding(7, 3, mask_zero=True)])
    model.add(layers.GRU(3, return_sequences=True))
    model.add(layers.Dense(2))
    return Case(model, words(random), normal(random, BATCH, 5, 2))


@model_case
def attention(random):
    """One block of a transformer."""
    x = inputs = keras.Input((3, 4))
    attended = layers.MultiHeadAttention(num_heads=2, key_dim=2, dropout=0.2)(x, x)
    x = layers.LayerNormalization()(x + attended)
    x = layers.LayerNormalization()(x + layers.Dense(4)(layers.Dense(6, activation="gelu")(x)))
    model = keras.Model(inputs, layers.Dense(3)(layers.GlobalAveragePooling1D()(x)))
    y = random.integers(0, 3, (BATCH,)).astype("int32")
    return Case(model, normal(random, BATCH, 3, 4), y, keras.losses.SparseCategoricalCrossentropy(from_logits=True))


@model_case
def shared_layer(random):
    """A layer used twice on one path, and another used on two inputs."""
    one, two = keras.Input((4,)), keras.Input((4,))
    hidden, both = layers.Dense(4, activation="tanh"), layers.Dense(3, activation="tanh")
    model = keras.Model([one, two], layers.Dense(2)(layers.concatenate([both(hidden(hidden(one))), both(two)])))
    return Case(model, [normal(random, BATCH, 4), normal(random, BATCH, 4)], normal(random, BATCH, 2))


@model_case
def nested(random):
    """A model inside a model, each with state."""
    inner = keras.Sequential([keras.Input((4,)), layers.Dense(5), layers.BatchNormalization(), layers.Dropout(0.3)])
    inputs = keras.Input((4,))
    model = keras.Model(inputs, layers.Dense(2)(layers.Activation("tanh")(inner(inputs))))
    return Case(model, normal(random, BATCH, 4), normal(random, BATCH, 2))


@keras.saving.register_keras_serializable(package="cases")
class Subclassed(keras.Model):
    """A model whose `call` does not pass `training` on to its layers: Keras' call context does."""

    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        self.hidden, self.normalized = layers.Dense(6, activation="tanh"), layers.BatchNormalization()
        self.dropout, self.head = layers.Dropout(0.4), layers.Dense(3)

    def call(self, inputs, training=False):
        """`inputs` to three outputs."""
        return self.head(self.dropout(self.normalized(self.hidden(inputs))))


@keras.saving.register_keras_serializable(package="cases")
class SubclassedPassing(Subclassed):
    """The same, with `training` passed on by hand."""

    def call(self, inputs, training=False):
        """`inputs` to three outputs."""
        x = self.normalized(self.hidden(inputs), training=training)
        return self.head(self.dropout(x, training=training))


@keras.saving.register_keras_serializable(package="cases")
class SubclassedWithout(Subclassed):
    """The same, with no `training` argument: Keras' own train step then runs it as in inference."""

    def call(self, inputs):
        """`inputs` to three outputs."""
        return super().call(inputs)


def _subclassed(cls):
    def build(random):
        model, x = cls(), normal(random, BATCH, 4)
        model(x)
        return Case(model, x, normal(random, BATCH, 3))

    return build


MODELS["subclassed"] = _seeded(_subclassed(Subclassed))
MODELS["subclassed_passing_training"] = _seeded(_subclassed(SubclassedPassing))
MODELS["subclassed_without_training"] = _seeded(_subclassed(SubclassedWithout))


@model_case
def frozen(random):
    """A frozen layer, and a frozen BatchNormalization, which Keras then runs on its moving statistics."""
    model = keras.Sequential([keras.Input((4,)), layers.Dense(5, activation="tanh"), layers.BatchNormalization()])
    model.layers[0].trainable = model.layers[1].trainable = False
    model.add(layers.Dense(4, activation="tanh"))
    model.add(layers.Dense(2))
    return Case(model, normal(random, BATCH, 4), normal(random, BATCH, 2))


@model_case
def several_outputs(random):
    """Two named outputs with losses and weights of their own."""
    inputs = keras.Input((4,))
    hidden = layers.Dense(5, activation="tanh")(inputs)
    model = keras.Model(
        inputs, {"value": layers.Dense(2, name="value")(hidden), "kind": layers.Dense(3, name="kind")(hidden)}
    )
    y = {"value": normal(random, BATCH, 2), "kind": random.integers(0, 3, (BATCH,)).astype("int32")}
    loss = {"value": "mse", "kind": keras.losses.SparseCategoricalCrossentropy(from_logits=True)}
    return Case(model, normal(random, BATCH, 4), y, loss, loss_weights={"value": 0.3, "kind": 2.0})


# Losses, on one small network.


def _network(outputs, activation=None, **kwargs):
    hidden = layers.Dense(4, activation="tanh", **kwargs)
    return keras.Sequential([keras.Input((3,)), hidden, layers.Dense(outputs, activation=activation)])


def _labels(random, classes=3):
    return random.integers(0, classes, (BATCH,)).astype("int32")


def _one_hot(random, classes=3):
    return np.eye(classes)[_labels(random, classes)].astype(keras.config.floatx())


def _soft_labels(random):
    p = np.exp(normal(random, BATCH, 3))
    return p / p.sum(-1, keepdims=True)


def _regression(loss):
    return lambda random: Case(_network(2), normal(random, BATCH, 3), 3 * normal(random, BATCH, 2), loss())


def _positive(loss, activation):
    def build(random):
        return Case(_network(2, activation), normal(random, BATCH, 3), np.abs(normal(random, BATCH, 2)), loss())

    return build


def _binary(loss, activation=None):
    def build(random):
        y = random.integers(0, 2, (BATCH, 2)).astype(keras.config.floatx())
        return Case(_network(2, activation), normal(random, BATCH, 3), y, loss())

    return build


def _classes(loss, targets, activation=None):
    return lambda random: Case(_network(3, activation), normal(random, BATCH, 3), targets(random), loss())


_crossentropy, _sparse = keras.losses.CategoricalCrossentropy, keras.losses.SparseCategoricalCrossentropy
_binary_crossentropy = keras.losses.BinaryCrossentropy
LOSSES.update({
    name: _seeded(build) for name, build in {
        "mse": _regression(keras.losses.MeanSquaredError),
        "mse_sum": _regression(lambda: keras.losses.MeanSquaredError(reduction="sum")),
        "mae": _regression(keras.losses.MeanAbsoluteError),
        "huber": _regression(keras.losses.Huber),
        "log_cosh": _regression(keras.losses.LogCosh),
        "poisson": _positive(keras.losses.Poisson, "softplus"),
        "hinge": _binary(keras.losses.Hinge),
        "squared_hinge": _binary(keras.losses.SquaredHinge),
        "kl_divergence": _classes(keras.losses.KLDivergence, _soft_labels, "softmax"),
        "binary_from_logits": _binary(lambda: _binary_crossentropy(from_logits=True)),
        "binary_from_sigmoid": _binary(_binary_crossentropy, "sigmoid"),
        "binary_smoothed": _binary(lambda: _binary_crossentropy(from_logits=True, label_smoothing=0.1)),
        "categorical_from_logits": _classes(lambda: _crossentropy(from_logits=True), _soft_labels),
        "categorical_from_softmax": _classes(_crossentropy, _soft_labels, "softmax"),
        "categorical_smoothed": _classes(lambda: _crossentropy(from_logits=True, label_smoothing=0.1), _one_hot),
        "sparse_from_logits": _classes(lambda: _sparse(from_logits=True), _labels),
        "sparse_from_softmax": _classes(_sparse, _labels, "softmax"),
        "cosine_similarity": _regression(keras.losses.CosineSimilarity),
        "squared_logarithmic": _positive(keras.losses.MeanSquaredLogarithmicError, "softplus"),
        "focal": _classes(
            lambda: keras.losses.CategoricalFocalCrossentropy(from_logits=True), _one_hot
        ),
    }.items()
})  # fmt: skip


@loss_case
def sample_weights(random):
    case = _classes(lambda: _sparse(from_logits=True), _labels)(random)
    case.sample_weight = np.linspace(0.0, 2.0, BATCH).astype(keras.config.floatx())
    return case


@loss_case
def loss_weights_list(random):
    inputs = keras.Input((3,))
    hidden = layers.Dense(4, activation="tanh")(inputs)
    model = keras.Model(inputs, [layers.Dense(2)(hidden), layers.Dense(1, activation="sigmoid")(hidden)])
    y = [normal(random, BATCH, 2), random.integers(0, 2, (BATCH, 1)).astype(keras.config.floatx())]
    return Case(model, normal(random, BATCH, 3), y, ["mse", "binary_crossentropy"], loss_weights=[0.5, 1.5])


@loss_case
def one_output_without_loss(random):
    """Of two outputs one has no loss."""
    inputs = keras.Input((3,))
    hidden = layers.Dense(4, activation="tanh", name="hidden")(inputs)
    model = keras.Model(inputs, {"value": layers.Dense(2, name="value")(hidden), "features": hidden})
    return Case(model, normal(random, BATCH, 3), {"value": normal(random, BATCH, 2)}, {"value": "mse"})


@loss_case
def regularized(random):
    """L1, L2 and both, on kernels and a bias."""
    L1L2 = keras.regularizers.L1L2  # in Keras 3.10 `L1` and `L2` are float32 always
    model = keras.Sequential([
        keras.Input((3,)),
        layers.Dense(4, activation="tanh", kernel_regularizer=L1L2(l2=0.03), bias_regularizer=L1L2(0.01)),
        layers.Dense(2, kernel_regularizer=L1L2(0.02, 0.05)),
    ])  # fmt: skip
    return Case(model, normal(random, BATCH, 3), normal(random, BATCH, 2))


@loss_case
def activity_regularized(random):
    model = _network(2, activity_regularizer=keras.regularizers.L2(0.1))
    return Case(model, normal(random, BATCH, 3), normal(random, BATCH, 2))


@keras.saving.register_keras_serializable(package="cases")
class Penalty(layers.Layer):
    """Adds a loss that depends on what passes through."""

    def call(self, inputs):
        """`inputs`, unchanged."""
        self.add_loss(0.1 * tf.reduce_mean(tf.math.sin(inputs)))
        return inputs


@loss_case
def added_loss(random):
    model = keras.Sequential([keras.Input((3,)), layers.Dense(4, activation="tanh"), Penalty(), layers.Dense(2)])
    return Case(model, normal(random, BATCH, 3), normal(random, BATCH, 2))


@keras.saving.register_keras_serializable(package="cases")
class OwnLoss(keras.Model):
    """A model with a loss of its own, which takes `training`."""

    def compute_loss(self, x=None, y=None, y_pred=None, sample_weight=None, training=True):
        """A convex function of the outputs."""
        return tf.reduce_mean(tf.math.softplus(y_pred) - y * y_pred)


@keras.saving.register_keras_serializable(package="cases")
class OwnLossOfOldSignature(keras.Model):
    """The same, without `training`, and with the compiled loss added."""

    def compute_loss(self, x=None, y=None, y_pred=None, sample_weight=None):
        """The compiled loss and a convex function of the outputs."""
        return super().compute_loss(x, y, y_pred, sample_weight) + 0.1 * tf.reduce_mean(tf.math.cosh(y_pred))


def _own_loss(cls):
    def build(random):
        inputs = keras.Input((3,))
        model = cls(inputs, layers.Dense(2)(layers.Dense(4, activation="tanh")(inputs)))
        return Case(model, normal(random, BATCH, 3), normal(random, BATCH, 2))

    return build


LOSSES["own_compute_loss"] = _seeded(_own_loss(OwnLoss))
LOSSES["own_compute_loss_without_training"] = _seeded(_own_loss(OwnLossOfOldSignature))
