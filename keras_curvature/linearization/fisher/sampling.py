"""Cotangents whose outer products make up a Fisher matrix.

For example `i` of the batch, with `J_i` the Jacobian of the model's outputs, cotangents `c_i` are chosen so that

    sum_i (J_i' c_i) (J_i' c_i)'    equals, or has as its expectation, the Fisher matrix of the loss

The matrix contains every weight of the compiled loss once: the 1/N of its mean, sample weights and class weights,
masks, loss weights, means over outputs and positions. With `omega` the weight of one entry (or one row, where one label
is drawn for a row) and `s` the slope of `-log p(y | z)`,

    "sampled"      c = sqrt(omega) s, labels y drawn from the model
    "empirical"    c = sqrt(omega) s, the true labels; equal in distribution to a draw if the model is right
    "exact"        one c for each possible label; the outer products sum to the matrix

If no likelihood of the loss is known, "empirical" treats each of the N examples as one draw of weight 1/N. Then `c` is
`sqrt(N) dL/dz`, and the result is the mean of the squared per-example gradients (`of_examples`). The two definitions
agree for a mean over examples with one label each. They differ for a sum, or a mean over outputs or positions.

Keras does not expose these weights. We recover them by re-evaluating the compiled loss on the same outputs with labels
of known slope: `omega` is the ratio of the two slopes.
"""

import dataclasses
import itertools

import keras
import tensorflow as tf

from keras_curvature import keras_internals
from keras_curvature.component import check_choice
from keras_curvature.linearization.fisher import likelihoods, of_losses
from keras_curvature.linearization.pure import batch_axis, randomness, slices

FISHER = ("sampled", "empirical", "exact")


@dataclasses.dataclass(frozen=True)
class Weighed:
    """One compiled loss: which leaf it reads, the leaf in full precision, its likelihood, and the weights in it."""

    leaf: int
    z: tf.Tensor
    likelihood: likelihoods.Likelihood
    omega: tf.Tensor


def cotangents(recorded, fisher, seed):
    """Cotangents of a `Pass`, as `Pass.cotangents` explains."""
    check_choice(cotangents, "fisher", fisher, FISHER)
    recorded.require_leaves()
    if fisher == "empirical":
        return _empirical(recorded)
    if fisher == "exact":
        return [_on_leaves(recorded, [(w, c)]) for w in weighed(recorded) for c in _each_label(recorded, w)]
    drawn = [(w, tf.sqrt(_no_less_than_zero(w.omega)) * slope) for w, slope in _drawn(recorded, seed)]
    return _on_leaves(recorded, drawn)


def of_examples(recorded):
    """`sqrt(N) dL/dz`, times the loss scale; for a mean over N examples, each example's slope over `sqrt(N)`.

    `dL/dz` for an output without a batch axis, which is one example of weight 1.
    """
    place = recorded.pure.place
    root, whole = tf.sqrt(tf.cast(place.total, tf.float64)), tf.math.rsqrt(place.share(tf.float64))
    roots = [whole if n is batch_axis.NONE else root for n in batch_axis.per_example(recorded)]
    return [tf.cast(r, slope.dtype) * slope for r, slope in zip(roots, recorded.slope)]


def fisher_times(recorded, fisher, tangents):
    """`F u`, shaped as the leaves and times the loss scale, for the Fisher matrix `F` in the leaves.

    Args:
        recorded: A `Pass`.
        fisher: `"exact"` or `"empirical"`.
        tangents: `u`, shaped as the leaves.
    """
    if fisher == "exact":
        return _on_leaves(recorded, [(w, _information_times(w, tangents[w.leaf])) for w in weighed(recorded)])
    cotangents, counts = _unscaled(recorded, _empirical(recorded)), batch_axis.per_example(recorded)
    products = [c * u for c, u in zip(cotangents, tangents)]
    along = sum(batch_axis.folded(_by_row(p), n) for p, n in zip(products, counts) if n is not batch_axis.NONE)
    scale = 1.0 if recorded.loss_scale is None else recorded.loss_scale

    def times(c, product, n):
        if n is batch_axis.NONE:
            return c * tf.reduce_sum(product) * tf.cast(scale, c.dtype)
        return c * tf.reshape(batch_axis.spread(along, n), [-1] + [1] * (c.shape.rank - 1)) * tf.cast(scale, c.dtype)

    return [times(c, p, n) for c, p, n in zip(cotangents, products, counts)]


