"""A check, before anything else is imported, that Keras runs on a TensorFlow that the package works with."""

import importlib.util

OLDEST = {"keras": (3, 10), "tensorflow": (2, 19)}
CHOOSE = (
    "Choose TensorFlow before Keras is imported, by the environment:\n\n    KERAS_BACKEND=tensorflow python ...\n\n"
    'or by `"backend": "tensorflow"` in `~/.keras/keras.json`.'
)


def check():
    """Raise an `ImportError` with the remedy unless Keras runs on TensorFlow, both recent enough."""
    for package in ("tensorflow", "keras"):
        if importlib.util.find_spec(package) is None:
            raise ImportError(
                f"`keras_curvature` needs Keras on TensorFlow, and `{package}` is not installed. Install it:\n\n"
                f"    pip install 'tensorflow>={_text(OLDEST['tensorflow'])}' 'keras>={_text(OLDEST['keras'])}'\n"
            )
    try:
        import keras
        import tensorflow
    except ImportError as error:  # such as another backend, which is not installed
        message = f"`keras_curvature` needs Keras on TensorFlow, and Keras cannot be imported: {error}. {CHOOSE}"
        raise ImportError(message) from error
    if keras.backend.backend() != "tensorflow":
        received = f"Received: the Keras backend {keras.backend.backend()!r}"
        raise ImportError(f"`keras_curvature` needs Keras on TensorFlow. {received}. {CHOOSE}")
    for module in (keras, tensorflow):
        name, oldest = module.__name__, OLDEST[module.__name__]
        if _numbers(module.__version__) < oldest:
            raise ImportError(
                f"`keras_curvature` needs {name} {_text(oldest)} or newer. Received: {name} {module.__version__}. "
                f"Install a newer one:\n\n    pip install --upgrade '{name}>={_text(oldest)}'\n"
            )


def _numbers(version):
    """The first two numbers of a version such as `2.21.0-rc1`."""
    return tuple(int(part) for part in version.split(".")[:2])


def _text(numbers):
    return ".".join(str(number) for number in numbers)


check()
