"""The ImageNet recipe of `tpu/`: its data, and the strategies that it runs under."""

import json
import pathlib
import threading
import types

import keras
import made_up_tpu
import numpy as np
import pytest
import tensorflow as tf
import tpu_folder  # noqa: F401
from selection import some

import keras_curvature as kc

import data  # isort: skip
import generated  # isort: skip
import models  # isort: skip
import strategy as strategies  # isort: skip


def imagenet(data_dir, **options):
    """Tiny images of it."""
    return data.ImageNet(data_dir, **{"image_size": 16, "per_replica_batch": 4, "shuffle_buffer": 20, **options})


def batches(dataset, count):
    """The first elements, as numpy."""
    return [[np.asarray(part) for part in element] for element, _ in zip(dataset, range(count))]


def context(pipelines, index):
    """What a strategy tells an input pipeline about itself."""
    return tf.distribute.InputContext(pipelines, index, pipelines)


# Data.


def test_the_real_loader_reads_the_generated_dataset(data_dir):
    images = imagenet(data_dir)
    assert images.sizes == {"train": 48, "validation": 11}
    assert images.classes == 1000
    files = {path.name for path in pathlib.Path(data_dir, "imagenet2012", "5.1.0").iterdir()}
    assert "imagenet2012-train.tfrecord-00003-of-00004" in files
    with pytest.raises(FileExistsError, match="is not overwritten"):
        generated.write(data_dir)


def test_every_epoch_is_all_images_in_another_order(data_dir):
    records = imagenet(data_dir).records(48, epoch=0, skip=0).take(96)
    epochs, indices, jpegs, _ = zip(*[[part.numpy() for part in record] for record in records])
    assert list(epochs) == [0] * 48 + [1] * 48
    assert list(indices) == list(range(48)) * 2
    assert set(jpegs[:48]) == set(jpegs[48:])
    assert len(set(jpegs)) == 48
    assert jpegs[:48] != jpegs[48:]


def test_a_stream_goes_on_exactly_where_it_was(data_dir):
    strategy = tf.distribute.get_strategy()
    whole = batches(imagenet(data_dir).training(strategy, 8), 15)  # six steps per epoch
    keras.utils.set_random_seed(5)  # nothing else has a say
    for epoch, step in ((0, 4), (1, 0), (1, 5)):
        rest = batches(imagenet(data_dir).training(strategy, 8, epoch, step), 3)
        for one, two in zip(whole[6 * epoch + step :], rest):
            assert all(np.array_equal(a, b) for a, b in zip(one, two))
    other = batches(imagenet(data_dir, seed=1).training(strategy, 8), 1)
    assert not np.array_equal(other[0][0], whole[0][0])
    x, y = whole[0]
    assert x.shape == (8, 16, 16, 3)
    assert x.dtype == "uint8"
    assert y.shape == (8, 1000)
    assert (y.sum(axis=1) == 1).all()
    keras.utils.set_random_seed(0)


def test_workers_read_shares_of_their_own(data_dir):
    images, seen = imagenet(data_dir), []
    for index in range(5):  # 48 images do not divide by five; 9 each
        jpegs = [jpeg.numpy() for _, _, jpeg, _ in images.records(9, 0, 0, context(5, index)).take(18)]
        assert set(jpegs[:9]) == set(jpegs[9:])
        seen += jpegs[:9]
    assert len(set(seen)) == 45


def test_the_evaluation_counts_every_image_once(data_dir):
    class Workers:
        """Three workers with two replicas each."""

        num_replicas_in_sync = 6

        def distribute_datasets_from_function(self, pipeline):
            return [pipeline(context(3, index)) for index in range(3)]

    images = imagenet(data_dir, per_replica_batch=1)
    # 11 images are 4 + 4 + 3: two batches on each of a worker's two replicas
    assert images.evaluation_steps(Workers(), 3) == 2
    workers = [batches(worker, 8) for worker in images.evaluation(Workers())]
    for worker in workers:  # then from the beginning
        assert all(np.array_equal(a, b) for one, two in zip(worker, worker[4:]) for a, b in zip(one, two))
    elements = [element for worker in workers for element in worker[:4]]
    assert sum(float(w[0]) for _, _, w in elements) == 11
    assert all(x.shape == (1, 16, 16, 3) for x, _, _ in elements)
    assert [float(w[0]) for x, y, w in elements if not np.any(y)] == [0.0]


def test_padding_does_not_count_in_the_metrics(data_dir):
    images = imagenet(data_dir)
    model = models.build("resnet_small", 16)
    metric = keras.metrics.CategoricalCrossentropy("ce", from_logits=True)
    model.compile(loss=keras.losses.CategoricalCrossentropy(from_logits=True), weighted_metrics=[metric])
    strategy = tf.distribute.get_strategy()
    steps = images.evaluation_steps(strategy)
    found = model.evaluate(images.evaluation(strategy), steps=steps, verbose=0, return_dict=True)["ce"]
    elements = batches(images.evaluation(strategy), steps)
    x, y = (np.concatenate([e[i] for e in elements])[:11] for i in (0, 1))
    expected = keras.losses.categorical_crossentropy(y, model.predict(x, verbose=0), from_logits=True)
    assert found == pytest.approx(float(np.mean(expected)), rel=1e-5)


