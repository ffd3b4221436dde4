"""What the literature says of the curvature of networks while they are trained, seen again on scikit-learn's digits.

Numbers in the docstrings are what came out when the protocols were written. Edge of stability has a file of its own.
"""

import keras
import numpy as np
import pytest
import tensorflow as tf
from cases import flat, float64

from keras_curvature import problems
from keras_curvature.monitor.noise.average import NoiseAverage
from keras_curvature.monitor.objective.kinds import KINDS
from keras_curvature.monitor.objective.objective import Objective
from keras_curvature.monitor.operator import curvature
from keras_curvature.monitor.report.landscape import landscape
from keras_curvature.operators import Function
from keras_curvature.solvers.lanczos import extremes

pytestmark = pytest.mark.slow


def digits(classes=10, rows=None):
    """`(x, y)`: the digits of some classes, in Keras' float type, from 0 to 1."""
    (x, y), (x_test, y_test) = problems.data("digits")
    x, y = np.concatenate([x, x_test]), np.concatenate([y, y_test])
    return x[y < classes][:rows], y[y < classes][:rows]


def network(widths, rate, classes=10, normalized=False, seed=0):
    """A ReLU network on the digits, to be trained by SGD with momentum 0.9 on cross-entropy."""
    keras.utils.set_random_seed(seed)
    model = keras.Sequential([keras.Input((64,))])
    for width in widths:
        model.add(keras.layers.Dense(width))
        if normalized:
            model.add(keras.layers.BatchNormalization())
        model.add(keras.layers.ReLU())
    model.add(keras.layers.Dense(classes))
    model.compile(keras.optimizers.SGD(rate, 0.9), keras.losses.SparseCategoricalCrossentropy(from_logits=True))
    return model


def in_stages(model, x, y, batch_size, epochs):
    """Trains up to each of some epochs, and yields it."""
    done = 0
    for epoch in epochs:
        if epoch > done:
            model.fit(x, y, batch_size=batch_size, epochs=epoch - done, verbose=0)
        done = epoch
        yield epoch


def matrices(model, x, y):
    """`(H, G)` of a network with one hidden layer, dense in float64, by the formulas and not by differentiation.

    With `m` the mask of active units, `z = a V + c` of `a = m * (x W + b)` and `p` the softmax: the rows of `J_c` are
    `(x m V_c, m V_c, a e_c, e_c)`, `G = mean J'(diag p - pp') J`, and `H - G` couples `(W, b)` and `V` by
    `mean (x, 1) m (p - y)`.
    """
    W, b, V, c = [np.asarray(w, np.float64) for w in model.get_weights()]
    rows, (hidden, classes) = len(x), V.shape
    one = np.concatenate([x, np.ones((rows, 1))], 1)
    m = (x @ W + b > 0).astype(float)
    a = m * (x @ W + b)
    p = np.exp(a @ V + c)
    p /= p.sum(1, keepdims=True)
    count = W.size + b.size + V.size + c.size
    J = np.zeros((rows, classes, count))
    J[:, :, : W.size + b.size] = np.einsum("ni,nj,jk->nkij", one, m, V, optimize=True).reshape(rows, classes, -1)
    for k in range(classes):
        J[:, k, W.size + b.size + k : W.size + b.size + V.size : classes] = a
        J[:, k, W.size + b.size + V.size + k] = 1.0
    roots = (np.sqrt(p)[:, :, np.newaxis] * (J - np.einsum("nk,nkw->nw", p, J)[:, np.newaxis])).reshape(-1, count)
    G = roots.T @ roots / rows
    coupled = np.einsum("ni,nj,nk->ijk", one, m, p - np.eye(classes)[y], optimize=True) / rows
    H = G.copy()
    for j in range(hidden):
        first = np.arange(j, W.size + b.size, hidden)
        second = W.size + b.size + j * classes + np.arange(classes)
        H[np.ix_(first, second)] += coupled[:, j]
        H[np.ix_(second, first)] += coupled[:, j].T
    return H, G


def gaps(values, count):
    """Ratios of successive eigenvalues, of the largest ones."""
    return values[:count] / values[1 : count + 1]


@pytest.fixture(scope="module", params=[10, 5, 3])
def spectra(request):
    """`(classes, [(eigenvalues of H, of G, ours of H, ours of G)])` of 64-16-C at the epochs 0, 1 and 2; descending."""
    classes, found = request.param, []
    x, y = digits(classes)
    model = network([16], 0.1, classes)
    for _ in in_stages(model, x, y, 64, (0, 1, 2)):
        exact = [np.linalg.eigvalsh(M)[::-1] for M in matrices(model, x, y)]
        ours = [curvature(model, (x, y), kind=kind).top(classes + 3).values for kind in ("hessian", "ggn")]
        found.append((*exact, *ours))
    return classes, found