def _information_times(w, tangent):
    """The Fisher information of a `Weighed` times a tangent of its leaf; of rows, label by label."""
    u, omega = tf.cast(tangent, w.z.dtype), _no_less_than_zero(w.omega)
    information = omega * w.likelihood.information(w.z)
    if not w.likelihood.by_rows:
        return information * u

    def add(total, label):
        # not the whole (labels, labels) matrix of each row: of many labels it would not fit into memory
        slope = w.likelihood.slope(w.z, tf.fill(tf.shape(w.z)[:-1], label))
        along = tf.reduce_sum(slope * u, -1, keepdims=True)
        return total + tf.gather(information, [label], axis=-1) * along * slope

    return tf.foldl(add, tf.range(w.z.shape[-1]), tf.zeros_like(w.z))


def _by_row(tensor):
    """Sums over all axes but the first, `(rows,)`."""
    return tf.reduce_sum(tensor, list(range(1, tensor.shape.rank)))


def _unscaled(recorded, cotangents):
    if recorded.loss_scale is None:
        return cotangents
    return [c / tf.cast(recorded.loss_scale, c.dtype) for c in cotangents]


def slopes(recorded, seed):
    """`dL/dz` with labels drawn from the model, one tensor per leaf, times the loss scale."""
    recorded.require_leaves()
    return _on_leaves(recorded, [(w, w.omega * slope) for w, slope in _drawn(recorded, seed)])


def weighed(recorded):
    """The compiled losses of a `Pass` with their weights, a list of `Weighed`."""

    def reference(likelihood, z):
        return tf.stop_gradient(likelihood.reference(z))  # numbers, not a function of `z`

    return [
        Weighed(leaf, z, likelihood, _omega(likelihood, slope, likelihood.slope(z, reference(likelihood, z))))
        for leaf, z, likelihood, slope in _graded(
            recorded, lambda likelihood, z, y: likelihood.targets(reference(likelihood, z), z, y)
        )
    ]


def _graded(recorded, targets):
    """`[(leaf, z, likelihood, dL/dz)]` of the losses, with `targets(likelihood, z, y)` for the true `y`."""
    if of_losses.is_of_compute_loss(recorded.pure.model):
        return [_graded_by_model(recorded, targets)]
    pure, noted, tape = recorded.pure, [], tf.GradientTape()

    def noting(loss):
        def probed(y, outputs, sample_weight=None):
            leaf, is_logits = leaf_of(recorded, outputs)
            likelihood = of_losses.likelihood(loss, is_logits)
            wide = _in_full_precision(outputs)
            z = keras_internals.logits_of(wide) if is_logits else wide
            tape.watch(z)
            noted.append((leaf, z, likelihood))
            return loss(targets(likelihood, z, y), wide, sample_weight)

        return probed

    with tape:
        loss = pure.compiled_loss(recorded.evaluation.outputs, noting)
    found = tape.gradient(loss, [z for _, z, _ in noted], unconnected_gradients="zero")
    return [(*each, slope) for each, slope in zip(noted, found)]


def _graded_by_model(recorded, targets):
    """The same for a model with its own `compute_loss`, the negative logarithm of its `likelihood`."""
    pure, outputs = recorded.pure, recorded.evaluation.outputs
    likelihood = of_losses.of_compute_loss(pure.model)
    if not tf.is_tensor(outputs):
        raise ValueError(
            f"A model with its own `compute_loss` can have a `likelihood` only if it has one output. Received: "
            f"{len(keras.tree.flatten(outputs))} outputs of {type(pure.model).__name__}. Pass the losses to "
            "`compile(loss=...)`, each with a likelihood, instead of `compute_loss`."
        )
    leaf, _ = leaf_of(recorded, outputs)
    with tf.GradientTape() as tape:
        z = _in_full_precision(outputs)
        tape.watch(z)
        loss = pure.own_loss(z, targets(likelihood, z, pure.y))
    return leaf, z, likelihood, tape.gradient(loss, z, unconnected_gradients="zero")


