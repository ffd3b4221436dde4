"""Operations whose derivative TensorFlow lacks: each is zero, right, or refused by name."""

import keras
import numpy as np
import pytest
import tensorflow as tf
from selection import some
from tensorflow.python.framework import op_def_registry

import keras_curvature as kc
from keras_curvature.keras_internals import is_continuous, replaced
from keras_curvature.linearization.pure import second_derivatives
from keras_curvature.linearization.pure.differentiability import (
    ZERO,
    NotDifferentiable,
    strictly,
)

# Registered as not differentiable, with floating inputs and outputs, and the derivative is not zero: refused, but for
# the four gradients at the end, which `second_derivatives.INSTEAD` avoids.
REFUSED = {
    "Assign", "AssignAdd", "AssignSub", "CTCBeamSearchDecoder", "CTCGreedyDecoder", "DrawBoundingBoxes",
    "ExtractGlimpse", "GenerateBoundingBoxProposals", "HSVToRGB", "LinSpace", "LoadAndRemapMatrix", "LookupTableFind",
    "LookupTableFindV2", "OneHot", "ParameterizedTruncatedNormal", "PyFunc", "PyFuncStateless", "RaggedRange",
    "RandomCrop", "RandomShuffle", "Range", "ReduceDataset", "SampleDistortedBoundingBox",
    "SampleDistortedBoundingBoxV2", "ScatterAdd", "ScatterDiv", "ScatterMul", "ScatterNdAdd", "ScatterNdSub",
    "ScatterNdUpdate", "ScatterSub", "SdcaOptimizer", "SdcaOptimizerV2", "SparseAddGrad", "SparseConcat", "StackPush",
    "TensorArrayGradV3", "TensorArrayGradWithShape", "TensorListConcatLists", "TensorListPushBackBatch",
    "XlaVariadicReduce",
    "FakeQuantWithMinMaxArgsGradient", "FakeQuantWithMinMaxVarsGradient",
    "FakeQuantWithMinMaxVarsPerChannelGradient",
    "ResizeBilinearGrad",
}  # fmt: skip

# Gradients that are not in the registry at all: refused, but for those in `second_derivatives.ADDED`.
UNREGISTERED = {
    "BatchNormWithGlobalNormalizationGrad", "BlockLSTMGrad", "BlockLSTMGradV2", "CholeskyGrad",
    "CropAndResizeGradBoxes", "CudnnRNNBackprop", "CudnnRNNBackpropV2", "CudnnRNNBackpropV3",
    "Dilation2DBackpropFilter", "Dilation2DBackpropInput", "FractionalAvgPoolGrad", "FractionalMaxPoolGrad",
    "GRUBlockCellGrad", "IgammaGradA", "LSTMBlockCellGrad", "MaxPoolGradWithArgmax", "RaggedTensorToVariantGradient",
    "RandomGammaGrad", "SparseMatrixSoftmaxGrad", "SparseSegmentMeanGradV2", "SparseSegmentSqrtNGradV2",
    "SparseSegmentSumGradV2", "SparseSliceGrad", "SymbolicGradient", "TileGrad", "UnbatchGrad",
}  # fmt: skip


def _registry():
    return replaced.GRADIENT_REGISTRY._registry


def test_every_operation_without_a_derivative_is_in_a_table():
    registry = _registry()
    found = {name for name, entry in registry.items() if entry["type"] is None and op_def_registry.get(name)}
    found = {name for name in found if is_continuous(name)}
    assert found == REFUSED | set(ZERO)
    for name in REFUSED | UNREGISTERED | set(second_derivatives.ADDED):
        assert name in registry or hasattr(tf.raw_ops, name)
    assert not (UNREGISTERED | set(second_derivatives.ADDED)) & set(registry)


@pytest.mark.parametrize("operation", sorted(REFUSED | UNREGISTERED))
def test_refused_in_strict_derivatives_alone(operation):
    with strictly():
        gradient = replaced.GRADIENT_REGISTRY.lookup(operation)
        with pytest.raises(NotDifferentiable, match=f"`{operation}`.*`SOAP`"):
            gradient(None)
    if operation in REFUSED:  # everybody else gets TensorFlow's answer
        assert replaced.GRADIENT_REGISTRY.lookup(operation) is None
    else:
        with pytest.raises(LookupError):
            replaced.GRADIENT_REGISTRY.lookup(operation)


