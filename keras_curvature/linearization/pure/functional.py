"""The model as a pure function of its weights.

A Keras model has state: batch statistics move with every call in training mode, a dropout layer draws a new
mask, compiled losses count examples. A curvature product needs a function that returns the same value at the same
weights in every call. `PureModel` is this function on one slice of a batch: it reads the state once, evaluates under a
`keras.StatelessScope`, and returns the next state, which the train step commits once.

A model that ends in a softmax or sigmoid carries its logits as an attribute of its output, and Keras' cross-entropies
(3.15) read them. So the loss may depend on the logits instead of the output. Both are kept as *leaves*, and the
derivative tells which of them the loss used.
"""

import contextlib
import dataclasses

import keras
import tensorflow as tf

from keras_curvature import keras_internals, replicas, trees
from keras_curvature.component import check
from keras_curvature.linearization.pure import reductions, slices


@dataclasses.dataclass(frozen=True)
class Evaluation:
    """The result of one forward pass.

    Attributes:
        outputs: The model's outputs, in its own structure.
        leaves: The tensors through which the loss depends on the model: its floating outputs and their logits.
        loss: Scalar: the compiled loss with sample weights, masks, regularizers and added losses. On a slice of the
            batch it is the slice's share, so the shares sum to the loss of the batch.
        state: Next values of the model's non-trainable variables, `None` for variables that the pass did not change.
        counters: Next values of the variables of the model's metrics, some of which the loss updates; else `None`.
        has_added: Whether the layers of the model have added losses. Defaults to `False`.
        mean_weights: For each loss that is a mean over sample weights or unmasked steps, the slice's part of the mean
            weight of the batch's examples, a list of scalars; see `reductions.py`.
        coupled: Names of the losses whose values for the examples may depend on one another, a list.
    """

    outputs: object
    leaves: list
    loss: tf.Tensor
    state: list
    counters: list
    has_added: bool = False
    mean_weights: list = dataclasses.field(default_factory=list)
    coupled: list = dataclasses.field(default_factory=list)


class KeptPass:
    """The result of `make(pure)` (a `Pass`) on a replica's whole share of the batch, made once and kept.

    Attributes:
        recorded: The result of `make`.
        evaluation: Its `Evaluation`.
    """

    def __init__(self, pure, make):
        self._place, self.recorded = pure.place, make(pure)

    @property
    def evaluation(self):
        """The `Evaluation` of the pass."""
        return self.recorded.evaluation

    def prepare(self):
        """Have the gradient recorded, for Hessian products."""
        self.recorded.prepare()

    def sum(self, local, vectors=(), tangents=()):
        """`local(recorded, *vectors, *tangents)`, a nest of tensors, added up over the slices."""
        return self._place.counted(self.rows(local, vectors, tangents))

    def rows(self, local, vectors=(), tangents=()):
        """`local(recorded, *vectors, *tangents)`, a nest of tensors, concatenated along the batch."""
        return local(self.recorded, *vectors, *tangents)