def test_augmentation_is_that_of_inception():
    image = np.zeros((80, 120, 3), "uint8")
    # the colour of a pixel says where it is
    image[..., 0], image[..., 1] = np.arange(80)[:, None] * 3, np.arange(120)[None] * 2
    jpeg = tf.io.encode_jpeg(image, quality=100)
    flips, areas = 0, []
    for seed in range(60):
        x = data.augmented(jpeg, 24, tf.constant([0, seed]), "none").numpy().astype(float)
        height, width = (x[-1, :, 0] - x[0, :, 0]).mean() / 3, (x[:, -1, 1] - x[:, 0, 1]).mean() / 2
        flips += width < 0
        scale = 24 / 23  # from the middle of the first pixel to that of the last
        areas.append(height * abs(width) * scale**2 / (80 * 120))
        assert 0.6 < abs(width) / height < 1.6
    assert 15 < flips < 45
    assert 0.05 < min(areas) < 0.3
    assert 0.75 < max(areas) < 1.05
    same = [data.augmented(jpeg, 24, tf.constant([0, 1]), color).numpy() for color in ("fast", "fast", "full", "none")]
    np.testing.assert_array_equal(same[0], same[1])
    assert not np.array_equal(same[0], same[3])
    assert not np.array_equal(same[0], same[2])


def test_the_central_crop_is_seven_eighths():
    image = np.zeros((160, 80, 3), "uint8")
    image[..., 0], image[..., 1] = np.arange(160)[:, None], 3 * np.arange(80)[None]
    x = data.central(tf.io.encode_jpeg(image, quality=100), 70).numpy().astype(float)
    assert x.shape == (70, 70, 3)
    np.testing.assert_allclose(x[[0, -1], :, 0].mean(axis=1), [45, 114], atol=3)  # rows 45..114 of 160
    np.testing.assert_allclose(x[:, [0, -1], 1].mean(axis=0) / 3, [5, 74], atol=2)  # columns 5..74 of 80


# Strategies.


@pytest.fixture
def recorded(monkeypatch):
    """The TPU's functions replaced by doubles that note how they are called."""
    calls = []

    def double(name, result=None):
        def record(*args, **kwargs):
            calls.append((name, args, kwargs))
            return result

        return record

    resolver, strategy = object(), object()
    monkeypatch.setattr(tf.distribute.cluster_resolver, "TPUClusterResolver", double("resolver", resolver))
    monkeypatch.setattr(tf.config, "experimental_connect_to_cluster", double("connect"))
    monkeypatch.setattr(tf.tpu.experimental, "initialize_tpu_system", double("initialize"))
    monkeypatch.setattr(tf.distribute, "TPUStrategy", double("strategy", strategy))
    for name in ("TPU_NAME", "TF_CONFIG"):
        monkeypatch.delenv(name, raising=False)
    return types.SimpleNamespace(calls=calls, resolver=resolver, strategy=strategy)


@pytest.mark.parametrize(("kind", "tpu", "name"), [("tpu", "pod", None), ("auto", "pod", None), ("auto", None, "pod")])
def test_a_tpu_is_resolved_connected_initialized(recorded, monkeypatch, kind, tpu, name):
    if name:
        monkeypatch.setenv("TPU_NAME", name)
    assert strategies.make(kind, tpu) is recorded.strategy
    assert recorded.calls == [
        ("resolver", (), {"tpu": "pod"}),
        ("connect", (recorded.resolver,), {}),
        ("initialize", (recorded.resolver,), {}),
        ("strategy", (recorded.resolver,), {}),
    ]


def test_a_tpu_that_does_not_answer_is_given_up(recorded, monkeypatch):
    for_ever = threading.Event()
    monkeypatch.setattr(tf.config, "experimental_connect_to_cluster", lambda resolver: for_ever.wait())
    with pytest.raises(ConnectionError, match=r"`--tpu pod` has not answered within 0.2 seconds. Is it running"):
        strategies.make("tpu", "pod", timeout=0.2)
    for_ever.set()
    assert "strategy" not in [name for name, _, _ in recorded.calls]


def test_a_tpu_that_refuses_says_why(recorded, monkeypatch):
    def refuse(resolver):
        raise tf.errors.NotFoundError(None, None, "No TPU devices were found")

    monkeypatch.setattr(tf.tpu.experimental, "initialize_tpu_system", refuse)
    with pytest.raises(ConnectionError, match="`--tpu pod` cannot be used: NotFoundError: No TPU devices"):
        strategies.make("tpu", "pod")


