"""`tpu/scaling.py`: the formulas against what stands in the traced step; the counting against steps counted by hand."""

import math
import pathlib
import sys

import pytest
import tensorflow as tf
from selection import some

import keras_curvature as kc

TPU = pathlib.Path(__file__).parent.parent / "tpu"
sys.path.insert(0, str(TPU))  # a folder of programs, and no package

import costs  # noqa: E402
import formulas  # noqa: E402
import graphs  # noqa: E402
import machines  # noqa: E402
import matrices  # noqa: E402
import methods  # noqa: E402
import scaling  # noqa: E402

FEW = ["sgd", "curveball"]
BY_LAYERS = ["seng", "skfac", "natural_gradient", "gauss_newton"]


@pytest.fixture(scope="module")
def found():
    """The counts of all optimizers on small perceptrons, from one process."""
    return scaling.traced(["tiny", "sliced", "wide", "tall"])


@pytest.fixture(scope="module")
def few():
    """The counts of `FEW` on the smallest perceptron."""
    return scaling.traced(["tiny"], *FEW)


def models(found, name):
    return scaling.model_of(name, found[name])


def fitting(problem):
    """The optimizers that are not left out of a model."""
    return [name for name in scaling.METHODS if name not in methods.LEFT_OUT[problem]]


def test_a_formula_belongs_to_an_optimizer_that_is_traced():
    assert list(scaling.METHODS) == list(methods.OPTIMIZERS)


def test_every_optimizer_of_the_package_has_a_formula():
    exported = {getattr(kc, name) for name in kc.optimizers.__all__} - {kc.CurvatureOptimizer}
    assert exported <= set(formulas.FORMULAS)
    assert exported <= {type(make()) for make, _ in methods.OPTIMIZERS.values()}


def test_matrices_of_one_size_travel_together():
    """Four of 9 and one of 4 numbers, of which two replicas compute two and one in a call, and eight one each."""
    items = [(9,), (9,), (4,), (9,), (9,)]
    assert sorted(matrices.stacked(items, 2)) == [4, 18, 18]
    assert sorted(matrices.stacked(items, 3)) == [4, 18, 18]
    assert sorted(matrices.stacked(items, 8)) == [4, 9, 9, 9, 9]
    assert sorted(matrices.stacked(items, 2, largest=8)) == [4, 9, 9, 9, 9]
    assert matrices.stacked([(9, 4), (9, 4), (1, 1)], 1) == [18, 8, 1, 1]


@pytest.mark.parametrize("name", some(scaling.METHODS, FEW))
def test_the_traced_step_is_as_the_formula_says(name, request):
    found = request.getfixturevalue("few" if name in FEW else "found")
    model = models(found, "tiny")
    counts = found["tiny"]["optimizers"][name]
    method, expected = scaling.METHODS[name], scaling.predicted(scaling.METHODS[name], model)
    if method.matrices:  # besides the passes of the formula it multiplies matrices
        assert all(counts["flops"].get(section, 0) >= flops for section, flops in expected.pop("flops").items())
    assert {key: counts[key] for key in expected} == expected


@pytest.mark.slow
@pytest.mark.parametrize(
    ("problem", "positions", "names"), [("images", (16, 9, 1), BY_LAYERS), ("large", (36, 1), ["seng", "skfac"])]
)
def test_rows_of_layers_have_all_positions(problem, positions, names):
    """Of convolutions, by groups of channels too; `SENG` sends the smaller form of them, or a sketch of a large layer.
    `SKFAC` has one row for each example.
    """
    found = scaling.traced([problem], *names)
    model = models(found, problem)
    assert model.positions == positions
    for name in names:
        expected = scaling.predicted(scaling.METHODS[name], model)["collectives"]
        assert found[problem]["optimizers"][name]["collectives"] == expected


def test_a_sketch_of_a_large_layer_is_what_replicas_gather():
    """By hand: 2 x 3 examples, of 49 positions 16, of 4609 and 512 entries 256; a layer of two groups as rows."""
    model = costs.Model("", 3, 0, 0, (), blocks=((4609, 512), (2, 5, 4)), positions=(49, 7))
    sketch, rows = 6 * 16 * 256, 6 * 2 * 5 * 4
    calls = scaling.METHODS["seng"].sections["step"].others(model, 2)
    assert calls == [[sketch], [sketch], [rows], [6], [4609 * 512, 2 * 5 * 4]]


