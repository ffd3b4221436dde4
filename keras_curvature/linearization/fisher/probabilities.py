"""Cross-entropies that read the probabilities of the model's outputs, and not the logits that these carry.

Keras' losses lose the logits of a softmax layer where another layer comes after it, or with `ignore_class`. In the
probabilities the second derivative is that of the true label alone.
"""

import keras

from keras_curvature import keras_internals
from keras_curvature.linearization.fisher import of_losses
from keras_curvature.linearization.fisher.convexity import name_of
from keras_curvature.linearization.fisher.sampling import leaf_of
from keras_curvature.linearization.pure import slices

CROSS_ENTROPIES = (
    keras.losses.binary_crossentropy, keras.losses.categorical_crossentropy,
    keras.losses.sparse_categorical_crossentropy,
)  # fmt: skip


def warn(recorded):
    """Warn once of the cross-entropies of a `Pass` that read probabilities."""
    pure, read = recorded.pure, []
    logits = [keras_internals.logits_of(z) for z in keras.tree.flatten(recorded.evaluation.outputs)]
    if of_losses.is_of_compute_loss(pure.model) or all(any(leaf is z for z in logits) for leaf in recorded.leaves):
        return  # the usual case costs nothing
    if not any(map(_reads_probabilities, keras_internals.losses_of(pure.model))):
        return

    def noting(loss):
        def probed(y, outputs, sample_weight=None):
            if _reads_probabilities(loss) and not leaf_of(recorded, outputs)[1]:
                read.append(name_of(getattr(loss, "fn", loss)))
            return loss(y, outputs, sample_weight)

        return probed

    pure.compiled_loss(recorded.evaluation.outputs, noting)
    for name in dict.fromkeys(read):
        slices.warn_once(
            f"loss={name} reads probabilities and not the logits of a softmax or sigmoid, so the Gauss-Newton matrix "
            "is that of probabilities: the empirical Fisher matrix after a softmax, and of other probabilities it may "
            "be indefinite. Let the last layer have `activation='softmax'` and a loss without `ignore_class`, or "
            "return logits and pass `from_logits=True`; or ask for the Fisher matrix."
        )


def _reads_probabilities(loss):
    given = keras_internals.options_of(loss).get("from_logits", False)
    return keras_internals.function_of(loss) in CROSS_ENTROPIES and not given
