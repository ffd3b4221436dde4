"""A TPU's own compiler without a TPU: `libtpu` compiles for a topology that is only named.

    pip install ".[tpu-check]"       # jax, libtpu

One process at a time holds the compiler.
"""

import dataclasses
import math
import os
import re
import time

import numpy as np
from machines import MACHINES

# the smallest topology of a kind, which also stands for one chip; the machine
KINDS = {"v4": ("2x2x1", "TPU v4"), "v5e": ("2x2", "TPU v5e"), "v5p": ("2x2x1", "TPU v5p"), "v6e": ("2x2", "TPU v6e")}
SIZES = {"pred": 1, "s8": 1, "u8": 1, "bf16": 2, "f16": 2, "s16": 2, "u16": 2, "f64": 8, "s64": 8, "u64": 8}
COLLECTIVES = ("all-reduce", "all-gather", "reduce-scatter", "collective-permute", "all-to-all")
# of libtpu 0.0.52, and of older ones
USED = re.compile(r"(?:\(|Used )([\d.]+)([KMGT])(?:\) exceeds available HBM \(| of )([\d.]+)([KMGT])", re.I)
UNITS = {"K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}
FEW = 32  # numbers in float64: scalars of a step, systems of two equations, a counter for each variable


class DoesNotFit(Exception):
    """The program needs more memory than the chip has: `needed` and `there`, bytes."""

    def __init__(self, needed, there):
        super().__init__(f"needs {needed / 1e9:.2f} GB of the chip's {there / 1e9:.2f} GB")
        self.needed, self.there = needed, there


@dataclasses.dataclass(frozen=True)
class Topology:
    """Chips that are only named.

    Attributes:
        name: As typed, such as `"v5e:4x4"`.
        devices: Of the compiler.
        machine: The `Machine` of a chip.
    """

    name: str
    devices: tuple
    machine: object


def topology(name):
    """The `Topology` of a name.

    Raises:
        ValueError: There is no such kind or size.
        ConnectionError: The compiler does not load, or another process holds it.
    """
    kind, _, size = name.partition(":")
    chips = re.fullmatch(r"\d+(x\d+){1,2}", size)
    if kind not in KINDS or not chips:
        examples = ", ".join(f"{kind}:{size}" for kind, (size, _) in KINDS.items())
        raise ValueError(f"`--topology` must be a kind and its chips, such as {examples}. Received: {name!r}")
    count, (smallest, machine) = math.prod(map(int, size.split("x"))), KINDS[kind]
    devices = _devices(name, f"{kind}:{smallest if count == 1 else size}")
    machines = {machine.name: machine for machine in MACHINES}
    return Topology(name, tuple(devices[:count]), machines[machine])


def without_a_tpu():
    """Tell libtpu and JAX, before they are imported, that no TPU is to be asked for anything."""
    os.environ.update(TPU_SKIP_MDS_QUERY="1", JAX_PLATFORMS="cpu", TPU_WORKER_HOSTNAMES="localhost")
    os.environ.setdefault("TPU_ACCELERATOR_TYPE", "v5litepod-4")


def _devices(asked, name):
    without_a_tpu()
    try:
        from jax.experimental import topologies
    except ImportError as error:
        raise ConnectionError(f'A TPU\'s compiler needs jax: `pip install ".[tpu-check]"`. {error}') from error
    try:
        return topologies.get_topology_desc(platform="tpu", topology_name=name).devices
    except Exception as error:
        raise said(error, asked) from error


def said(error, asked):
    """What a failure of the compiler to load means, as an exception with one clear message."""
    text = str(error)
    if "lockfile" in text or "in use" in text:
        return ConnectionError(
            "Another process holds the TPU's compiler (libtpu), which serves one at a time: wait for it, or remove "
            f"/tmp/libtpu_lockfile where none runs. {first_line(text)}"
        )
    if "libtpu" in text or "Unable to initialize backend" in text or "not found" in text.lower():
        return ConnectionError(
            f'A TPU\'s compiler does not load: `pip install ".[tpu-check]"`. {type(error).__name__}: {first_line(text)}'
        )
    return ValueError(f"`--topology` {asked} is none that the compiler knows: {first_line(text)}")


def first_line(text):
    """The first line, shortened."""
    return (text.strip().splitlines() or [""])[0][:300]


@dataclasses.dataclass(frozen=True)
class Compiled:
    """What the compiler says of a program, on one chip.

    Attributes:
        arguments, results, temporaries: Bytes of memory; `aliased` of the results take the place of arguments.
        flops: Floating-point operations.
        moved: Bytes that go between memory and processor.
        collectives: `[(kind, bytes)]` in the compiled program, those of loops and conditions once.
        seconds: That compiling took.
    """

    arguments: int
    results: int
    aliased: int
    temporaries: int
    flops: float
    moved: float
    collectives: list
    seconds: float

    @property
    def memory(self):
        """Bytes at once."""
        return self.arguments + self.results - self.aliased + self.temporaries

    @property
    def reduced(self):
        """Bytes in the all-reduces."""
        return sum(size for kind, size in self.collectives if kind == "all-reduce")

    def times(self, machine, replicas):
        """`{bound: seconds}` of a step by each of the machine's limits."""
        ring = 2 * (replicas - 1) / replicas * self.reduced
        return {
            "arithmetic": self.flops / machine.peak, "memory": self.moved / machine.memory_bandwidth,
            "network": ring / machine.bandwidth,
        }  # fmt: skip


def compiled(text, devices):
    """The `Compiled` of a program in the text of MLIR, with a replica on each device.

    Raises:
        DoesNotFit: The chip's memory is too small.
    """
    began = time.perf_counter()
    try:
        program = load(text, devices)
    except Exception as error:
        too_large = out_of_memory(str(error))
        if too_large is None:
            raise
        raise too_large from error
    memory, costs = program.get_compiled_memory_stats(), program.cost_analysis()
    costs = costs[0] if isinstance(costs, list) else costs
    return Compiled(
        memory.argument_size_in_bytes, memory.output_size_in_bytes, memory.alias_size_in_bytes,
        memory.temp_size_in_bytes, costs.get("flops", 0.0), costs.get("bytes accessed", 0.0),
        collectives_in(program.hlo_modules()[0].to_string()), time.perf_counter() - began,
    )  # fmt: skip


def out_of_memory(text):
    """The `DoesNotFit` of a compiler's message, or `None` if it says something else."""
    found = USED.search(text)
    if found is None:
        return None
    used, unit, there, unit_there = found.groups()
    return DoesNotFit(float(used) * UNITS[unit], float(there) * UNITS[unit_there])


def load(text, devices, client=None):
    """The executable of a program on these devices, with a replica on each."""
    from jax._src import compiler
    from jax._src.interpreters import mlir
    from jax._src.lib import xla_client
    from jaxlib.mlir import ir

    options = compiler.get_compile_options(
        num_replicas=len(devices), num_partitions=1,
        device_assignment=np.array([[device.id] for device in devices]) if client else np.arange(len(devices))[:, None],
    )  # fmt: skip
    with mlir.make_ir_context():
        module = ir.Module.parse(text)
        _without_copies(module, ir)
        where = xla_client.DeviceList(tuple(devices))
        if client is not None:
            return client.compile_and_load(module, where, options)
        return devices[0].client.compile(module, executable_devices=where, compile_options=options)


def _without_copies(module, ir):
    """Drop `mhlo.copy`, an identity that TensorFlow's compiler puts in and JAX's does not read."""
    copies = []

    def note(op):
        if op.name == "mhlo.copy":
            copies.append(op)
        return ir.WalkResult.ADVANCE

    module.operation.walk(note)
    for op in copies:
        op.results[0].replace_all_uses_with(op.operands[0])
        op.operation.erase()


def collectives_in(hlo):
    """`[(kind, bytes of its results)]` in a compiled program's text."""
    found = []
    for line in hlo.splitlines():
        match = re.search(r" = (.*?) (" + "|".join(COLLECTIVES) + r")(-start)?\(", line)
        if match:
            sizes = re.findall(r"\b([a-z]+\d*)\[([\d,]*)\]", match.group(1))
            total = sum(SIZES.get(kind, 4) * math.prod(map(int, filter(None, dims.split(",")))) for kind, dims in sizes)
            found.append((match.group(2), total))
    return found


def foreign(text):
    """What does not belong on a TPU: float64 in more than a few numbers, calls of the host, shapes by values."""
    doubles = [dims for dims in re.findall(r"tensor<((?:\d+x)*)f64>", text) if math.prod(_dims(dims)) > FEW]
    host = re.findall(r"custom_call @(xla_python\w*|xla_ffi_python\w*|\w*[Cc]allback\w*)", text)
    host += re.findall(r"stablehlo\.(send|recv|infeed|outfeed)\b", text)
    return {
        "float64": sorted({f"{dims}f64" for dims in doubles}), "host": sorted(set(host)),
        "dynamic": sorted(set(re.findall(r"tensor<[^>]*\?[^>]*>", text))),
    }  # fmt: skip


def _dims(dims):
    return [int(n) for n in dims.split("x") if n]