@pytest.mark.slow
@pytest.mark.parametrize("name", fitting("wide"))
def test_a_step_holds_as_many_vectors_as_the_formula_says(name, found):
    counts, model, method = found["wide"]["optimizers"][name], models(found, "wide"), scaling.METHODS[name]
    held = counts["peak"] / (costs.WORD * model.weights) - method.rows * model.rows
    # of six equal layers one holds a few tensors more while its turn is
    assert method.vectors <= held < method.vectors + 1


@pytest.mark.slow
@pytest.mark.parametrize("name", methods.DENSE)
def test_a_step_holds_as_many_matrices_as_the_formula_says(name, found):
    counts, model, method = found["tiny"]["optimizers"][name], models(found, "tiny"), scaling.METHODS[name]
    held = counts["peak"] / (2 * costs.WORD * model.weights**2)  # of float64
    assert method.dense > 0
    assert method.dense <= held < method.dense + 0.1


@pytest.mark.slow
@pytest.mark.parametrize("name", fitting("tall"))
def test_a_step_holds_as_many_activations_as_the_formula_says(name, found):
    counts, model = found["tall"]["optimizers"][name], models(found, "tall")
    held = counts["peak"] / model.activations
    assert scaling.METHODS[name].recordings <= held < scaling.METHODS[name].recordings + 1


def test_counts_by_hand(few):
    """5-7-6-4 with 8 examples: weights, the products of a pass, what tanh and the squared error keep."""
    model = models(few, "tiny")
    assert model.weights == 5 * 7 + 7 + 7 * 6 + 6 + 6 * 4 + 4
    assert model.layers == (2 * 8 * 5 * 7, 2 * 8 * 7 * 6, 2 * 8 * 6 * 4)
    # outputs of two hidden layers, and the error of the last; a number beside
    assert 4 * 8 * (7 + 6 + 4) <= model.activations <= 4 * 8 * (7 + 6 + 4) + 16


IMAGE, KERNEL, PLACES = (8, 6, 6, 2), (3, 3, 2, 5), (8, 4, 4, 5)
BY_HAND = 2 * math.prod(PLACES) * 3 * 3 * 2
# name: the product of two tensors and a shape, shapes of the tensors, its operations; those without kernel or row
PRODUCTS = {
    "MatMul": (lambda a, b, _: tf.linalg.matmul(a, b), (4, 3), (3, 5), 2 * 4 * 3 * 5, 2 * 3 * 5),
    "BatchMatMulV2": (
        lambda a, b, _: tf.linalg.matmul(a, b, adjoint_b=True), (7, 4, 3), (7, 5, 3), 2 * 7 * 4 * 3 * 5, 2 * 7 * 5 * 3
    ),
    "Einsum": (lambda a, b, _: tf.einsum("bi,bij->bj", a, b), (7, 3), (7, 3, 5), 2 * 7 * 3 * 5, 2 * 7 * 3 * 5),
    "Conv2D": (
        lambda kernel, image, _: tf.nn.conv2d(image, kernel, 1, "VALID"), KERNEL, IMAGE, BY_HAND, 2 * 8
    ),
    "Conv2DBackpropInput": (
        lambda kernel, slopes, shape: tf.raw_ops.Conv2DBackpropInput(
            input_sizes=shape, filter=kernel, out_backprop=slopes, strides=[1] * 4, padding="VALID"),
        KERNEL, PLACES, BY_HAND, 2 * math.prod(PLACES),
    ),
    "Conv2DBackpropFilter": (
        lambda image, slopes, shape: tf.raw_ops.Conv2DBackpropFilter(
            input=image, filter_sizes=shape, out_backprop=slopes, strides=[1] * 4, padding="VALID"),
        IMAGE, PLACES, BY_HAND, 2 * math.prod(PLACES),
    ),
}  # fmt: skip
SIZES = {"Conv2DBackpropInput": IMAGE, "Conv2DBackpropFilter": KERNEL}


