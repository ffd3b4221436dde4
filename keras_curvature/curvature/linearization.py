"""A model on one batch, seen from the current weights: its loss, its gradient, its curvature.

`Linearization` is the one object that an optimizer of this package talks to. Whatever leaves it is already
summed over the replicas of a distribution strategy, so a method is written once, for one machine. `Gradients`
is its shadow for a plain `keras.Model`, which hands its optimizer gradients and nothing else; asked for more,
it says what to do.
"""

import keras
import tensorflow as tf

from keras_curvature import replicas, trees
from keras_curvature.curvature import diagonal, likelihoods, products, taps
from keras_curvature.curvature.functional import PureModel, build_for, differentiable_keras, piece
from keras_curvature.curvature.gauss_newton import GaussNewton
from keras_curvature.operators import Function


class Linearization:
    """The loss of one batch around the current weights `w`.

        f(w + d)  ~  f(w) + g'd + 1/2 d'B d,        B = H (Hessian) or G (Gauss-Newton)

    The forward pass is a pure function of the weights: batch statistics and dropout masks are the same in every
    evaluation and product, and reach the model once, by `commit()`. Vectors (`gradient`, steps, products) are
    lists of tensors in the order and with the shapes of `model.trainable_variables`; losses are scalars, the
    compiled loss with everything that belongs to it (sample weights, masks, regularizers, added losses).

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

    Attributes:
        variables: The model's trainable variables.
        weights: Their values, with the shift, a list of tensors.

    Raises:
        ValueError: The model is not compiled.

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

    def __init__(self, model, x, y=None, sample_weight=None, *, shift=None, loss_scale=None, part=None):
        _check_model(model)
        build_for(model, x, y, sample_weight)
        self.model, self.variables = model, list(model.trainable_variables)
        self._batch, self._part = (x, y, sample_weight), part
        self._shift, self._loss_scale = shift, loss_scale
        # one pure model and one recording per replica; what is computed once is kept here (`cached_property`
        # holds a lock while it computes, on which the threads of replicas would wait for each other)
        self._pure, self._recordings, self._known = {}, {}, {}
        replicas.each(self._open, *self._batch)

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
            self._forward()
            return replicas.total(lambda: self._recordings[replicas.identity()].gradient())

        return self._once("gradient", gradient)

    # Other points.

    def loss_at(self, step):
        """`f(w + step)`, a scalar; one forward pass with the same masks and seeds, and no weight is assigned."""
        trees.check("step", step, self.variables)
        with differentiable_keras():
            return replicas.total(lambda step: self._here().evaluate(self._local_weights(step)).loss, step)

    def gradient_at(self, step):
        """`df/dw` at `w + step`, a vector; one forward and one backward pass, and no weight is assigned."""
        return self.loss_and_gradient_at(step)[1]

    def loss_and_gradient_at(self, step):
        """`(f, df/dw)` at `w + step`."""
        trees.check("step", step, self.variables)

        def gradient(step):
            return products.gradient(self._here(), self._local_weights(step), self._loss_scale)

        with differentiable_keras():
            return replicas.total(gradient, step)

    # Curvature.

    def hessian(self):
        """The Hessian `H` of the loss, a `LinearOperator`; not positive semi-definite in general.

        One product costs about as much as a gradient, besides one forward and backward pass for all of them.
        """
        recordings = {}

        def record():
            recordings[replicas.identity()] = self._record_loss(products.HessianRecording)
            return tf.zeros(())  # a strategy wants something to carry

        with differentiable_keras(twice=True):
            replicas.each(record)

        def product(v):
            trees.check("vector", v, self.variables)
            return replicas.total(lambda v: recordings[replicas.identity()].product(v), v)

        return Function(product)

    def gauss_newton(self):
        """The generalized Gauss-Newton matrix `J' H_L J`, a `GaussNewton` operator.

        `J` is the Jacobian of the model's outputs (of its logits, where the loss reads those) and `H_L` the
        second derivative of the loss in them. L2 weight regularizers enter exactly; other added losses count
        as linear in the activations and have no curvature here. Positive semi-definite where the compiled loss
        is convex in the outputs; see `curvature/likelihoods.py`.
        """
        self._forward()
        for recording in self._recordings.values():
            recording.require_leaves()
        return GaussNewton(self.variables, self._recordings, self.l2, tuple(likelihoods.not_convex(self.model)))

    def hidden_gauss_newton(self):
        """`J_h' J_h / N`, for `h` the hidden states of the recurrent layers and `N` the number of examples.

        The Gauss-Newton matrix of `1/2 |h(w) - h(w_0)|^2`, summed over units and time, mean over the examples,
        with which structural damping (Martens and Sutskever, 2011) keeps a step from changing what a recurrent
        network remembers.

        Raises:
            ValueError: The model has no recurrent layer.
        """
        recordings = {}
        with differentiable_keras(), taps.hidden_states() as noted:

            def record():
                weights = self._local_weights()
                tape = tf.GradientTape(persistent=True)
                with tape:
                    tape.watch(weights)
                    outputs = self._here().evaluate(weights).leaves
                states = noted.get(replicas.identity())
                if not states:
                    raise ValueError(
                        f"`hidden_gauss_newton` (structural damping) needs a recurrent layer; "
                        f"the model {self.model.name!r} has none. Use `structural_damping=0.0`."
                    )
                recordings[replicas.identity()] = products.Jacobian(tape, weights, states)
                return tf.cast(tf.shape(outputs[0])[0], tf.float32)

            examples = replicas.total(record)

        def product(v):
            def local(v):
                jacobian = recordings[replicas.identity()]
                return jacobian.vjp(jacobian.jvp(v))

            return trees.scale(1.0 / examples, replicas.total(local, v))

        return Function(product, psd=True)

    def squared_gradients(self, seed=0):
        """Mean over the examples of the squared gradient of each, a vector; see `curvature/diagonal.py`."""
        return diagonal.squared_gradients(self, seed)

    @property
    def l2(self):
        """Second derivative of the L2 regularizer of each variable, a tuple of floats; 0 where there is none."""
        return _l2(self.variables)

    def is_known(self, name):
        """Whether `"loss"` or `"gradient"` has been computed already."""
        return {"loss": "forward"}.get(name, name) in self._known

    # The batch and the model.

    def chunk(self, size, index=0):
        """The linearization of a part of the batch: of each replica's slice, the `index`-th piece, taken in turn.

        Args:
            size: A share of the batch in (0, 1], or a number of examples in the whole batch.
            index: Integer number or tensor; the batch is cut into as many whole pieces as it has.

        A loss that is a mean over examples (Keras' default) becomes the mean over the piece. A batch with fewer
        examples than `size` is used whole.
        """
        return Linearization(
            self.model, *self._batch, shift=self._shift, loss_scale=self._loss_scale, part=(size, index)
        )

    def commit(self):
        """Write the batch statistics, random seeds and loss counters of this batch into the model, once."""

        def write():
            self._here().commit(self._recordings[replicas.identity()].evaluation)

        self._forward()
        replicas.each(write)

    # One forward pass, recorded on every replica.

    def _forward(self):
        """`(loss, outputs)` of the recorded pass."""

        def record():
            recording = self._record_loss(products.LossRecording)
            self._recordings[replicas.identity()] = recording
            return recording.evaluation.loss, recording.evaluation.outputs

        def forward():
            with differentiable_keras():
                loss, outputs = replicas.each(record)
            return replicas.add_up(loss), outputs

        return self._once("forward", forward)

    def _once(self, name, compute):
        if name not in self._known:
            self._known[name] = compute()
        return self._known[name]

    # Called on a replica.

    def _open(self, *batch):
        if self._part is not None:
            batch = piece(batch, *self._part)
        self._pure[replicas.identity()] = PureModel(self.model, *batch)

    def _here(self):
        return self._pure[replicas.identity()]

    def _local_weights(self, step=None):
        """Weights read on this replica, with the shift and a step."""
        weights = trees.values(self.variables)
        for vector in (self._shift, step):
            weights = weights if vector is None else trees.add(weights, vector)
        return weights

    def _record_loss(self, recording):
        return recording(self._here(), self._local_weights(), self._loss_scale)


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


def _l2(variables):
    """Second derivative of the L2 weight regularizer of each variable, `tuple` of floats."""

    def coefficient(regularizer):
        known = isinstance(regularizer, (keras.regularizers.L2, keras.regularizers.L1L2))
        return 2.0 * float(regularizer.l2) if known else 0.0

    return tuple(coefficient(getattr(v, "regularizer", None)) for v in variables)


def _check_model(model):
    if not isinstance(model, keras.Model):
        raise ValueError(f"`Linearization`: `model` must be a `keras.Model`. Received: model={model!r}")
    if not model.compiled:
        raise ValueError(
            f"`Linearization`: the model {model.name!r} has no loss. Call `model.compile(loss=...)` first."
        )