def test_strategies_by_the_environment(recorded, monkeypatch):
    assert strategies.found(None) == "none"
    assert type(strategies.make("auto")) is type(tf.distribute.get_strategy())
    one = {"cluster": {"worker": ["a:1"]}, "task": {"type": "worker", "index": 0}}
    two = {"cluster": {"chief": ["a:1"], "worker": ["b:1", "c:1"], "evaluator": ["d:1"]}}
    for config, expected in ((one, "none"), (two, "multiworker")):
        monkeypatch.setenv("TF_CONFIG", json.dumps(config))
        assert strategies.found(None) == expected
    assert strategies.workers() == 3
    assert strategies.found("pod") == "tpu"
    monkeypatch.delenv("TF_CONFIG")
    monkeypatch.setattr(tf.config, "list_logical_devices", lambda kind: ["a", "b"] if kind == "GPU" else [])
    assert strategies.found(None) == "mirrored"


@pytest.mark.parametrize(
    ("kind", "message"),
    [("tpu", "needs the TPU's name: give `--tpu NAME`"), ("multiworker", "needs TF_CONFIG"), ("pod", "Received: 'pod")],
)
def test_strategies_that_cannot_be(recorded, kind, message):
    with pytest.raises(ValueError, match=message):
        strategies.make(kind)


def test_a_tpu_that_this_machine_has_is_found_without_a_name(recorded, monkeypatch, tmp_path):
    """By its devices: TensorFlow knows of a TPU only when it is told where to look."""
    dev, pci = tmp_path / "dev", tmp_path / "pci"
    (dev / "vfio").mkdir(parents=True)
    assert strategies.chips(str(dev), str(pci)) == []
    (dev / "vfio" / "0").touch()
    for number, vendor in enumerate(("0x10de", "0x1ae0")):
        (pci / str(number)).mkdir(parents=True)
        (pci / str(number) / "vendor").write_text(vendor + "\n")
        assert len(strategies.chips(str(dev), str(pci))) == number
    (dev / "accel0").touch()
    assert strategies.chips(str(dev), str(pci)) == [str(dev / "accel0")]
    monkeypatch.setattr(strategies, "chips", lambda: ["/dev/accel0"])
    for kind in ("auto", "tpu"):
        recorded.calls.clear()
        assert strategies.make(kind) is recorded.strategy
        assert ("resolver", (), {"tpu": "local"}) in recorded.calls
    assert type(strategies.make("none")) is type(tf.distribute.get_strategy())


def test_the_devices_are_said_and_a_bare_cpu_is_warned_of():
    assert strategies.devices(tf.distribute.get_strategy()) == (
        "1 CPU; no TPU and no GPU was found: ImageNet would take years here"
    )
    assert strategies.devices(made_up_tpu.strategy(8)) == "8 TPU"


@pytest.mark.parametrize("text", ["{", "[]", "5", '{"cluster": 3}', '{"cluster": {"worker": 2}}'])
def test_a_broken_cluster_is_said(monkeypatch, text):
    monkeypatch.delenv("TPU_NAME", raising=False)
    monkeypatch.setenv("TF_CONFIG", text)
    with pytest.raises(ValueError, match="TF_CONFIG is not .*host0:2222.*Received: "):
        strategies.make("auto")


# On a TPU.


@pytest.mark.parametrize(("passes", "at_once"), some([(1, 2), (2, 2)], [(2, 2)]))
def test_a_run_traces_on_a_tpu(data_dir, passes, at_once):
    """Several steps per execution, also with several passes: batches of known size, training and evaluation alike."""
    tpu, images = made_up_tpu.strategy(2), imagenet(data_dir)
    with tpu.scope():
        model = kc.curved(models.build("resnet_small", 16), passes)
        metrics = [keras.metrics.CategoricalAccuracy("top_1")]
        loss = keras.losses.CategoricalCrossentropy(from_logits=True)
        model.compile(kc.Neumann(), loss, weighted_metrics=metrics, steps_per_execution=at_once)
    batch = 8 * passes
    found = made_up_tpu.program(
        model, "fit", images.training(tpu, batch), steps_per_epoch=images.steps_per_epoch(batch), shuffle=False
    )
    assert (found.traces, found.hosts, found.unknown, found.doubles) == (1, [], [], [])
    assert found.sums == len(model.trainable_variables) + 1
    evaluation = {"x": images.evaluation(tpu, at_once), "steps": images.evaluation_steps(tpu, 1, at_once)}
    found = made_up_tpu.program(model, "evaluate", **evaluation)
    assert (found.traces, found.hosts, found.unknown, found.doubles, found.sums) == (1, [], [], [], 0)


def test_an_evaluation_is_whole_executions_and_counts_every_image_once(data_dir):
    images, strategy = imagenet(data_dir, evaluation_batch=2), tf.distribute.get_strategy()
    for at_once, steps in ((1, 6), (4, 8), (5, 10)):
        assert images.evaluation_steps(strategy, 1, at_once) == steps
        elements = batches(images.evaluation(strategy, at_once), steps)
        assert all(x.shape == (2, 16, 16, 3) for x, _, _ in elements)
        assert sum(float(w.sum()) for _, _, w in elements) == 11
