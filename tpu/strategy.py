"""Where a program runs: one function makes the strategy for all of them.

Call it first: a TPU is initialized, and forgets what it held, and the processes of a cluster find each other.
"""

import collections
import glob
import json
import os
import queue
import threading

import tensorflow as tf

KINDS = ("auto", "tpu", "mirrored", "multiworker", "none")


def make(kind="auto", tpu=None, timeout=300):
    """The `tf.distribute.Strategy`.

    Args:
        kind: "tpu", "mirrored" (all GPUs of this machine, or its logical CPUs), "multiworker" (the cluster of
            `TF_CONFIG`), "none", or "auto": a TPU where one is named or this machine has its chips, several workers
            where `TF_CONFIG` has them, mirrored where there are several GPUs, else none. Defaults to "auto".
        tpu: Name, zone path or `grpc://` address of the TPU, or "local" on a Cloud TPU VM. By default `TPU_NAME`.
        timeout: Seconds after which a TPU that does not answer is given up. Defaults to `300`.

    Raises:
        ValueError: `kind` is none of these, or the environment does not go with it.
        ConnectionError: The TPU does not answer, or answers with an error.
    """
    tpu = tpu or os.environ.get("TPU_NAME")
    if kind not in KINDS:
        raise ValueError(f"`--strategy` must be one of {', '.join(KINDS)}. Received: {kind!r}")
    if kind in ("auto", "tpu") and not tpu and chips():
        tpu = "local"
    kind = found(tpu) if kind == "auto" else kind
    if kind == "tpu":
        return of_tpu(tpu, timeout)
    if kind == "multiworker":
        return of_workers()
    return of_devices() if kind == "mirrored" else tf.distribute.get_strategy()


def found(tpu):
    """What "auto" means here."""
    if tpu:
        return "tpu"
    if workers() > 1:
        return "multiworker"
    return "mirrored" if len(tf.config.list_logical_devices("GPU")) > 1 else "none"


def chips(dev="/dev", pci="/sys/bus/pci/devices"):
    """The TPU chips of this machine, paths; TensorFlow does not know them before it is told to look."""
    accelerators = sorted(glob.glob(os.path.join(dev, "accel[0-9]*")))
    if accelerators:
        return accelerators
    # newer ones are devices of a virtual machine's own, of Google's (0x1ae0) as the bus says
    vendors = glob.glob(os.path.join(pci, "*", "vendor"))
    return [path for path in sorted(glob.glob(os.path.join(dev, "vfio", "[0-9]*"))) if _one_is_googles(vendors)]


def _one_is_googles(vendors):
    for path in vendors:
        with open(path) as file:
            if file.read().strip() == "0x1ae0":
                return True
    return False


def on_tpu(strategy):
    """Whether the replicas are a TPU's."""
    return isinstance(strategy, (tf.distribute.TPUStrategy, tf.distribute.experimental.TPUStrategy))


def devices(strategy):
    """The devices of this process' replicas, in words; with a warning where a network of ImageNet will not get far."""
    if type(strategy) is type(tf.distribute.get_strategy()):
        names = [(tf.config.list_logical_devices("GPU") or tf.config.list_logical_devices("CPU"))[0].name]
    else:
        names = strategy.extended.worker_devices
    kinds = collections.Counter(name.split(":")[-2] for name in names)
    words = ", ".join(f"{count} {kind}" for kind, count in sorted(kinds.items()))
    return words if set(kinds) - {"CPU"} else f"{words}; no TPU and no GPU was found: ImageNet would take years here"


def workers():
    """Processes in the cluster of `TF_CONFIG`; 0 without one.

    Raises:
        ValueError: `TF_CONFIG` is not what TensorFlow reads.
    """
    text = os.environ.get("TF_CONFIG") or "{}"
    try:
        config = json.loads(text)
        cluster = config.get("cluster", {})
        return sum(len(cluster.get(job, [])) for job in ("chief", "worker"))
    except (json.JSONDecodeError, AttributeError, TypeError) as error:
        raise ValueError(f"TF_CONFIG is not {TF_CONFIG}: {error}. Received: {text}") from error


TF_CONFIG = '{"cluster": {"worker": ["host0:2222", "host1:2222"]}, "task": {"type": "worker", "index": 0}}'


def of_tpu(tpu, timeout):
    """`TPUStrategy`, once the TPU has answered."""
    if not tpu:
        raise ValueError(
            "`--strategy tpu` needs the TPU's name: give `--tpu NAME` (`--tpu local` on a TPU VM) or set TPU_NAME."
        )

    def connect():
        resolver = tf.distribute.cluster_resolver.TPUClusterResolver(tpu=tpu)
        tf.config.experimental_connect_to_cluster(resolver)
        tf.tpu.experimental.initialize_tpu_system(resolver)
        return resolver

    return tf.distribute.TPUStrategy(_in_time(connect, tpu, timeout))


def _in_time(connect, tpu, timeout):
    """What `connect` returns; TensorFlow itself would wait for hours."""
    answers = queue.SimpleQueue()

    def ask():
        try:
            answers.put((connect(), None))
        except Exception as error:  # raised again where somebody waits for it
            answers.put((None, error))

    threading.Thread(target=ask, daemon=True).start()  # a daemon: at its end the program does not wait for it
    try:
        answer, error = answers.get(timeout=timeout)
    except queue.Empty:
        raise ConnectionError(
            f"`--tpu {tpu}` has not answered within {timeout} seconds. Is it running (`gcloud compute tpus tpu-vm list "
            "--zone ZONE`), in this project, and reachable from this network? `--tpu_timeout` waits longer."
        ) from None
    if error is not None:
        raise ConnectionError(f"`--tpu {tpu}` cannot be used: {type(error).__name__}: {error}") from error
    return answer


def of_workers():
    """`MultiWorkerMirroredStrategy`, by NCCL where the workers have GPUs."""
    if workers() < 1:
        raise ValueError(
            f"`--strategy multiworker` needs TF_CONFIG, in every process with another `index`: '{TF_CONFIG}'"
        )
    by = tf.distribute.experimental.CommunicationImplementation
    how = by.NCCL if tf.config.list_physical_devices("GPU") else by.RING
    options = tf.distribute.experimental.CommunicationOptions(implementation=how)
    return tf.distribute.MultiWorkerMirroredStrategy(communication_options=options)


def of_devices():
    """`MirroredStrategy` over all GPUs, or over the logical CPUs where there is none."""
    gpus = tf.config.list_logical_devices("GPU")
    return tf.distribute.MirroredStrategy([device.name for device in gpus or tf.config.list_logical_devices("CPU")])


def several_processes(strategy):
    """Whether other processes run this program too; the hosts of a TPU do not."""
    return isinstance(strategy, tf.distribute.MultiWorkerMirroredStrategy) and workers() > 1


def pipelines(strategy):
    """Input pipelines, in this process and others: one per worker, or per host of a TPU."""
    if several_processes(strategy):
        return workers()
    return getattr(strategy.extended, "num_hosts", 1)
