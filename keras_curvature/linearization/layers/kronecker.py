"""The weights of a model with Kronecker factors: blocks of the Fisher matrix, one per layer.

A layer multiplies by its weights `W` (`weights.py`) at positions `t` of the examples `n`: `s_nt = W' a_nt`. With the
slopes `d_nt` of the loss, for labels drawn from the model, the block of the Fisher matrix for `W` is

    F = sum_n (sum_t a_nt (x) d_nt) (sum_t a_nt (x) d_nt)'   ~   A (x) G

where the slopes carry the `1/N` of a mean over the examples as `1/sqrt(N)` (`sampling.py`). Two ways to split the sum:

    "expand"    A = mean_nt a_nt a_nt'       G = sum_nt d_nt d_nt'      positions count as examples
    "reduce"    A = mean_n a_n a_n'          G = sum_n d_n d_n'         a_n = mean_t a_nt,  d_n = sum_t d_nt

both exact for one example at one position. `factors.py` computes them.

Layers that have a block: `Dense`, `Conv1D`, `Conv2D`, `Conv3D` (with groups: a block for each), `DepthwiseConv1D`,
`DepthwiseConv2D` (a block for each channel), `EinsumDense` and with it the projections of `MultiHeadAttention` and
`GroupQueryAttention`; `Embedding` (diagonal `A`, the frequencies; always "expand"); `BatchNormalization`,
`LayerNormalization`, `GroupNormalization`, `RMSNormalization` (the exact 2x2 block of the scale and shift of each
channel, as `A`); `SimpleRNN`, `LSTM`, `GRU` (a block for the inputs, one for the state; steps are positions). They may
be in nested models, in custom layers, in `Bidirectional` and `TimeDistributed`, and be used several times.

These have no block: layers of other classes, and subclasses with their own `call`; LoRA and quantized layers; weights
that two layers share; normalization that is synchronized or has `renorm`; `LSTM` and `GRU` with `implementation=1` (as
`recurrent_dropout` sets it), recurrent layers with `zero_output_for_mask`; the recurrent kernel of
`GRU(reset_after=False)`; an `EinsumDense` whose bias has other axes than the outputs of the kernel, or whose equation
only sums over an axis.

References: Martens and Grosse, "Optimizing neural networks with Kronecker-factored approximate curvature" (2015),
section 3; Grosse and Martens, "A Kronecker-factored approximate Fisher matrix for convolution layers" (2016), section 3
("expand", with its homogeneity assumptions); Eschenhagen, Immer, Turner, Schneider and Hennig, "Kronecker-factored
approximate curvature for modern neural network architectures" (2023), sections 3.2 and 3.3.
"""

import dataclasses

import keras

from keras_curvature import keras_internals, trees
from keras_curvature.component import check_choice
from keras_curvature.linearization.layers.kinds import weights_of
from keras_curvature.linearization.layers.weights import DIAGONAL, Weights

SHARING = ("expand", "reduce")


@dataclasses.dataclass(frozen=True, eq=False)
class Block:
    """The weights of one layer as a matrix `(d_in [+ 1], d_out)`, or one for each of its groups.

    Attributes:
        name: The path of the kernel.
        variables: The indices of kernel and bias in `model.trainable_variables`.
        weights: The `Weights`, which know the layer.
        sharing: `"expand"` or `"reduce"`.
    """

    name: str
    variables: tuple
    weights: Weights
    sharing: str

    @property
    def shape(self):
        """The shape of the matrix, `([groups,] d_in [+ 1], d_out)`."""
        return self.weights.shape

    @property
    def kinds(self):
        """`"matrix"` or `"diagonal"`, for `A` and for `G`."""
        return self.weights.kinds

    @property
    def factor_shapes(self):
        """Shapes of `A` and `G`."""
        *groups, d_in, d_out = self.shape
        ends = [[d] if kind == DIAGONAL else [d, d] for d, kind in zip((d_in, d_out), self.kinds)]
        return tuple((*groups, *end) for end in ends)

    @property
    def dtype(self):
        """The dtype of the factors, at least float32."""
        return trees.wide(self.weights.variables[0].dtype)

    @property
    def has_indices(self):
        """Whether the inputs are unit vectors, given by the indices of their 1."""
        return self.kinds[0] == DIAGONAL

    def matrix(self, vector):
        """The weights of this block in a vector, as a matrix."""
        return self.weights.matrix([vector[i] for i in self.variables])

    def tensors(self, matrix):
        """A matrix as tensors, in the order of `variables`."""
        return self.weights.tensors(matrix)

    def scatter(self, matrix, vector):
        """Add the entries of a matrix to their places in `vector`, a list."""
        for i, tensor in zip(self.variables, self.tensors(matrix)):
            vector[i] += tensor


def blocks(model, sharing="expand"):
    """The blocks of a model with Kronecker factors, and the other weights.

    Args:
        model: A built `keras.Model`.
        sharing: `"expand"` or `"reduce"`: how positions at which a layer uses the same weights count.

    Returns:
        `(blocks, diagonal, unsupported)`: a list of `Block`; the indices of the variables outside all blocks; and their
        paths.
    """
    check_choice(blocks, "sharing", sharing, SHARING)
    position = {id(v): i for i, v in enumerate(model.trainable_variables)}
    found = [_trainable(w, position) for w in _candidates(model) if w.kernel is None or id(w.kernel) in position]
    owners = _owners(model, found)
    # frozen normalization without a scale has no weights left
    alone = [w for w in found if w.variables and all(len(owners[id(v)]) == 1 for v in w.variables)]
    made = [
        Block(w.variables[0].path, tuple(position[id(v)] for v in w.variables), w, w.sharing or sharing) for w in alone
    ]
    made.sort(key=lambda block: block.variables)
    taken = {i for block in made for i in block.variables}
    diagonal = [i for i in range(len(position)) if i not in taken]
    return made, diagonal, [model.trainable_variables[i].path for i in diagonal]


def layers(model):
    """The layers of a model whose weights have a block, each once."""
    found = {id(block.weights.layer): block.weights.layer for block in blocks(model)[0]}
    return list(found.values())


def _candidates(model):
    """The `Weights` of all layers but those in the cell of a recurrent layer, which are called inside its loop."""
    of_model = keras_internals.layers_of(model)
    recurrent = [layer for layer in of_model if isinstance(layer, keras.layers.RNN)]
    in_loops = {id(part) for layer in recurrent for part in keras_internals.layers_of(layer, include_self=False)}
    return [w for layer in of_model if id(layer) not in in_loops for w in weights_of(layer)]


def _owners(model, found):
    """By the id of a variable, the ids of the layers that use it; tied weights have more than one."""
    owners, cells = {}, {id(w.layer.cell): w.layer for w in found if isinstance(w.layer, keras.layers.RNN)}
    users = [(w.layer, w.variables) for w in found]
    users += [
        (cells.get(id(layer), layer), keras_internals.own_weights(layer)) for layer in keras_internals.layers_of(model)
    ]
    for layer, variables in users:
        for v in variables:
            owners.setdefault(id(v), set()).add(id(layer))
    return owners


def _trainable(weights, position):
    frozen = weights.bias is not None and id(weights.bias) not in position
    return dataclasses.replace(weights, bias=None) if frozen else weights
