"""Times and checks the programs of `exported.py` on the first device of JAX; needs jax and numpy alone.

    python run_exported.py FOLDER [--seconds 5]

For each network and precision, SGD first: milliseconds of a step, ratio to SGD's, memory of the program, and the
largest difference from TensorFlow's weights after three steps, beside the largest weight and the difference that
one rounding of the first weights makes in TensorFlow itself. A program that does not load
or run (another version of JAX, too little memory) gets a line that says so, and the others go on.
"""

import argparse
import base64
import glob
import json
import os
import sys
import time
import zlib

os.environ["JAX_ENABLE_X64"] = "1"  # counters are of 64 bits

import numpy as np

STEPS, SHOWN = 3, 64


def drawn(number, shape):
    """The first values of a weight, from its number: normal, scaled by the rows that it sums over."""
    random = np.random.default_rng(number)
    return (random.standard_normal(shape) / np.sqrt(np.prod(shape[:-1]))).astype("float32")


def batch(spec):
    """`(x, y)`."""
    random = np.random.default_rng(0)
    (shape, kind), (of_labels, kind_of_labels) = spec["inputs"]
    if kind.startswith("float"):
        x = random.standard_normal(shape).astype(kind)
    else:
        x = random.integers(0, 256 if kind == "uint8" else 1000, shape).astype(kind)
    if kind_of_labels.startswith("float"):  # probabilities, such as the pixels of an autoencoder
        return x, random.random(of_labels).astype(kind_of_labels)
    return x, random.integers(0, spec["classes"], of_labels).astype("int32")


def shown(array):
    """A few numbers of a tensor, spread over it."""
    flat = np.asarray(array, "float64").ravel()
    return flat[:: max(1, flat.size // SHOWN)][:SHOWN]


def value_of(captured):
    """The array that a captured value describes."""
    if "drawn" in captured:
        return drawn(captured["drawn"], captured["shape"]).astype(captured["dtype"])
    if "constant" in captured:
        return np.full(captured["shape"], captured["constant"], captured["dtype"])
    values = zlib.decompress(base64.b64decode(captured["packed"]))
    return np.frombuffer(values, captured["dtype"]).reshape(captured["shape"])


def load(text, device):
    """The executable."""
    from jax._src import compiler
    from jax._src.interpreters import mlir
    from jax._src.lib import xla_client
    from jaxlib.mlir import ir

    options = compiler.get_compile_options(num_replicas=1, num_partitions=1, device_assignment=np.array([[device.id]]))
    with mlir.make_ir_context():
        module = ir.Module.parse(text)
        return device.client.compile_and_load(module, xla_client.DeviceList((device,)), options)


def measured(spec, path, seconds, device):
    """`{"ms", "memory", "difference", "largest", "rounding"}` of a program."""
    import jax

    with open(path.replace(".json", ".mlir.z"), "rb") as file:
        program = load(zlib.decompress(file.read()).decode(), device)
    memory = program.get_compiled_memory_stats()
    inputs = [jax.device_put(a, device) for a in batch(spec)]
    values = [jax.device_put(value_of(captured), device) for captured in spec["captured"]]

    def step():
        results = program.execute_sharded([*inputs, *values]).disassemble_into_single_device_arrays()
        for output, captured in spec["updates"]:
            values[captured] = results[output][0]
        return results[0][0]

    for _ in range(STEPS):
        step()
    weights = {number: values[i] for i, number in enumerate(spec["weights"]) if number is not None}
    found = [shown(np.asarray(weights[number], "float64")) for number in range(len(spec["expected"]))]
    difference = max(float(np.abs(a - b).max()) for a, b in zip(found, spec["expected"]))
    began, count = time.perf_counter(), 0
    while time.perf_counter() - began < seconds or not count:
        for _ in range(5):
            last = step()
        last.block_until_ready()
        count += 5
    return {
        "ms": 1e3 * (time.perf_counter() - began) / count,
        "memory": memory.argument_size_in_bytes + memory.output_size_in_bytes - memory.alias_size_in_bytes
        + memory.temp_size_in_bytes,
        "difference": difference, "largest": max(float(np.abs(a).max()) for a in found),
        "rounding": spec.get("rounding", float("nan")),  # of older files
    }  # fmt: skip


def found_in(folder):
    """`[(path, what is in the file)]`, SGD first; raises a `ValueError` where there is nothing to run."""
    paths = sorted(glob.glob(os.path.join(folder, "*.json")), key=lambda path: ("-sgd-" not in path, path))
    if not paths:
        raise ValueError(f"no programs (*.json) in {folder!r}: write them by `python tpu/exported.py {folder}`")
    specs = []
    for path in paths:
        with open(path) as file:
            specs.append((path, json.load(file)))
        if not os.path.exists(path.replace(".json", ".mlir.z")):
            raise ValueError(f"{path!r} has no program beside it (.mlir.z): copy the whole folder")
    return specs


def other_versions(spec, jax_version):
    """What to say if a program is not that of this JAX, or nothing."""
    written = spec.get("written")
    if written is None:
        return "written before files named their versions: write it anew by exported.py"
    if written["JAX"] == jax_version:
        return ""
    return (
        f"written with jax {written['JAX']} and TensorFlow {written['TensorFlow']}, this is jax {jax_version}: "
        f"install that jax, or write it anew beside this one"
    )


def main(argv=None):
    """The program."""
    parser = argparse.ArgumentParser(description="Times programs of exported.py.")
    parser.add_argument("folder", help="of exported.py")
    parser.add_argument("--seconds", type=float, default=5.0, help="of timing for each program; default 5")
    args = parser.parse_args(argv)
    try:
        programs = found_in(args.folder)
    except ValueError as error:
        parser.error(str(error))
    import jax

    device = jax.devices()[0]
    print(f"{device.device_kind}, jax {jax.__version__}")
    print(f"{'program':<60} {'ms':>9} {'of SGD':>7} {'MB':>9} {'difference':>11} {'of':>7} {'rounding':>9}")
    reference, failed = {}, 0
    for path, spec in programs:
        name = os.path.basename(path).removesuffix(".json")
        network, _, policy = name.split("-")
        try:
            found = measured(spec, path, args.seconds, device)
        except Exception as error:  # of the compiler or the device, which have many kinds
            failed += 1
            reason = other_versions(spec, jax.__version__) or str(error).strip().splitlines()[0][:160]
            print(f"{name:<60} failed: {reason}", flush=True)
            continue
        reference.setdefault((network, policy), found["ms"] if "-sgd-" in name else float("nan"))
        ratio = found["ms"] / reference[network, policy]
        print(
            f"{name:<60} {found['ms']:>9.3f} {ratio:>7.2f} {found['memory'] / 1e6:>9.1f} {found['difference']:>11.1e} "
            f"{found['largest']:>7.3f} {found['rounding']:>9.1e}", flush=True,
        )  # fmt: skip
    return int(failed > 0)


if __name__ == "__main__":
    sys.exit(main())
