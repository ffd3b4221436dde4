"""Private names of Keras' optimizers."""


def trained_by(optimizer):
    """The variables that a built optimizer trains, a list."""
    return optimizer._trainable_variables


def keys_of(optimizer, variables):
    """A key for each variable, the same for a variable and its mirrors on the replicas."""
    return [optimizer._var_key(v) for v in variables]


def places_of(optimizer, variables):
    """Where the state of each variable stands in the lists of `state`."""
    return [optimizer._get_variable_index(v) for v in variables]


def state(optimizer, role):
    """What an optimizer of Keras' keeps in a role such as `"velocities"`: a list by variable, or one variable.

    `None` where it keeps nothing in that role.
    """
    return getattr(optimizer, f"_{role}", None)


def strategy_of(optimizer):
    """The distribution strategy that an optimizer was made under."""
    return optimizer._distribution_strategy
