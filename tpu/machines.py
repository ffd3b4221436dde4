"""Accelerators by their data sheets."""

import dataclasses


@dataclasses.dataclass(frozen=True)
class Machine:
    """What one replica runs on, in a cluster of its kind: public data sheets, and a latency that is a guess.

    Attributes:
        name: What it is called.
        peak: Operations per second in bfloat16, dense.
        memory: Bytes.
        memory_bandwidth: Bytes per second between memory and processor.
        bandwidth: Bytes per second that one accelerator can send in an all-reduce.
        latency: Seconds for one hop of a small message, software included.
    """

    name: str
    peak: float
    memory: float
    memory_bandwidth: float
    bandwidth: float
    latency: float


MACHINES = [
    # Google's documents of v3 and v4: peak, memory, and the all-reduce bandwidth of a pod over its chips, 340 TB/s over
    # 1024 and 1.1 PB/s over 4096. A replica of a v3 is a core, and a chip has two; from v4 on, it is a chip
    Machine("TPU v3 core", 61.5e12, 16 * 2**30, 450e9, 340e12 / 2048, 1e-6),
    Machine("TPU v4", 275e12, 32 * 2**30, 1228e9, 1.1e15 / 4096, 1e-6),
    # ... of v5e, v5p and v6e: 200, 1200 and 448 GB/s between chips, both directions together
    Machine("TPU v5e", 197e12, 16 * 2**30, 819e9, 100e9, 1e-6),
    Machine("TPU v5p", 459e12, 95 * 2**30, 2765e9, 600e9, 1e-6),
    Machine("TPU v6e", 918e12, 32 * 2**30, 1640e9, 224e9, 1e-6),
    # NVIDIA's of A100 80 GB and H100 SXM, in boxes of eight with 200 and 400 Gbit/s to the network per GPU: an
    # all-reduce that sums inside the box first sends an eighth through each, so eight of them serve every GPU
    Machine("A100", 312e12, 80e9, 2039e9, 8 * 25e9, 5e-6),
    Machine("H100", 989e12, 80e9, 3350e9, 8 * 50e9, 5e-6),
]
