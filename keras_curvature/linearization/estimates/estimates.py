"""What a `Linearization` estimates of the curvature that products do not give: diagonals, Kronecker factors, means."""

import tensorflow as tf

from keras_curvature.linearization.estimates import diagonals as diagonal
from keras_curvature.linearization.estimates import factors


class Estimates:
    """A part of `Linearization`, which see: what it computes from its recorded pass and is no product.

    Everything is of the whole batch, summed over replicas and micro-batches. What is drawn at random is a function of
    a `seed`, an integer number or tensor, and the same on all replicas.
    """

    def squared_gradients(self, seed=0, fisher="empirical"):
        """Mean over the examples of the squared gradient of each, a vector; see `estimates/diagonals.py`.

        Args:
            seed: Integer tensor or number, of what is drawn at random.
            fisher: `"empirical"`: of the true labels; `"sampled"`: an estimate of the diagonal of the Fisher matrix, of
                labels drawn from what the model says. Defaults to `"empirical"`.
        """
        return diagonal.squared_gradients(self, seed, fisher)

    def sampled_gradient(self, seed=0):
        """The gradient that the loss has with labels drawn from what the model says, a vector; one backward pass.

        Raises:
            ValueError: The loss is not minus the logarithm of a likelihood that is known.
        """
        return self._recordings().total(lambda recording: recording.pull(recording.sampled_slope(seed)))

    def fisher_diagonal(self, seed=0):
        """An unbiased estimate of the diagonal of the Fisher matrix, a vector without a negative entry.

        The square of `sum_i J_i' c_i`, with the cotangents `c` of labels drawn from what the model says; see
        `fisher/sampling.py`. For a loss that is a mean over N examples it is N times the squared `sampled_gradient`;
        one backward pass.

        Raises:
            ValueError: As `sampled_gradient`.
        """
        return [tf.square(s) for s in self._recordings().total(lambda r: r.pull(r.cotangents("sampled", seed)))]

    def hessian_diagonal(self, seed=0, probe="rademacher", probes=1):
        """An unbiased estimate of the diagonal of the Hessian, a vector: the mean of `z * (H z)` over some `probes`.

        Args:
            seed: Integer tensor or number that the random vectors `z` are a function of, the same on all replicas.
            probe: `"rademacher"`: `z` of random signs, with the smallest variance; `"gaussian"`; `"exact"`: the
                diagonal itself, by one product for each weight. Defaults to `"rademacher"`.
            probes: How many, an integer. Defaults to `1`.
        """
        return diagonal.hessian_diagonal(self, seed, probe, probes)

    def kronecker_factors(self, blocks, diagonal=(), fisher="sampled", seed=0):
        """Kronecker factors of blocks of the Fisher matrix of the loss; see `layers/kronecker.py`.

        With `A (x) G` about the block of each layer, and L2 regularizers (`l2`) not in it. One backward pass, to the
        activations and not to the weights; another one where there is a `diagonal`; `fisher="exact"`: as many for each
        label. The forward pass is that of the gradient, where `tap` was called before.

        Args:
            blocks: Of `kronecker.blocks(model)`.
            diagonal: Indices of weights to give the diagonal of their blocks for: a random one, with it as expectation.
            fisher: `"sampled"`: with labels drawn from what the model says; `"exact"`: with every label there is;
                `"empirical"`: with the true ones. Defaults to `"sampled"`.
            seed: Integer tensor or number, of what is drawn at random.

        Returns:
            `([(A, G)], [tensor])`: a pair for each block, with the shapes of its `factor_shapes`, and a tensor shaped
            as the variable for each index in `diagonal`.
        """
        return factors.factors(self, blocks, list(diagonal), fisher, seed)

    def kronecker_second_moments(self, blocks, bases, diagonal=(), fisher="sampled", seed=0):
        """The diagonal of the Fisher matrix in the eigenbases of Kronecker factors; see `estimates/factors.py`.

        Exact for each example: a sum over the examples of `(U_A' g U_G)^2`, with `g` the gradient of one. One backward
        pass, as for the factors; with the same `seed`, of the same labels.

        Args:
            blocks: Of `kronecker.blocks(model)`.
            bases: `[(U_A, U_G)]`, for each block eigenvectors as columns; `None` for a factor that is diagonal.
            diagonal, fisher, seed: As of `kronecker_factors`.

        Returns:
            `([tensor], [tensor])`: one shaped as the matrix of each block, and one for each index in `diagonal`.
        """
        return factors.second_moments(self, blocks, list(bases), list(diagonal), fisher, seed)

    def kronecker_means(self, blocks):
        """What the layers of some blocks saw on average, and the loss' mean slope in what they said.

        Of true labels, in the pass that gives the `gradient`, where that is not known yet. For a loss that is a mean
        over the examples the slopes are those of single examples, and their mean is over examples and positions.

        Args:
            blocks: Of `kronecker.blocks(model)`.

        Returns:
            `[(a, b)]`: vectors `([groups,] d_in [+ 1])`, with a 1 at the end for the bias, and `([groups,] d_out)`.
        """

        def local(recording):
            gradient, means = factors.means(recording, blocks)
            self._note_reached(recording)
            return gradient, means

        gradient, means = self.tapped(blocks).total(local)
        self._once("gradient", lambda: gradient)
        self._forward()
        return means

    def tap(self, blocks):
        """Have the passes from here on note what the layers of some Kronecker `blocks` see and say.

        Called before the gradient (or loss) is asked for, the factors need no forward pass of their own; also where
        they are asked for inside a condition.
        """
        layers = {id(block.weights.layer): block.weights.layer for block in blocks}
        self._tapped = tuple(layers.values())

    def tapped(self, blocks):
        """The recorded pass with these blocks tapped, `Recordings`."""
        if not {id(block.weights.layer) for block in blocks} <= set(map(id, self._tapped)):
            self.tap(blocks)
        return self._recordings()
