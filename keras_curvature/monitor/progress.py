"""A progress bar over the products with an operator."""

import keras

from keras_curvature.operators import Function


def advancing(operator, products=None):
    """`operator`, as one that advances a progress bar with every product; `products` is their number, where known."""
    bar = keras.utils.Progbar(products, unit_name="product")

    def product(vector):
        found = operator @ vector
        bar.add(1)
        return found

    return Function(product, operator.psd)