@pytest.mark.parametrize("name", PRODUCTS)
def test_operations_of_a_product_whose_static_shape_is_missing(name):
    """An unknown dimension counts as one, of an unknown rank too, unless the other factor knows it."""
    product, one, other, expected, at_least = PRODUCTS[name]

    def counted(shape, sizes):
        specs = [tf.TensorSpec(shape), tf.TensorSpec(other), tf.TensorSpec([4], tf.int32)]
        run = tf.function(lambda a, b, given: product(a, b, given if sizes is None else sizes), input_signature=specs)
        graph = run.get_concrete_function().graph
        (op,) = [op for op in graph.get_operations() if op.type == name]
        return graphs.flops(op)

    assert set(PRODUCTS) == graphs.PRODUCTS
    assert counted(one, SIZES.get(name)) == expected
    assert counted([None] * len(one), None) == at_least
    if name != "MatMul":  # TensorFlow itself wants a rank there
        assert counted(None, None) <= at_least


@pytest.mark.slow
def test_conjugate_gradients_reduce_one_vector_per_iteration(found):
    counts = found["tiny"]["optimizers"]["hessian_free"]["collectives"]
    assert counts["while"][2] == found["tiny"]["weights"]


@pytest.mark.slow
def test_micro_batches_reduce_nothing_more(found):
    """The loops over the slices have no collectives in them; the other loops have other names beside them."""
    assert set(found["sliced"]["optimizers"]) == {name for name, (_, curve) in methods.OPTIMIZERS.items() if curve}
    for name, counts in found["sliced"]["optimizers"].items():
        whole = found["tiny"]["optimizers"][name]["collectives"]
        assert sorted(counts["collectives"].values()) == sorted(whole.values()), name


def test_time_of_a_step():
    """On one replica arithmetic and the update; bytes tend to twice the vector over the bandwidth."""
    machine = machines.Machine("even", 1e9, memory=1e9, memory_bandwidth=1e9, bandwidth=1e6, latency=1e-3)
    model = costs.Model("even", 1, weights=250_000, tensors=10, layers=(0, 1_000_000), utilization=0.5)
    sgd = scaling.METHODS["sgd"]
    assert costs.time_of(sgd, model, machine, 1) == (pytest.approx(3e6 / 5e8), pytest.approx(5e6 / 1e9), 0.0, 0.0)
    arithmetic, update, ring, latency = costs.time_of(sgd, model, machine, 1024)
    assert (ring, latency) == (pytest.approx(2 * 1023 / 1024), pytest.approx(2 * 10 * 1e-3))
    assert costs.time_of(sgd, model, machine, 1024, packed=False)[3] == pytest.approx(10 * latency)
    own = arithmetic + update
    assert costs.efficiency(sgd, model, machine, 1024) == pytest.approx(own / (own + ring + latency))


def test_a_transformer_of_a_billion_weights():
    """Against the usual estimate, two operations for each weight and token, and attention on top."""
    model = costs.transformer()
    tokens = 4 * 1024
    assert 1e9 < model.weights < 1.05e9
    assert (sum(map(math.prod, model.shapes)), len(model.shapes)) == (model.weights, model.tensors)
    assert sum(map(math.prod, model.blocks)) + sum(model.outside) == model.weights
    assert 1.0 < model.forward / (2 * model.weights * tokens) < 1.15
    assert model.backward == 2 * model.forward


@pytest.mark.slow
def test_a_table_says_where_a_count_is_not_the_formula(found):
    model = models(found, "tiny")
    lines = list(scaling.table_of_counts(model, found["tiny"]))
    assert sum(line.endswith("yes") for line in lines) == len(scaling.METHODS)
    wrong = {**found["tiny"], "optimizers": {**found["tiny"]["optimizers"]}}
    wrong["optimizers"]["sgd"] = {**wrong["optimizers"]["sgd"], "state": 0}
    assert [line.split()[0] for line in scaling.table_of_counts(model, wrong) if line.endswith("NO")] == ["sgd"]


def test_figure(few, tmp_path):
    pytest.importorskip("matplotlib")
    model = models(few, "tiny")
    scaling.figure([(model, machines.MACHINES[0])] * 2, tmp_path / "scaling.png")
    assert (tmp_path / "scaling.png").stat().st_size > 10_000
