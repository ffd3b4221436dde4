"""Callbacks that only the chief of several processes runs."""

from typing import Any

import keras

from keras_curvature.component import check


def is_chief(strategy):
    """Whether this process is the chief, which writes files; true if there is only one process."""
    resolver = getattr(strategy, "cluster_resolver", None)
    if resolver is None or resolver.task_type not in ("chief", "worker"):
        return True
    if resolver.task_type == "worker" and "chief" in resolver.cluster_spec().jobs:
        return False
    return resolver.task_type == "chief" or resolver.task_id == 0


class ChiefOnly(keras.callbacks.Callback):
    """Runs `callback` on the chief only, if `fit` runs in several processes; in one process, it runs as usual.

    Use it for callbacks that write files: otherwise each process of `MultiWorkerMirroredStrategy` writes the same file.
    Do not use it for `keras_curvature.callbacks.Checkpoint`, in which all processes take part, nor for a callback that
    runs the model.

    Args:
        callback: A `keras.callbacks.Callback`.

    Raises:
        ValueError: `callback` is not a `keras.callbacks.Callback`.

    Example:

    ```python
    board = keras.callbacks.TensorBoard("logs")
    model.fit(dataset, callbacks=[keras_curvature.callbacks.ChiefOnly(board)])
    ```
    """

    def __init__(self, callback: keras.callbacks.Callback) -> None:
        super().__init__()
        valid = isinstance(callback, keras.callbacks.Callback)
        check(self, "callback", callback, valid, "a `keras.callbacks.Callback`")
        self.callback, self._works = callback, True

    def set_model(self, model: keras.Model) -> None:
        """Find out from the model's strategy whether this process is the chief."""
        super().set_model(model)
        self._works = is_chief(model.distribute_strategy)
        if self._works:
            self.callback.set_model(model)

    def set_params(self, params: dict[str, Any]) -> None:
        """Pass the parameters of `fit` to `callback`."""
        super().set_params(params)
        self.callback.set_params(params)


def _forwarding(hook):
    def forward(self, *args: Any, **kwargs: Any) -> None:
        if self._works:
            getattr(self.callback, hook)(*args, **kwargs)

    forward.__name__, forward.__doc__ = hook, "Calls `callback` on the chief."
    return forward


for _hook in (name for name in dir(keras.callbacks.Callback) if name.startswith("on_")):
    setattr(ChiefOnly, _hook, _forwarding(_hook))
