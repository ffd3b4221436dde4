"""Private names of Keras' optimizers."""


def trained_by(optimizer):
    """The model variables that a built optimizer trains, a list."""
    return optimizer._trainable_variables


def keys_of(optimizer, variables):
    """A key for each variable, the same for a variable and its mirrors on the replicas."""
    return [optimizer._var_key(v) for v in variables]


def places_of(optimizer, variables):
    """The index of each variable in the lists that `state` returns."""
    return [optimizer._get_variable_index(v) for v in variables]


def state(optimizer, role):
    """The state of a Keras optimizer under a name such as `"velocities"`; `None` if it has none of this name.

    A list with one variable for each trained variable, or a single variable.
    """
    return getattr(optimizer, f"_{role}", None)


def strategy_of(optimizer):
    """The distribution strategy in whose scope an optimizer was created."""
    return optimizer._distribution_strategy


def decays(optimizer, variable):
    """Whether the weight decay of an optimizer acts on a variable: `exclude_from_weight_decay` may have named it."""
    return optimizer._use_weight_decay(variable)