def test_outliers_are_one_fewer_than_classes(spectra):
    """Papyan (2018, 2019): a bulk and C - 1 outliers, in the Hessian and in the Gauss-Newton matrix.

    After an epoch (SGD 0.1, momentum 0.9, batches of 64) the largest ratio of neighbours is l_{C-1} / l_C. Seen here,
    of the Hessian: 3.4 (C = 10), 4.0 (5), 6.0 (3); of the Gauss-Newton matrix 4.8, 5.1, 6.0; at the start 1.1, 1.5,
    2.0, and another gap is the largest.
    """
    classes, (start, trained, _) = spectra
    for exact, ours in ((trained[0], trained[2]), (trained[1], trained[3])):
        np.testing.assert_allclose(ours, exact[: classes + 3], rtol=1e-4)
        found = gaps(ours, classes + 2)
        assert np.argmax(found) == classes - 2 and found[classes - 2] > 2.0
    at_start = gaps(start[2], classes + 2)
    assert np.argmax(at_start) != classes - 2 and at_start[classes - 2] < 2.5


def test_few_directions_hold_the_curvature(spectra):
    """The C - 1 largest eigenvalues hold most of |H|_F^2 and of the trace; Gur-Ari, Roberts and Dyer (2018).

    After an epoch: 97 % and 81 % for 9 of 1 210 (C = 10), 93 % and 75 % (5), 91 % and 72 % (3); at the start 77 %.
    """
    classes, (start, trained, _) = spectra
    H, ours = trained[0], trained[2][: classes - 1]
    assert np.sum(ours**2) > 0.9 * np.sum(H**2)
    assert np.sum(ours) > 0.65 * np.sum(H)
    assert np.sum(start[2][: classes - 1] ** 2) < 0.8 * np.sum(start[0] ** 2)


def test_the_negative_part_shrinks(spectra):
    """The most negative eigenvalue over the largest, at the epochs 0, 1, 2: -0.15, -0.07, -0.03 (C = 10).

    -0.21, -0.09, -0.04 (C = 5) and -0.20, -0.11, -0.02 (C = 3); Sagun, Evci, Guney, Dauphin and Bottou (2017).
    """
    _, found = spectra
    shares = [H[-1] / H[0] for H, *_ in found]
    assert shares[0] < 1.3 * shares[1] < 1.3**2 * shares[2] < 0


def test_the_density_has_the_outliers_and_the_bulk():
    """After an epoch, of 1 210 eigenvalues: the 9 above a fifth of the largest, the bulk, the share below 0 (11 %)."""
    x, y = digits()
    model = network([16], 0.1)
    list(in_stages(model, x, y, 64, (1,)))
    values = np.linalg.eigvalsh(matrices(model, x, y)[0])
    found = curvature(model, (x, y)).density(vectors=20, steps=60)
    high, low = 0.2 * values[-1], 0.01 * values[-1]
    assert np.sum(values > high) == 9 and abs(found.count(high) - 9) < 3
    assert abs(found.mass(-low, low) - np.mean(np.abs(values) < low)) < 0.02
    assert abs(found.negative.value - np.sum(-values[values < 0]) / np.sum(np.abs(values))) < 0.03


def test_the_noise_scale_grows():
    """McCandlish et al. (2018): B_simple and B_noise grow over a training; 64-32-10, SGD 0.05/0.9, batches of 32.

    Ratios of averages over eight trainings, at the epochs 0, 1, 3, 7, 15: 40, 40, 101, 114, 206 examples; with
    curvature 24, 16, 51, 55, 105. Of single trainings the last is anything between 133 and 518.
    """
    (x, y), found = digits(), {}
    for seed in range(8):
        model = network([32], 0.05, seed=seed)
        measured = curvature(model, (x, y))
        for epoch in in_stages(model, x, y, 32, (0, 1, 3, 7, 15)):
            one = measured.noise()
            simple, curved = found.get(epoch, (NoiseAverage(0.999), NoiseAverage(0.999)))
            found[epoch] = simple.update(one.signal, one.noise), curved.update(one.curvature, one.curved_noise)
    simple, curved = ([average[i].scale for average in found.values()] for i in range(2))
    assert 20 < simple[0] < 80 and simple[-1] > 4 * simple[0]
    assert curved[-1] > 2 * curved[0]


def test_a_mini_batch_overestimates_the_sharpness_ever_more():
    """The largest eigenvalue of a batch's Hessian over that of all examples, mean over the batches of the data.

    64-32-10, SGD 0.1/0.9, batches of 32, three trainings, at the epochs 0, 2, 10: 1.06, 1.6, 2.4 for batches of 32, and
    1.01, 1.09, 1.21 for batches of 256. The Rayleigh quotient of a batch's Hessian at the eigenvector of the whole is
    without bias.
    """
    (x, y), order = digits(rows=1792), np.random.default_rng(0).permutation(1792)  # 56 batches of 32, 7 of 256
    ratios = {32: [], 256: []}
    for seed in range(3):
        model = network([32], 0.1, seed=seed)
        whole = curvature(model, (x, y))
        parts = {size: Objective(model, (x[order], y[order]), batch_size=size) for size in ratios}
        for _ in in_stages(model, x, y, 32, (0, 2, 10)):
            top = whole.top(1)
            for size, objective in parts.items():
                ratios[size].append(_over_the_whole(objective, float(top.values[0]), top.vectors[0]))
    small, large = [np.reshape(found, (3, 3)).mean(0) for found in ratios.values()]
    assert 1.0 < small[0] < small[1] < small[2] and small[1] > 1.3
    assert all(1.0 < one < other for one, other in zip(large, small))


