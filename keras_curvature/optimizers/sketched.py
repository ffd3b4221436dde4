"""A Nyström sketch of the curvature as optimizer state, and the preconditioner that a step makes of it."""

from keras_curvature import trees
from keras_curvature.optimizers.rows import add_rows
from keras_curvature.solvers.nystrom import NystromPreconditioner, sketch


def create_sketch(optimizer, variables, rank):
    """`(vectors, values)`: variables of an optimizer for a sketch of `rank` eigenvectors, or of all."""
    rank = min(rank, trees.count(variables))
    vectors = add_rows(optimizer, variables, rank, "sketch")
    return vectors, optimizer.add_variable((rank,), dtype="float64", name="eigenvalues", aggregation="none")


def preconditioner(optimizer, state, operator, like, every, damping):
    """The preconditioner of the sketch `state`, which is that of `operator` anew in every `every`-th step."""
    vectors, values = state

    def renewed():
        new = sketch(operator, like, values.shape[0], optimizer.iterations)
        return [*new.vectors, new.values]

    *rows, eigenvalues = optimizer.refresh([*vectors, values], every, renewed)
    return NystromPreconditioner(rows, eigenvalues, damping)
