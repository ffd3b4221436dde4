"""A model on one batch, seen from the current weights: its loss, its gradient, its curvature.

`Linearization` is the one object that an optimizer of this package talks to. Whatever leaves it is already
summed over the replicas of a distribution strategy, so a method is written once, for one machine. `Gradients`
is its shadow for a plain `keras.Model`, which hands its optimizer gradients and nothing else; asked for more,
it says what to do.
"""

import contextlib

import keras
import tensorflow as tf

from keras_curvature import replicas, trees
from keras_curvature.component import check, check_count
from keras_curvature.linearization import products
from keras_curvature.linearization.estimates.estimates import Estimates
from keras_curvature.linearization.fisher import convexity
from keras_curvature.linearization.gauss_newton import GaussNewton
from keras_curvature.linearization.layers import taps
from keras_curvature.linearization.pure import slices
from keras_curvature.linearization.pure.differentiable import differentiable_keras
from keras_curvature.linearization.pure.functional import PureModel, build_for
from keras_curvature.linearization.pure.micro_batches import MicroBatches
from keras_curvature.linearization.recordings import Recordings
from keras_curvature.operators import Function


class Linearization(Estimates):
    """The loss of one batch around the current weights `w`.

        f(w + d)  ~  f(w) + g'd + 1/2 d'B d,        B = H (Hessian) or G (Gauss-Newton)

    The forward pass is a pure function of the weights: batch statistics and dropout masks are the same in every
    evaluation and product, and reach the model once, by `commit()`. Vectors (`gradient`, steps, products) are
    lists of tensors in the order and with the shapes of `model.trainable_variables`; losses are scalars, the
    compiled loss with everything that belongs to it (sample weights, masks, regularizers, added losses).

    However the batch is cut (into slices of replicas, `micro_batches`), the sum over the slices is the whole batch's,
    but for batch normalization and for two kinds of losses, which are means of the means of the slices: masked ones,
    and those with `reduction="mean_with_sample_weight"`; see `pure/slices.py`.

    Works eagerly, in a `tf.function`, compiled by XLA, and in `fit` under a distribution strategy. Nothing is
    computed that is not asked for; a forward pass is shared by the products that need it.

    Args:
        model: A compiled `keras.Model`.
        x: Inputs of the batch, as the model takes them.
        y: Targets. Optional.
        sample_weight: Weights of the examples. Optional.
        shift: A vector: linearize at `w + shift` and not at `w`. Optional.
        loss_scale: Scalar that multiplies the loss inside derivatives, which are divided by it again, for
            `mixed_float16`. Optional.
        part: `(size, index)` of a piece of the batch to use. Optional; see `chunk`.
        micro_batches: Number of slices that each replica's batch is cut into, an integer: passes go over one slice
            at a time, with the memory of one; see `pure/micro_batches.py`. Defaults to `1`.
        products: Whether Gauss-Newton products will be asked for. If not, losses and gradients are computed by Keras'
            own kernels (cuDNN's recurrent layers, max pooling), which cannot be differentiated twice or only at a
            price; products are there all the same, and record a forward pass of their own. Defaults to `True`.
        training: Whether the model runs as in training (batch statistics, dropout) or as in inference (moving
            statistics, no dropout). Defaults to `True`.
        seeds: Values to begin with of the seeds of the model's layers, an integer tensor `(seeds, 2)` in the order of
            `functional.seeds(model.non_trainable_variables)`, in place of those that the layers have. Optional.

    Attributes:
        variables: The model's trainable variables.
        weights: Their values, with the shift, a list of tensors.
        examples: Number of examples in the whole batch, of all replicas, an integer or tensor.

    Raises:
        ValueError: The model is not compiled; `micro_batches` is not an integer of at least 1, or larger than 1 with
            synchronized normalization on several replicas, or, under XLA, not a divisor of a known batch size.

    Example:

    ```python
    from keras_curvature import ConjugateGradient, Linearization
    from keras_curvature.operators import Identity

    lin = Linearization(model, x, y)
    newton = ConjugateGradient().solve(lin.gauss_newton() + 1e-2 * Identity(), [-g for g in lin.gradient])
    for variable, step in zip(lin.variables, newton.value):
        variable.assign_add(step)
    lin.commit()
    ```
    """

    def __init__(
        self, model, x, y=None, sample_weight=None, *,
        shift=None, loss_scale=None, part=None, micro_batches=1, products=True, training=True, seeds=None,
    ):  # fmt: skip
        check_model(Linearization, model)
        check_count(Linearization, "micro_batches", micro_batches)
        check(Linearization, "training", training, isinstance(training, bool), "True or False")
        build_for(model, x, y, sample_weight)
        self.model, self.variables = model, list(model.trainable_variables)
        self._batch, self._part, self._micro_batches = (x, y, sample_weight), part, micro_batches
        self._shift, self._loss_scale, self._products, self._reached = shift, loss_scale, products, None
        self._mode = {"training": training, "seeds": seeds}
        self._tapped = ()  # layers
        # one pure model per replica; what is computed once is kept in `_known` (`cached_property` holds a lock while it
        # computes, on which the threads of replicas would wait for each other)
        self._slices, self._pure, self._known, self._graph = {}, {}, {}, slices.graph()
        start, self.examples = replicas.place(self._take, *self._batch)
        replicas.each(self._open, start)

    # What is known at the point itself.

    @property
    def weights(self):
        """`w`, plus the shift."""
        return self._once("weights", self._local_weights)

    @property
    def loss(self):
        """`f(w)`, a scalar."""
        return self._forward()[0]

    @property
    def outputs(self):
        """What the model said, in the model's own structure; under a strategy, one slice per replica."""
        return self._forward()[1]

    @property
    def gradient(self):
        """`df/dw`, a vector; one backward pass, however often it is asked for."""

        def gradient():
            gradient = self._pass().total(self._local_gradient)
            self._forward()  # known by now
            return gradient

        return self._once("gradient", gradient)

    @property
    def reached(self):
        """Whether the loss depends on each variable at all, a tuple of bools in the order of `variables`.

        Where it does not, the `gradient` is zeros, of which an optimizer with weight decay would make a step; Keras
        passes such variables over. Known with the gradient, which is computed where it was not.
        """
        if self._reached is None:
            _ = self.gradient
        return self._reached

    # Other points.

    def loss_at(self, step):
        """`f(w + step)`, a scalar; one forward pass with the same masks and seeds, and no weight is assigned."""
        trees.check("step", step, self.variables)

        def loss(pure, step):
            evaluation = pure.evaluate(self._local_weights(step))
            return evaluation, evaluation.loss

        with differentiable_keras(products=self._products):
            return self._sum(loss, step)

    def gradient_at(self, step):
        """`df/dw` at `w + step`, a vector; one forward and one backward pass, and no weight is assigned."""
        return self.loss_and_gradient_at(step)[1]

    def loss_and_gradient_at(self, step):
        """`(f, df/dw)` at `w + step`."""
        trees.check("step", step, self.variables)

        def gradient(pure, step):
            evaluation, gradient = products.gradient(pure, self._local_weights(step), self._loss_scale)
            return evaluation, (evaluation.loss, gradient)

        with differentiable_keras(products=self._products):
            return self._sum(gradient, step)

    # Curvature.

    def hessian(self):
        """The Hessian `H` of the loss, a `LinearOperator`; not positive semi-definite in general.

        One product costs about as much as a gradient, besides one forward and backward pass for all of them. Asked for
        before the gradient, these are the gradient's and the loss' too.
        """

        def record(pure):
            return products.HessianRecording(pure, self._local_weights(), self._loss_scale)

        recordings = Recordings(self._here, record, lambda: differentiable_keras(twice=True))
        if not self._known and slices.graph() is self._graph:
            self._known["hessian"] = recordings

        def product(v):
            trees.check("vector", v, self.variables)
            return recordings.total(lambda recording, v: recording.product(v), [list(v)])

        return Function(product)

    def gauss_newton(self):
        """The generalized Gauss-Newton matrix `J' H_L J`, a `GaussNewton` operator.

        `J` is the Jacobian of the model's outputs (of its logits, where the loss reads those) and `H_L` the
        second derivative of the loss in them. L2 weight regularizers enter exactly; other added losses count
        as linear in the activations and have no curvature here. Positive semi-definite where the compiled loss
        is convex in the outputs; see `fisher/convexity.py`.
        """
        not_convex = tuple(convexity.not_convex(self.model))
        return GaussNewton(self.variables, self._recordings(products=True), self._loss_scale, self.l2, not_convex)

    def fisher(self, kind="exact"):
        """A Fisher matrix of the loss, a `LinearOperator`; positive semi-definite always.

            "exact"      F = sum_n J_n' E_y[s_n s_n'] J_n,    labels y drawn from what the model says
            "empirical"  F = sum_n J_n' s_n s_n' J_n,         the true labels

        with `s_n` the slope of `-log p(y | z_n)` in the outputs, times the root of the weight that the compiled loss
        gives it (1/N of a mean, sample weights; see `fisher/sampling.py`). Of a mean over examples with one label
        each, the empirical one is the mean of the outer products of the gradients of single examples. Regularizers and
        added losses are no likelihood, and have no part in it. One product: one forward-mode and one backward pass.

        Args:
            kind: `"exact"` or `"empirical"`. Defaults to `"exact"`.

        Raises:
            ValueError: `kind` is none of these; in a product, the loss is not minus the logarithm of a likelihood
                that is known, and `kind` is `"exact"`.
        """
        check(Linearization.fisher, "kind", kind, kind in ("exact", "empirical"), '"exact" or "empirical"')
        recordings = self._recordings(products=True)

        def product(v):
            trees.check("vector", v, self.variables)
            return recordings.total(lambda recording, v: recording.fisher_product(v, kind), [list(v)])

        return Function(product, psd=True)

    def hidden_gauss_newton(self):
        """`J_h' J_h / N`, for `h` the hidden states of the recurrent layers and `N` the number of examples.

        The Gauss-Newton matrix of `1/2 |h(w) - h(w_0)|^2`, summed over units and time, mean over the examples,
        with which structural damping (Martens and Sutskever, 2011) keeps a step from changing what a recurrent
        network remembers.

        Raises:
            ValueError: The model has no recurrent layer.
        """
        noted = {}

        def around():
            stack = contextlib.ExitStack()
            stack.enter_context(differentiable_keras())
            stack.enter_context(taps.hidden_states(noted))
            return stack

        def record(pure):
            weights, tape = self._local_weights(), tf.GradientTape(persistent=True)
            with tape:
                tape.watch(weights)
                evaluation = pure.evaluate(weights)
            return products.Jacobian(tape, weights, self._noted_states(noted), evaluation)

        recordings = Recordings(self._here, record, around)

        def product(v):
            pulled = recordings.total(lambda jacobian, v: jacobian.vjp(jacobian.jvp(v)), [list(v)])
            return trees.scale(1.0 / tf.cast(self.examples, tf.float64), pulled)

        return Function(product, psd=True)

    def _noted_states(self, noted):
        states = noted.pop(replicas.identity(), None)
        if not states:
            raise ValueError(
                f"`hidden_gauss_newton` (structural damping) needs a recurrent layer; "
                f"the model {self.model.name!r} has none. Use `structural_damping=0.0`."
            )
        return states

    @property
    def l2(self):
        """Second derivative of the L2 regularizer of each variable, a tuple of floats; 0 where there is none."""
        return l2_of(self.variables)

    def is_known(self, name):
        """Whether `"loss"` or `"gradient"` has been computed already."""
        return {"loss": "forward"}.get(name, name) in self._known

    # The batch and the model.

    def chunk(self, size, index=0):
        """The linearization of a part of the batch: of each replica's slice, the `index`-th piece, taken in turn.

        Args:
            size: A share of the batch in (0, 1], or a number of examples in the whole batch.
            index: Integer number or tensor; the batch is cut into as many whole pieces as it has.

        A piece is every second, third, ... example of the slice: on replicas whose slices are equal, and a multiple of
        that, it is the examples that one replica would take. A loss that is a mean over examples (Keras' default)
        becomes the mean over the piece. A batch with fewer examples than `size` is used whole.
        """
        return Linearization(
            self.model, *self._batch, shift=self._shift, loss_scale=self._loss_scale, part=(size, index),
            micro_batches=self._micro_batches, products=self._products, **self._mode,
        )  # fmt: skip

    def commit(self):
        """Write the batch statistics, random seeds and loss counters of this batch into the model, once."""
        recordings = self._pass()

        def write():
            self._here().commit(recordings.here().evaluation)

        self._forward()
        replicas.each(write)

    # One forward pass, recorded on every replica.

    def _recordings(self, products=False):
        """The recorded pass; for `products` where nobody expected any, another one."""
        noted, tapped = {}, self._tapped
        # fused kernels of recurrent layers, on a GPU, have no steps to be tapped
        fit = products or self._products or any(isinstance(layer, keras.layers.RNN) for layer in tapped)

        def around():
            stack = contextlib.ExitStack()
            stack.enter_context(differentiable_keras(products=fit))
            stack.enter_context(taps.calls(tapped, noted))
            return stack

        def record(pure):
            recording = self._record_loss(pure)
            recording.taps, recording.graph = noted.pop(replicas.identity(), []), slices.graph()
            return recording

        return self._once(("recordings", fit, tapped), lambda: Recordings(self._here, record, around))

    def _forward(self):
        """`(loss, outputs)` of the recorded pass."""
        return self._once("forward", self._pass().evaluated)

    def _pass(self):
        """The recorded pass that gradient, loss and state are of: that of the Hessian, where it came first."""
        return self._known["hessian"] if "hessian" in self._known else self._recordings()

    def _once(self, name, compute):
        if name in self._known:
            return self._known[name]
        value = compute()
        if slices.graph() is self._graph:  # what is made inside a loop or condition is no use outside of it
            self._known[name] = value
        return value

    def _sum(self, local, *vectors):
        """Of `local(pure, *vectors) -> (evaluation, sums)` the sums, added up over slices and replicas."""
        return replicas.total(lambda *vectors: self._here().sum(lambda pure: local(pure, *vectors)), *vectors)

    # Called on a replica.

    def _record_loss(self, pure):
        """A `LossRecording` of a `PureModel` at the weights."""
        return products.LossRecording(pure, self._local_weights(), self._loss_scale)

    def _local_gradient(self, recording):
        gradient = recording.gradient()
        self._note_reached(recording)
        return gradient

    def _note_reached(self, recording):
        # of any slice: eagerly, a model may take another way on each of them
        self._reached = tuple(map(max, self._reached or recording.reached, recording.reached))

    def _take(self, *batch):
        """Take this replica's slice of the batch, or of that the piece, and count its examples."""
        taken = batch if self._part is None else slices.piece(batch, *self._part)
        self._slices[replicas.identity()] = taken
        return slices.examples(taken[0])

    def _open(self, start):
        batch = self._slices[replicas.identity()]
        examples = slices.examples(batch[0])
        place = slices.Place(start, self.examples if replicas.count() == 1 else examples, self.examples)
        if self._micro_batches == 1:
            pure = PureModel(self.model, batch, place, **self._mode)
        else:
            pure = MicroBatches(self.model, batch, place, self._micro_batches, **self._mode)
        self._pure[replicas.identity()] = pure

    def _here(self):
        return self._pure[replicas.identity()]

    def _local_weights(self, step=None):
        """Weights read on this replica, with the shift and a step."""
        weights = trees.values(self.variables)
        for vector in (self._shift, step):
            weights = weights if vector is None else trees.add(weights, vector)
        return weights