def _over_the_whole(objective, value, vector):
    """The mean largest eigenvalue of the batches over that of the whole, `value`; checks the quotients."""
    found, quotients = [], []
    for i in range(objective.batches):
        hessian = Function(lambda v, i=i: objective.on_batch(i, "hessian", KINDS["hessian"].product, v))
        found.append(extremes(hessian, vector, 12, start=vector)[0].values[0])
        quotients.append(flat(vector) @ flat(hessian @ vector))
    np.testing.assert_allclose(np.mean(quotients), value, rtol=1e-4)
    return np.mean(found) / value


def test_sharpness_is_not_a_property_of_the_function():
    """Dinh et al. (2017): ten times one ReLU layer and a tenth of the next is the same function, and 64 times as sharp.

    5.2 to 335. The slice along a random direction is another one too, but not where its filters are scaled to the
    weights' (Li et al., 2018): it moves by 4e-16.
    """
    with float64():
        x, y = digits()
        model = network([16], 0.1)
        list(in_stages(model, x, y, 64, (1,)))
        W, b, V, c = model.get_weights()
        random = np.random.default_rng(0)
        raw, found = [tf.constant(0.1 * random.standard_normal(w.shape)) for w in (W, b, V, c)], []
        for scale in (1.0, 10.0):
            model.set_weights([scale * W, scale * b, V / scale, c])
            measured = curvature(model, (x, y))
            slices = [
                landscape(model, (x, y), directions, points=11, examples=None).loss for directions in ("random", [raw])
            ]
            exact = np.linalg.eigvalsh(matrices(model, x, y)[0])[-1]
            np.testing.assert_allclose(measured.sharpness(steps=30).values[0], exact, rtol=1e-6)
            found.append((float(measured.loss), exact, *[np.array(*loss.values()) for loss in slices]))
    (loss, sharpness, filtered, plain), (loss_10, sharpness_10, filtered_10, plain_10) = found
    np.testing.assert_allclose(loss_10, loss, rtol=1e-14)
    assert sharpness_10 > 40 * sharpness
    np.testing.assert_allclose(filtered_10, filtered, rtol=1e-14)
    assert np.ptp(plain_10) > 10 * np.ptp(plain)


def test_batch_normalization_has_another_sharpness_in_each_mode():
    """The same weights and 512 examples: in training mode at once, in training mode by batches of 64, in inference.

    64-32-32-10, SGD 0.1/0.9, batches of 64. After three epochs 0.59, 0.65 and 18.6, after ten 0.40, 0.64 and 3.4: the
    number belongs to a mode and, in training mode, to a batch size.
    """
    x, y = digits()
    model, found = network([32, 32], 0.1, normalized=True), []
    ways = ({"training": True}, {"training": True, "batch_size": 64}, {})
    for _ in in_stages(model, x, y, 64, (3, 10)):
        found.append([curvature(model, (x[:512], y[:512]), **way).top(1).values[0] for way in ways])
    (whole, _, inference), (whole_10, batches_10, inference_10) = found
    assert inference > 10 * whole
    assert batches_10 > 1.2 * whole_10 and inference_10 > 4 * whole_10


def test_relu_networks_have_the_trace_of_their_gauss_newton_matrix():
    """Piecewise linear in each layer's weights: equal diagonals of the layers' blocks, while the matrices differ.

    In float64, at the epochs 0, 1, 3 of 64-16-10: traces equal to 1e-12, and `|H - G|` is 55, 20 and 8 % of `|H|`. Our
    diagonal of the Hessian, by one product for each weight, is the Gauss-Newton matrix's of the formulas.
    """
    with float64():
        x, y = digits()
        model, apart = network([16], 0.1), []
        objective = Objective(model, (x, y))
        for _ in in_stages(model, x, y, 64, (0, 1, 3)):
            H, G = matrices(model, x, y)
            ours = objective.total("exact diagonal", lambda lin: lin.hessian_diagonal(probe="exact"))
            start = 0
            for block in ours:
                own = slice(start, start := start + int(np.prod(block.shape)))
                np.testing.assert_allclose(block.numpy().sum(), np.trace(G[own, own]), rtol=1e-12)
            np.testing.assert_allclose(flat(ours), np.diag(G), atol=1e-12 * np.diag(G).max())
            apart.append(np.linalg.norm(H - G) / np.linalg.norm(H))
    assert apart[0] > 0.3 and apart[0] > apart[1] > apart[2]
