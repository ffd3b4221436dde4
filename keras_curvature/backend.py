"""A check, before anything else is imported, that Keras runs on a TensorFlow that the package works with.

The package does not require TensorFlow, which comes in several distributions of one module: `tensorflow`,
`tensorflow-cpu`, `tensorflow-tpu` and others. A requirement would install one of them over another.
"""

import importlib.util

# The first version that works, and the first one that nobody has tried: private names are read from both.
RANGES = {"keras": ((3, 10), (3, 16)), "tensorflow": ((2, 19), (2, 22))}
CHOOSE = (
    "Choose TensorFlow before Keras is imported, by the environment:\n\n    KERAS_BACKEND=tensorflow python ...\n\n"
    'or by `"backend": "tensorflow"` in `~/.keras/keras.json`.'
)


def check():
    """Raise an `ImportError` with the remedy unless Keras runs on TensorFlow, both of versions that work."""
    for package in ("tensorflow", "keras"):
        if importlib.util.find_spec(package) is None:
            raise ImportError(
                f"`keras_curvature` needs Keras on TensorFlow, and `{package}` is not installed. Install it:\n\n"
                f"    pip install 'keras{_text('keras')}' 'tensorflow{_text('tensorflow')}'\n\n"
                f"On a Cloud TPU: 'tensorflow-tpu{_text('tensorflow')}' 'libtpu>=0.0.14,<0.0.18'.\n"
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
        name, (oldest, too_new) = module.__name__, RANGES[module.__name__]
        if not oldest <= _numbers(module.__version__) < too_new:
            wanted = name + _text(name)
            raise ImportError(
                f"`keras_curvature` needs {wanted}. Received: {name} {module.__version__}. Install one of these:"
                f"\n\n    pip install '{wanted}'\n"
            )


def _numbers(version):
    """The first two numbers of a version such as `2.21.0-rc1`."""
    return tuple(int(part) for part in version.split(".")[:2])


def _text(package):
    """The range of a package as `pip` writes it."""
    oldest, too_new = (".".join(str(number) for number in numbers) for numbers in RANGES[package])
    return f">={oldest},<{too_new}"


check()