class Gradients:
    """What a plain `keras.Model` hands its optimizer: the gradient, already summed over the replicas.

    Args:
        asked_by: Name of the optimizer, for the message.
        gradient: The gradient, a vector.
        variables: The variables that it belongs to.
    """

    def __init__(self, asked_by, gradient, variables):
        self._asked_by, self.gradient, self.variables = asked_by, gradient, list(variables)

    @property
    def weights(self):
        """The current weights."""
        return trees.values(self.variables)

    def __getattr__(self, name):
        if name.startswith("_") or not hasattr(Linearization, name):
            raise AttributeError(f"`Gradients` has no attribute {name!r}")
        raise ValueError(
            f"`{self._asked_by}` asked for the `{name}` of the loss, but a plain `keras.Model` hands its optimizer "
            "gradients and nothing else. Curve the model before `compile`:\n\n"
            "    model = keras_curvature.curved(model)\n"
        )


def l2_of(variables):
    """Second derivative of the L2 weight regularizer of each variable, `tuple` of floats."""

    def coefficient(regularizer):
        known = isinstance(regularizer, (keras.regularizers.L2, keras.regularizers.L1L2))
        return 2.0 * float(regularizer.l2) if known else 0.0

    return tuple(coefficient(getattr(v, "regularizer", None)) for v in variables)


def check_model(owner, model):
    """Refuse what is no Keras model, or has no loss; `owner` is the class or function whose argument it is."""
    check(owner, "model", model, isinstance(model, keras.Model), "a `keras.Model`")
    if not model.compiled:
        raise ValueError(
            f"`{owner.__name__}`: the model {model.name!r} has no loss. Call `model.compile(loss=...)` first."
        )