@pytest.mark.parametrize("operation", sorted(ZERO))
def test_zero_stays_zero(operation):
    with strictly():
        assert replaced.GRADIENT_REGISTRY.lookup(operation) is None


def _some(*shape, seed=0):
    return tf.constant(np.random.default_rng(seed).normal(size=shape), tf.float32)


def _resize(size, *args, **kwargs):
    return lambda x: tf.image.resize(x, size, *args, **kwargs)


def _crop(x):
    return tf.image.crop_and_resize(x, [[0.1, 0.1, 0.8, 0.9], [0.0, 0.1, 0.8, 0.9]], [0, 1], (3, 3))


def _filled(x):
    rows = tf.raw_ops.SparseFillEmptyRows(
        indices=[[0, 1], [2, 3]], values=x[:2], dense_shape=[4, 5], default_value=x[2]
    )
    return rows.output_values


def _ragged_filled(x):
    return tf.raw_ops.RaggedFillEmptyRows(value_rowids=[0, 2], values=x[:2], nrows=4, default_value=x[2]).output_values


IMAGE, TABLE = (2, 5, 4, 3), (5, 4)
OPERATIONS = {
    "bilinear": (_resize((8, 7)), IMAGE),
    "bilinear with aligned corners": (
        lambda x: tf.compat.v1.image.resize_bilinear(x, (8, 7), align_corners=True), IMAGE
    ),
    "nearest": (_resize((8, 7), "nearest"), IMAGE),
    "bicubic": (_resize((8, 7), "bicubic"), IMAGE),
    "lanczos": (_resize((8, 7), "lanczos3"), IMAGE),
    "gaussian": (_resize((3, 2), "gaussian"), IMAGE),
    "antialiased": (_resize((3, 2), antialias=True), IMAGE),
    "crop": (_crop, IMAGE),
    "softsign": (lambda x: tf.nn.softsign(x + 2.0), IMAGE),
    "local response normalization": (lambda x: tf.nn.lrn(x, 1, 1.0, 0.5, 0.7), IMAGE),
    "segment sum": (lambda x: tf.sparse.segment_sum(x, [0, 1, 1, 4], [0, 0, 1, 2]), TABLE),
    "segment mean": (lambda x: tf.sparse.segment_mean(x, [0, 1, 1, 4], [0, 0, 1, 2]), TABLE),
    "segment sqrt n": (lambda x: tf.sparse.segment_sqrt_n(x, [0, 1, 1, 4], [0, 0, 1, 2]), TABLE),
    "filled rows": (_filled, (3,)),
    "filled ragged rows": (_ragged_filled, (3,)),
}  # fmt: skip


def _gradient(fn, x, cotangent):
    with tf.GradientTape() as tape:
        tape.watch(x)
        y = fn(x)
    return tape.gradient(y, x, output_gradients=cotangent)


@pytest.mark.parametrize("name", OPERATIONS)
def test_second_derivatives(name):
    fn, shape = OPERATIONS[name]
    x, v, eps = _some(*shape), _some(*shape, seed=1), 1e-2
    c = _some(*fn(x).shape, seed=2)

    def gradient(
        x,
    ):  # of something curved, whose gradient passes through the operation twice
        return _gradient(lambda x: tf.tanh(fn(tf.tanh(x))), x, c)

    with strictly(), tf.GradientTape() as tape:
        tape.watch(x)
        g = gradient(x)
    with strictly():
        product = tape.gradient(g, x, output_gradients=v)
    central = (gradient(x + eps * v) - gradient(x - eps * v)) / (2 * eps)
    np.testing.assert_allclose(product, central, atol=3e-3 * np.abs(central).max() + 1e-4)


@pytest.mark.parametrize("name", ["bilinear", "nearest", "bicubic", "lanczos", "antialiased", "softsign"])
def test_forward_mode_in_a_graph(name):
    fn, shape = OPERATIONS[name]
    x, v, eps = _some(*shape), _some(*shape, seed=1), 1e-2

    @tf.function(autograph=False)
    def pushed(x, v):
        c = tf.zeros_like(fn(x))
        with strictly(), tf.GradientTape() as tape:
            tape.watch(c)
            g = _gradient(fn, x, c)
        with strictly():
            return tape.gradient(g, c, output_gradients=v)

    central = (fn(x + eps * v) - fn(x - eps * v)) / (2 * eps)
    np.testing.assert_allclose(pushed(x, v), central, atol=2e-3 * np.abs(central).max())


