"""The requirements of an optimizer on the train step."""

import dataclasses

from keras_curvature.component import check_flag


@dataclasses.dataclass(frozen=True)
class Needs:
    """The quantities that a method needs from a train step, so that the step computes nothing else.

    An optimizer has one as its attribute `needs`. The train step passes it to the `Linearization` of the batch, which
    records its forward pass accordingly. So the order of the questions changes neither the numbers nor the number of
    passes.

    Args:
        only_gradients: The method has a `precondition` or an `update_step`, and no `direction`: gradients suffice. It
            trains any `keras.Model`, with gradient accumulation. Defaults to `False`.
        products: It asks for products with the Jacobian, the Gauss-Newton or a Fisher matrix. Without, losses and
            gradients are computed by Keras' own kernels, which may be faster (cuDNN's recurrent layers, max pooling).
            Defaults to `False`.
        hessian: It asks for products with the Hessian. Defaults to `False`.
        layers: It uses the layers of the model: to create its state, and for their inputs and slopes (Kronecker
            factors, second moments, means). Defaults to `False`.
        gram: It asks for rows of the Jacobian, or for gradients of examples: layers are tapped where no layer mixes the
            examples, for the Gram matrix by layers. Defaults to `False`.
        shifted: It is linearized away from the weights, at `weights + optimizer.shift()`: a look-ahead, or weight
            noise. Defaults to `False`.

    Raises:
        ValueError: One of them is not `True` or `False`, or `only_gradients` stands beside `products`, `hessian`,
            `layers` or `gram`.

    Example:

    ```python
    class MyNewton(keras_curvature.CurvatureOptimizer):
        needs = keras_curvature.Needs(hessian=True)

        def direction(self, lin):
            return trees.negative(my_solver(lin.hessian(), lin.gradient))
    ```
    """

    only_gradients: bool = False
    products: bool = False
    hessian: bool = False
    layers: bool = False
    gram: bool = False
    shifted: bool = False

    def __post_init__(self):
        for field in dataclasses.fields(self):
            check_flag(self, field.name, getattr(self, field.name))
        more = [name for name in ("products", "hessian", "layers", "gram") if getattr(self, name)]
        if self.only_gradients and more:
            raise ValueError(
                f"`Needs`: a method that needs only gradients cannot need `{more[0]}`. Received: only_gradients=True, "
                f"{more[0]}=True. Leave one of them out."
            )


EVERYTHING = Needs(products=True, hessian=True, layers=True)


def require(lin, question, need):
    """Refuse a question that the recorded pass of a `Linearization` cannot answer."""
    if not getattr(lin.needs, need):
        raise ValueError(
            f"`Linearization.{question}` is not among the needs of this linearization. Received: needs={lin.needs}. "
            f"Say what is needed before the forward pass: `Linearization(..., needs=Needs({need}=True))`, or in the "
            f"class of an optimizer:\n\n    needs = Needs({need}=True)\n"
        )