class PureModel:
    """A compiled model on one slice of a batch, as a function of its trainable weights.

    Args:
        model: A built and compiled `keras.Model`.
        batch: `(x, y, sample_weight)`, as Keras' `train_step` unpacks it.
        place: The `Place` of these examples in the whole batch.
        state: Initial values of `stateful`, optionally followed by those of `counting`. Defaults to the current values.
        training: Whether layers run in training mode or in inference mode. Defaults to `True`.
        seeds: Initial values of the seeds of the model's layers, a tensor `(seeds, 2)`. Defaults to the current values.

    Attributes:
        evaluation: The last `Evaluation`, `None` before the first.
        stateful: The model's non-trainable variables.
        counting: The variables of its metrics.
        state: The initial values.
    """

    def __init__(self, model, batch, place, state=None, training=True, seeds=None):
        self.model, self.batch, self.place, self.training, self.evaluation = model, batch, place, training, None
        self.x, self.y, self.sample_weight = batch
        if not place.is_whole:
            slices.warn_of_sums(model)
        self._arguments = {"training": training} if keras_internals.takes_training(model) else {}
        self.stateful, self.counting = model.non_trainable_variables, model.metrics_variables
        # read once: every evaluation begins with the same seeds and batch statistics
        self.state = _now(self.stateful, seeds) if state is None else state

    def evaluate(self, weights, loss_tapes=()):
        """Forward pass and loss at `weights`.

        Args:
            weights: Tensors, one per trainable variable of the model.
            loss_tapes: `tf.GradientTape`s to record the loss as a function of the leaves, opened only for that.

        Returns:
            An `Evaluation`.
        """
        model = self.model
        with keras.StatelessScope(state_mapping=self._mapping(weights), collect_losses=True) as scope:
            given = [scope.get_current_value(v) for v in model.trainable_variables]
            before = [scope.get_current_value(v) for v in [*self.stateful, *self.counting]]
            with slices.at(self.place):
                outputs = model(self.x, **self._arguments)
            outputs, leaves = _cut(outputs)
            with contextlib.ExitStack() as opened:
                for tape in loss_tapes:
                    opened.enter_context(tape).watch(leaves)
                loss, found = self._loss(outputs, self.y)
        _check_not_assigned(scope, model.trainable_variables, given)
        after = [scope.get_current_value(v) for v in [*self.stateful, *self.counting]]
        moved = [None if new is old else self._next(new, old) for new, old in zip(after, before)]
        own = len(self.stateful)
        of_losses = bool(scope.losses), found.mean_weights, found.coupled
        self.evaluation = Evaluation(outputs, leaves, loss, moved[:own], moved[own:], *of_losses)
        return self.evaluation

    def leaves_of(self, weights, example):
        """The leaves of one example of this slice, by its number, alone; the loss is not computed."""
        x = keras.tree.map_structure(lambda a: tf.gather(a, [example]), self.x)  # loops over slices are no products
        with keras.StatelessScope(state_mapping=self._mapping(weights)), slices.at(self.place.part(example, 1)):
            return _cut(self.model(x, **self._arguments))[1]

    def _mapping(self, weights):
        given_state = zip([*self.stateful, *self.counting], self.state)
        return [*zip(self.model.trainable_variables, weights), *given_state]

    def part(self, start, length, state=None):
        """This model on the rows `start .. start + length` of this slice, from the same or another state."""
        batch, place = slices.rows(self.batch, start, length), self.place.part(start, length)
        return PureModel(self.model, batch, place, self.state if state is None else state, self.training)

    def compiled_loss(self, outputs, change):
        """The compiled loss of the outputs of an evaluation, without regularizers; changes no state.

        Args:
            outputs: The model's outputs, in its own structure.
            change: A function that maps each `keras.losses.Loss` to the function called in its place.
        """
        loss = keras_internals.changed_losses(self.model, change)
        with keras.StatelessScope(), reductions.finding(self.place, weighs_means=True):
            return loss(self.y, outputs, self.sample_weight)

    def own_loss(self, outputs, y):
        """The loss by the model's own `compute_loss` of outputs and targets; moves nothing."""
        with keras.StatelessScope():
            return self._loss(outputs, y)[0]

    def _loss(self, outputs, y):
        """`(loss, what it found)`: the slice's share of the loss."""
        own = type(self.model).compute_loss is not keras.Model.compute_loss
        if not own:
            _check_has_examples(self.place)
        with reductions.finding(self.place, weighs_means=not own) as found:
            loss = keras_internals.compute_loss(self.model, self.x, y, outputs, self.sample_weight, self.training)
        _check_is_a_number(loss)
        if not own:
            found.add_coupled(keras_internals.losses_of(self.model))
        if not own or self.place.is_even:
            return loss, found
        # a custom loss counts as a mean over the examples that leaves the replicas to Keras
        return self.place.weigh(loss * replicas.count()), found

    def _next(self, new, old):
        """The next value of a variable; on a slice without examples statistics stay and seeds still advance."""
        new = tf.convert_to_tensor(new)
        return self.place.unless_empty(new, old) if new.dtype.is_floating and old is not None else new

    # The methods of `MicroBatches`, for a single slice.

    def sum(self, local):
        """`local(pure)`, a nest of tensors, added up over the slices."""
        return self.place.counted(local(self))

    def record(self, make):
        """`make(pure)`, a `Pass`, for its sums and rows."""
        return KeptPass(self, make)

    def commit(self, evaluation):
        """Write the batch statistics, seeds and loss counters of `evaluation` into the model."""
        variables = [*self.stateful, *self.counting]
        for variable, value in zip(variables, [*evaluation.state, *evaluation.counters]):
            if value is not None:
                variable.assign(value)