QUANTIZED = {
    "args": lambda x, low, high: tf.quantization.fake_quant_with_min_max_args(x, -0.5, 0.7),
    "vars": lambda x, low, high: tf.quantization.fake_quant_with_min_max_vars(x, low[0], high[0]),
    "channels": tf.quantization.fake_quant_with_min_max_vars_per_channel,
}


@pytest.mark.parametrize("name", QUANTIZED)
def test_fake_quantization_is_linear_in_the_incoming_gradient(name):
    x, low, high = _some(4, 3), tf.constant([-0.5] * 3), tf.constant([0.7] * 3)
    c, arguments = _some(4, 3, seed=2), [x, low, high]

    def gradient(c):
        with tf.GradientTape() as tape:
            tape.watch(arguments)
            y = QUANTIZED[name](*arguments)
        return tape.gradient(y, arguments, output_gradients=c, unconnected_gradients="zero")

    v = [_some(*a.shape, seed=3) for a in arguments]
    with strictly(), tf.GradientTape() as tape:
        tape.watch(c)
        g = gradient(c)
    with strictly():
        pushed = tape.gradient(g, c, output_gradients=v)
    other = _some(4, 3, seed=4)  # <J' other, v> = <other, J v>
    expected = sum(float(tf.reduce_sum(a * b)) for a, b in zip(gradient(other), v))
    assert float(tf.reduce_sum(other * pushed)) == pytest.approx(expected, rel=1e-4)
    if name == "args":  # TensorFlow's own first derivative
        inside = (x > -0.5) & (x < 0.7)
        np.testing.assert_allclose(g[0], tf.where(inside, c, 0.0))


RESIZING = {
    "upsampling, nearest": lambda: keras.layers.UpSampling2D(2, interpolation="nearest"),
    "upsampling, bilinear": lambda: keras.layers.UpSampling2D(2, interpolation="bilinear"),
    "upsampling, bicubic": lambda: keras.layers.UpSampling2D(2, interpolation="bicubic"),
    "resizing, lanczos": lambda: keras.layers.Resizing(8, 8, interpolation="lanczos5"),
    "resizing, antialiased": lambda: keras.layers.Resizing(8, 8, interpolation="bilinear", antialias=True),
}


def _model(resizing):
    keras.utils.set_random_seed(0)
    layers = [
        keras.Input((4, 4, 1)), keras.layers.Conv2D(1, 3, padding="same", use_bias=False),
        resizing, keras.layers.Conv2D(1, 3, use_bias=False),
    ]  # fmt: skip
    model = keras.Sequential(layers)
    model.compile("sgd", "mse")
    rng = np.random.default_rng(0)
    return (
        model,
        rng.normal(size=(5, 4, 4, 1)).astype("float32"),
        rng.normal(size=(5, 6, 6, 1)).astype("float32"),
    )


def _flat(vector):
    return np.concatenate([np.ravel(v) for v in vector])


def _dense_gauss_newton(model, x):
    with tf.GradientTape(persistent=True) as tape:
        z = model(x)
    rows = tape.jacobian(z, [w.value for w in model.trainable_variables], experimental_use_pfor=False)
    J = np.concatenate([j.numpy().reshape(z.numpy().size, -1) for j in rows], 1).astype("float64")
    return 2 / len(J) * J.T @ J


@pytest.mark.parametrize("name", some(RESIZING, ["upsampling, bilinear", "resizing, antialiased"]))
def test_products_below_a_resize(name):
    model, x, y = _model(RESIZING[name]())
    lin = kc.Linearization(model, x, y)
    v = [_some(*w.shape, seed=5) for w in model.trainable_variables]
    G = _dense_gauss_newton(model, x)
    np.testing.assert_allclose(_flat(lin.gauss_newton() @ v), G @ _flat(v), rtol=1e-4, atol=1e-5)
    eps = 1e-2
    moved = [_flat(lin.gradient_at([s * eps * a for a in v])) for s in (1, -1)]
    central = (moved[0] - moved[1]) / (2 * eps)
    np.testing.assert_allclose(_flat(lin.hessian() @ v), central, rtol=1e-2, atol=2e-3)
    if "bilinear" in name:
        top = kc.curvature(model, (x, y), kind="ggn").top(1).values[0]
        assert float(top) == pytest.approx(np.linalg.eigvalsh(G)[-1], rel=1e-3)


