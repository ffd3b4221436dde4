"""Train steps as programs for a machine that has JAX, a GPU and no TensorFlow: written here, timed and checked there.

    python tpu/exported.py FOLDER --models mlp,cnn_32 --optimizers sgd,neumann,curveball # here: TensorFlow, jax
    python tpu/run_exported.py FOLDER                                                    # there: jax, numpy

A program is the train step of `fit` as XLA gets it, without dropout, whose masks TensorFlow draws otherwise than XLA.
Weights are drawn anew from a seed on both sides, so that a file holds the program alone and, of the weights after three
steps of TensorFlow's, a few numbers of each tensor. TensorFlow takes the steps a second time, from weights that differ
by one rounding: a deep network with batch statistics amplifies rounding, and two correct programs differ by as much.
"""

import argparse
import base64
import itertools
import json
import os
import sys
import zlib

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))

STEPS = 3
LARGEST = 64 * 2**20  # bytes of all files that are to travel together
SHOWN = 64  # numbers of each tensor that are compared


def write(folder, network, optimizer, policy, examples):
    """Write the program of a train step; returns its size in bytes.

    Args:
        folder: Where.
        network, optimizer: Names in `traced.NETWORKS` and `methods.OPTIMIZERS`.
        policy: `"float32"` or `"mixed_bfloat16"`.
        examples: In the batch.
    """
    import executed
    import jax
    import keras
    import numpy as np
    import tensorflow as tf
    from run_exported import batch, drawn, shown
    from traced import NETWORKS, traced

    def without_dropout(examples):
        model, *rest = NETWORKS[network](examples)
        for layer in model.layers:
            if isinstance(layer, keras.layers.Dropout):
                layer.rate = 0.0
        return model, *rest

    keras.mixed_precision.set_global_policy(policy)
    step = traced(optimizer, without_dropout, 1, examples)
    model = step.model
    for number, weight in enumerate(model.trainable_variables):
        if len(weight.shape) > 1:  # biases and scales stay as they begin
            weight.assign(drawn(number, weight.shape))
    places = {id(v.value.handle): v for v in executed.variables(model)}
    values = [places[id(t)].numpy() if id(t) in places else t.numpy() for t in step.captured]
    numbers = {id(v): i for i, v in enumerate(model.trainable_variables)}
    trained = [numbers.get(id(places.get(id(t)))) for t in step.captured]  # which weight it is, or none
    spec = {
        "network": network, "optimizer": optimizer, "policy": policy, "updates": sorted(step.updates.items()),
        "inputs": [[list(spec.shape), spec.dtype.name] for spec in step.inputs], "classes": int(model.output_shape[-1]),
        "written": {"TensorFlow": tf.__version__, "Keras": keras.__version__, "JAX": jax.__version__},
        "captured": [_captured(value, number) for value, number in zip(values, trained)], "weights": trained,
    }  # fmt: skip
    (x, y), everything = batch(spec), executed.variables(model)
    start, rounding = [v.numpy() for v in everything], float(jax.numpy.finfo(model.compute_dtype).eps)

    def after_steps(change):
        for variable, value in zip(everything, start):
            variable.assign(value)
        for number, weight in enumerate(model.trainable_variables):
            signs = np.random.default_rng(number).choice([-1.0, 1.0], weight.shape)
            weight.assign(weight.numpy() * (1 + change * signs).astype("float32"))
        for _ in range(STEPS):
            model.train_on_batch(x, y)
        return [shown(np.asarray(w)) for w in model.trainable_variables]

    ends, others = after_steps(0.0), after_steps(rounding)
    spec["expected"] = [end.tolist() for end in ends]
    spec["rounding"] = max(float(np.abs(a - b).max()) for a, b in zip(ends, others))
    name = os.path.join(folder, f"{network}-{optimizer}-{policy}")
    with open(name + ".json", "w") as file:
        json.dump(spec, file)
    with open(name + ".mlir.z", "wb") as file:
        return file.write(zlib.compress(without_locations(step.text).encode(), 9)) + os.path.getsize(name + ".json")


def _captured(value, number):
    """A captured value for the file: a weight that is drawn by its number, one number, or all of them, packed."""
    if number is not None and value.ndim > 1:
        return {"drawn": number, "shape": list(value.shape), "dtype": value.dtype.name}
    first = value.ravel()[0].item() if value.size else 0
    if (value == first).all():
        return {"constant": first, "shape": list(value.shape), "dtype": value.dtype.name}
    packed = base64.b64encode(zlib.compress(value.tobytes(), 9)).decode()
    return {"packed": packed, "shape": list(value.shape), "dtype": value.dtype.name}


def without_locations(text):
    """The program without the names of TensorFlow's operations, and without copies."""
    from compiler import _without_copies
    from jax._src.interpreters import mlir
    from jaxlib.mlir import ir

    with mlir.make_ir_context():
        module = ir.Module.parse(text)
        _without_copies(module, ir)
        return module.operation.get_asm(enable_debug_info=False)


def main(argv=None):
    """The program."""
    parser = argparse.ArgumentParser(description="Train steps as files for JAX.")
    parser.add_argument("folder", help="where to write; created")
    models = "with commas: cnn, cnn_32, mlp, autoencoder, resnet50, transformer, transformer_100m"
    parser.add_argument("--models", default="cnn", help=models)
    parser.add_argument("--optimizers", default="sgd,neumann,curveball", help="with commas, sgd among them; or all")
    parser.add_argument("--policies", default="float32", help="float32,mixed_bfloat16")
    parser.add_argument("--examples", type=int, default=32, help="in the batch; default 32")
    args = parser.parse_args(argv)
    os.makedirs(args.folder, exist_ok=True)
    from methods import OPTIMIZERS

    total, optimizers = 0, list(OPTIMIZERS) if args.optimizers == "all" else args.optimizers.split(",")
    for network, policy, optimizer in itertools.product(args.models.split(","), args.policies.split(","), optimizers):
        try:
            size = write(args.folder, network, optimizer, policy, args.examples)
        except ValueError as error:  # of an optimizer that does not take the model, such as a dense matrix too large
            print(f"{network} {optimizer} {policy} is refused: {error}", flush=True)
            continue
        total += size
        print(f"{network} {optimizer} {policy}: {size / 1e6:.2f} MB", flush=True)
    print(f"{total / 1e6:.1f} MB in {args.folder}")
    if total > LARGEST:
        print(f"more than {LARGEST / 1e6:.0f} MB: fewer optimizers, or smaller networks, travel more easily")


if __name__ == "__main__":
    main()