def _empirical(recorded):
    """Cotangents of the true labels: the slope contains `omega`, the cotangent its square root."""
    if of_losses.unknown(recorded.pure.model) is not None:
        return of_examples(recorded)
    true = _graded(recorded, lambda likelihood, z, y: y)
    roots = [(w, tf.sqrt(_no_less_than_zero(w.omega))) for w in weighed(recorded)]
    found = [(w, tf.math.divide_no_nan(slope, root)) for (w, root), (*_, slope) in zip(roots, true)]
    return _on_leaves(recorded, found)


def _omega(likelihood, slope, unit):
    """The weight of each entry, or of each row: the ratio of `slope` to `unit`."""
    if likelihood.by_rows:
        slope, unit = tf.reduce_sum(slope * unit, -1, keepdims=True), tf.reduce_sum(unit * unit, -1, keepdims=True)
    return tf.math.divide_no_nan(slope, unit)


def _drawn(recorded, seed):
    """`[(Weighed, slope of -log p)]` with labels drawn from the model."""
    drawn = []
    for i, w in enumerate(weighed(recorded)):

        def uniform(shape, salt=i + 1, dtype=w.z.dtype):
            # uniform numbers, not `categorical`: they are the same however the batch is cut
            with slices.at(recorded.pure.place):
                return randomness.uniform(shape, [salt, seed], dtype)

        drawn.append((w, w.likelihood.slope(w.z, w.likelihood.sample(w.z, uniform))))
    return drawn


def _each_label(recorded, w):
    """Cotangents in the leaf of a `Weighed`; their outer products sum to its Fisher information."""
    has_examples = batch_axis.per_example(recorded)[w.leaf] is not batch_axis.NONE
    shape = w.z.shape[1:] if has_examples else w.z.shape
    if not shape.is_fully_defined():
        raise ValueError(
            '`fisher="exact"` takes one pass for each entry of the outputs, so their shape must be known. '
            f'Received: outputs of shape {tuple(w.z.shape)}. Use `fisher="sampled"`.'
        )
    information = tf.sqrt(_no_less_than_zero(w.omega * w.likelihood.information(w.z)))
    for entry in itertools.product(*[range(n) for n in shape]):
        if not w.likelihood.by_rows:
            yield information * _one_at(entry, shape, w.z.dtype)
            continue
        *position, label = entry
        unit = w.likelihood.slope(w.z, tf.fill(tf.shape(w.z)[:-1], label))
        yield information[..., label : label + 1] * unit * _one_at(position, shape[:-1], w.z.dtype)[..., tf.newaxis]


def _one_at(position, shape, dtype):
    """1 at one position, 0 elsewhere."""
    return tf.scatter_nd([list(position)], tf.ones([1], dtype), shape) if position else tf.ones([], dtype)


def _on_leaves(recorded, found):
    """The sum of `[(Weighed, cotangent)]` for each leaf, in its dtype and times the loss scale."""
    sums = [tf.zeros_like(leaf) for leaf in recorded.leaves]
    for w, cotangent in found:
        scaled = cotangent if recorded.loss_scale is None else cotangent * tf.cast(recorded.loss_scale, w.z.dtype)
        sums[w.leaf] += tf.cast(tf.ensure_shape(scaled, sums[w.leaf].shape), sums[w.leaf].dtype)
    return sums


def leaf_of(recorded, outputs):
    """`(index of the leaf that a loss of these outputs reads, whether it is their logits)`."""
    logits = keras_internals.logits_of(outputs)
    for i, leaf in enumerate(recorded.leaves):
        if leaf is outputs or leaf is logits:
            return i, leaf is logits
    raise ValueError(
        "A loss reads outputs of the model that it cannot be differentiated in, such as integers. Let the model return "
        "the floating-point tensor that the loss is computed from."
    )


def _in_full_precision(outputs):
    """A copy of the outputs and the logits or masks they carry, in float32 or float64."""
    dtype = outputs.dtype if outputs.dtype.size >= 4 else tf.float32
    wide, found = tf.identity(tf.cast(outputs, dtype)), keras_internals.carried(outputs)
    if keras_internals.LOGITS in found:
        found[keras_internals.LOGITS] = tf.identity(tf.cast(found[keras_internals.LOGITS], dtype))
    return keras_internals.carry(wide, found)


def _no_less_than_zero(omega):
    """`omega`, at least 0; NaN stays NaN."""
    return tf.where(omega < 0, tf.zeros_like(omega), omega)