@keras.saving.register_keras_serializable("tests")
class Dilated(keras.layers.Layer):
    """Morphological dilation, whose gradient TensorFlow cannot differentiate."""

    def call(self, x):
        return tf.nn.dilation2d(x, tf.zeros((2, 2, 1)), (1, 1, 1, 1), "SAME", "NHWC", (1, 1, 1, 1))


@pytest.mark.parametrize(
    "run",
    [lambda f: f(), lambda f: tf.function(f, autograph=False)()],
    ids=["eager", "graph"],
)
@pytest.mark.parametrize("kind", ["hessian", "gauss_newton"])
def test_an_error_names_layer_and_operation(run, kind):
    model, x, _ = _model(Dilated(name="my_dilation"))
    y = np.zeros(model(x).shape, "float32")

    def product():
        lin = kc.Linearization(model, x, y)
        return getattr(lin, kind)() @ lin.gradient

    with pytest.raises(
        NotDifferentiable,
        match=r"(?s)`Dilation2DBackpropInput` in layer `[^`]*my_dilation.*`SOAP`",
    ):
        run(product)


def _in_python(x):
    return tf.ensure_shape(tf.py_function(tf.sin, [x], tf.float32), x.shape)


FAILING = {
    "once differentiable": ("EagerPyFunc.*differentiated once", _in_python),
    "a faulty gradient of a gradient": (
        "QuantizeAndDequantizeV4Grad.*TypeError",
        lambda x: tf.quantization.quantize_and_dequantize_v2(x, -1.0, 1.0),
    ),
    "a gradient of its own": ("custom_gradient.*recompute_grad", lambda x: tf.recompute_grad(tf.sin)(x)),
}


@pytest.mark.parametrize("name", FAILING)
def test_gradients_that_fail_when_differentiated_are_refused(name):
    words, fn = FAILING[name]

    @tf.function(autograph=False)
    def product(x):
        with strictly(), tf.GradientTape() as tape:
            tape.watch(x)
            g = _gradient(fn, x, tf.ones_like(x))
        with strictly():
            return tape.gradient(g, x)

    with pytest.raises(NotDifferentiable, match=f"(?s){words}.*`SOAP`"):
        product(_some(4, 3))


def test_the_gradient_of_a_refused_operation_trains():
    model, x, _ = _model(Dilated())
    y = np.zeros(model(x).shape, "float32")
    model = kc.curved(model)
    model.compile(optimizer=kc.Neumann(), loss="mse")
    losses = model.fit(x, y, epochs=3, verbose=0).history["loss"]
    assert losses[-1] < losses[0]


class Slope(keras.Model):
    """The derivative of a network in its input, as a physics-informed model has it."""

    def __init__(self):
        super().__init__()
        hidden = keras.layers.Dense(4, activation="tanh")
        self.net = keras.Sequential([keras.Input((1,)), hidden, keras.layers.Dense(1, use_bias=False)])

    def call(self, x):
        with tf.GradientTape() as tape:
            tape.watch(x)
            u = self.net(x)
        return tape.gradient(u, x)


def test_a_tape_inside_call_trains():
    keras.utils.set_random_seed(0)
    x = np.linspace(0, 1, 16, dtype="float32")[:, np.newaxis]
    model = kc.curved(Slope())
    model.compile(optimizer=kc.CurveBall(), loss="mse")
    losses = model.fit(x, np.cos(x), epochs=4, batch_size=16, verbose=0).history["loss"]
    assert losses[-1] < 0.2 * losses[0]


def test_the_loss_of_ctc_has_gradients_and_no_products():
    rng = np.random.default_rng(0)
    x, y = rng.normal(size=(2, 6, 3)).astype("float32"), rng.integers(1, 4, (2, 2))
    model = keras.Sequential([keras.Input((6, 3)), keras.layers.Dense(4)])
    model.compile("sgd", keras.losses.CTC())
    lin = kc.Linearization(model, x, y)
    assert all(np.isfinite(g).all() for g in lin.gradient)
    with pytest.raises(NotDifferentiable, match="CTC loss has no second derivative.*`SOAP`"):
        lin.hessian() @ lin.gradient