def checked_seeds(owner, model, given):
    """`given` in the integer type of the seeds of the model's layers; refused unless it has a row for each of them."""
    if given is None:
        return None
    states = seeds(model.non_trainable_variables)
    expected = f"an integer tensor of shape ({len(states)}, 2), a row for each seed of the model's layers, or None"
    fits = tf.as_dtype(given.dtype).is_integer if hasattr(given, "dtype") else False
    check(owner, "seeds", given, fits and tf.TensorShape(given.shape).is_compatible_with([len(states), 2]), expected)
    given = tf.cast(given, states[0].dtype if states else tf.int64)
    return trees.shaped(given, [len(states), 2])


def _now(stateful, given):
    """The values of the variables; for seeds, the given values in order."""
    own = {} if given is None else {id(v): value for v, value in zip(seeds(stateful), tf.unstack(given), strict=True)}
    return [own[id(v)] if id(v) in own else tf.identity(v.value) for v in stateful]


def _check_not_assigned(scope, variables, given):
    """Raise a `ValueError` if the model assigns its trainable weights in a forward pass."""
    for variable, value in zip(variables, given):
        if scope.get_current_value(variable) is not value:
            raise ValueError(
                f"A layer assigns its trainable weight `{variable.path}` during the forward pass (as "
                "`SpectralNormalization` does), so the loss is not a function of the weights and has no curvature. "
                "Replace or freeze that layer, or train with an optimizer that needs only gradients, without "
                "`keras_curvature.curved`."
            )


def _check_has_examples(place):
    """Raise a `ValueError` for a slice that is known to have no examples: Keras' loss of it is no number."""
    if isinstance(place.examples, int) and place.examples == 0:
        raise ValueError(
            f"A replica has no examples of this batch of {place.total}, and eagerly Keras has no loss of no "
            "examples. Leave out `run_eagerly=True`, or drop the last batch of an epoch where it has fewer examples "
            "than there are replicas (`dataset.batch(n, drop_remainder=True)`)."
        )


def _check_is_a_number(loss):
    """Raise a `ValueError` for a loss of each example; Keras' own step would train on the sum and show the mean."""
    if tf.convert_to_tensor(loss).shape.rank:
        raise ValueError(
            f"The loss of a batch must be one number. Received: a loss of shape {tuple(loss.shape)}. Leave out "
            '`reduction=None` (or "none") of `keras.losses`, or write `reduction="sum"`; return the mean over the '
            "examples from a `compute_loss` of your own."
        )


def _cut(outputs):
    """A copy of the outputs with new floating tensors, and the list of these tensors and their logits."""
    leaves = []

    def fresh(y):
        if not (tf.is_tensor(y) and y.dtype.is_floating):
            return y
        found, logits = keras_internals.carried(y), keras_internals.logits_of(y)
        # Keras' losses cast to its float type, half precision to float32, and the cast would drop the logits
        kind = y.dtype if logits is None else tf.float32 if y.dtype.size < 4 else keras.config.floatx()
        cut = tf.identity(tf.cast(y, kind))
        leaves.append(cut)
        if logits is not None:
            found[keras_internals.LOGITS] = tf.identity(tf.cast(logits, cut.dtype))
            leaves.append(found[keras_internals.LOGITS])
        return keras_internals.carry(cut, found)

    return keras.tree.map_structure(fresh, outputs), leaves


def seeds(variables):
    """The states of random generators among a model's variables, a list."""
    return [v for v in variables if v.name == "seed_generator_state"]


def check_model(owner, model):
    """Refuse a `model` that is not a Keras model or has no loss; `owner` is the class or function that got it."""
    check(owner, "model", model, isinstance(model, keras.Model), "a `keras.Model`")
    if not model.compiled:
        raise ValueError(
            f"`{owner.__name__}`: the model {model.name!r} has no loss. Call `model.compile(loss=...)` first."
        )


def build_for(model, x, y, sample_weight):
    """Build the parts of the model, loss, metrics and optimizer that wait for a first batch.

    Keras builds them when it traces its train step; a `StatelessScope` cannot create variables.
    """
    if keras_internals.is_built(model):
        return
    batch = replicas.one_of(model.distribute_strategy, (x, y, sample_weight))
    # `init_scope` pauses gradient tapes, and then a model with a tape in its `call` gets no derivatives
    with contextlib.nullcontext() if tf.executing_eagerly() else tf.init_scope():
        keras_internals.build(model, batch)
