"""The ImageNet recipe of `tpu/`: its data, strategies, presets, refusals; the whole of it in `-m slow`."""

import json
import pathlib
import subprocess
import sys
import threading
import types

import keras
import numpy as np
import pytest
import tensorflow as tf

import keras_curvature as kc

TPU = pathlib.Path(__file__).parent.parent / "tpu"
sys.path.insert(0, str(TPU))

import data  # noqa: E402
import dry_run  # noqa: E402
import generated  # noqa: E402
import models  # noqa: E402
import presets  # noqa: E402
import schedule  # noqa: E402
import strategy as strategies  # noqa: E402
import train  # noqa: E402


@pytest.fixture(scope="module")
def data_dir(tmp_path_factory):
    """A generated dataset in four files."""
    folder = tmp_path_factory.mktemp("tfds")
    generated.write(folder, train=48, validation=11, sides=(40, 90))
    return str(folder)


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


# Presets, schedules, models.


def test_presets_are_the_papers_tables():
    published = {name: recipe.published for name, recipe in presets.PRESETS.items()}
    assert published == {
        "paper/resnet50-b1600": 23.0, "paper/resnet50-b4000": 23.0, "paper/resnet50-b8000": 23.1,
        "paper/resnet50-b16000": 23.5, "paper/resnet50-b32000": 24.0,
        "paper/inception_v3": 20.8, "paper/inception_v3-baseline": 21.7,
        "paper/resnet50": 23.0, "paper/resnet50-baseline": 23.9,
        "paper/resnet101": 21.7, "paper/resnet101-baseline": 22.6,
        "paper/inception_resnet_v2": 19.5, "paper/inception_resnet_v2-baseline": 20.3,
    }  # fmt: skip
    # updates as the paper counts them, in thousands
    for batch, updates in {1600: 181, 4000: 73.6, 8000: 41.3, 16000: 16.8, 32000: 9.5}.items():
        recipe = presets.get(f"paper/resnet50-b{batch}")
        assert recipe.epochs * 1_281_167 / batch / 1000 == pytest.approx(updates, rel=0.005)
    assert all(name in presets.table() for name in presets.PRESETS)
    assert "24.0%" in train.arguments([])[1].format_help()


def test_the_command_line_overrides_a_preset():
    args, _ = train.arguments(["--preset", "paper/resnet50-b32000", "--epochs", "90", "--weight_decay", "0"])
    recipe = train.recipe_of(args)
    assert (recipe.batch_size, recipe.epochs, recipe.weight_decay, recipe.published) == (32000, 90, 0.0, 24.0)
    assert train.recipe_of(train.arguments(["--model", "resnet101"])[0]).model == "resnet101"


def rates(recipe, steps_per_epoch, *epochs):
    """The learning rate at the beginning of epochs."""
    of = train.schedule_of(recipe, steps_per_epoch)
    return [float(of(round(epoch * steps_per_epoch))) for epoch in epochs]


def test_schedules_are_the_papers():
    recipe = presets.get("paper/resnet50-b4000")
    peak = 0.1 * 4000 / 256
    found = rates(recipe, 320, 0, 2.5, 5, 39.9, 40, 80)
    np.testing.assert_allclose(found, [0.1, (0.1 + peak) / 2, peak, peak, 0.3 * peak, 0.09 * peak], rtol=1e-5)
    baseline = presets.get("paper/resnet50-baseline")
    np.testing.assert_allclose(rates(baseline, 800, 0, 1.9, 2, 20), [0.045, 0.045, 0.0423, 0.045 * 0.94**10], rtol=1e-5)
    of = train.schedule_of(recipe, 320)
    again = keras.saving.deserialize_keras_object(keras.saving.serialize_keras_object(of))
    assert isinstance(again, schedule.RampThenStairs)
    assert again.get_config() == of.get_config()


def test_optimizers_have_the_papers_settings():
    recipe = presets.get("paper/resnet50-b8000")
    made = {name: train.optimizer_of(presets.Recipe(optimizer=name, batch_size=8000), 160) for name in train.OPTIMIZERS}
    neumann = train.optimizer_of(recipe, 160)
    assert (neumann.warmup_steps, neumann.reset_every, neumann.reset_growth) == (800, 1600, 2)
    assert (neumann.alpha, neumann.beta, neumann.gamma, neumann.mu_end) == (1e-7, 1e-5, 0.99, 0.9)
    assert (made["sgd"].momentum, made["sgd"].nesterov) == (0.9, False)
    assert (made["rmsprop"].rho, made["rmsprop"].momentum, made["rmsprop"].epsilon) == (0.9, 0.9, 1.0)
    assert made["adam"].epsilon == 0.01
    assert made["lamb"].weight_decay == 1e-4
    assert made["sgd"].weight_decay is None  # part of the loss
    assert isinstance(made["curveball"], kc.CurveBall)
    assert isinstance(made["hessian_free"], kc.HessianFree)


def test_kernels_decay_and_nothing_else():
    plain, decaying = (models.build("resnet_small", 32, 10, decay) for decay in (0.0, 0.5))
    decaying.set_weights(plain.get_weights())
    expected = 0.25 * sum(float(tf.reduce_sum(w**2)) for w in plain.trainable_variables if w.name == "kernel")
    assert sum(map(float, decaying.losses)) == pytest.approx(expected, rel=1e-5)
    assert plain.losses == []


def test_the_papers_networks_have_their_sizes():
    # of the networks themselves; only the smallest is built here
    model = models.build("resnet50", 224)
    assert sum(int(np.prod(w.shape)) for w in model.trainable_variables) == 25_583_592
    assert model.input_shape == (None, 224, 224, 3)
    assert model.output_shape == (None, 1000)
    assert {name: models.image_size(name) for name in models.MODELS} == {
        "resnet50": 224, "resnet101": 224, "inception_v3": 299, "inception_resnet_v2": 299
    }  # fmt: skip
    with pytest.raises(ValueError, match="`--model` must be one of resnet50"):
        models.build("resnet18", 224)


# Refusals, before anything starts.


def refused(capsys, *argv):
    """What the program says before it gives up."""
    with pytest.raises(SystemExit) as stop:
        train.main(list(argv))
    assert stop.value.code == 2
    return capsys.readouterr().err


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--model", "resnet18"], "`--model` must be one of resnet50, resnet101, inception_v3, inception_resnet_v2"),
        (["--optimizer", "sophia"], "`--optimizer` must be one of neumann, sgd"),
        (["--preset", "paper/vgg"], "`--preset` must be one of paper/resnet50-b1600"),
        (["--batch_size", "100"], "cannot be cut into whole passes of `--per_replica_batch` 32 on 1 replicas"),
        (["--batch_size", "100"], "`--per_replica_batch 25` divides it"),
        (["--batch_size", "64"], "`--batch_size`: 64 is more than the 48 images"),
        (["--strategy", "cluster"], "`--strategy` must be one of auto, tpu"),
        (["--strategy", "tpu"], "needs the TPU's name"),
    ],
)
def test_what_cannot_be_is_refused(capsys, tmp_path, monkeypatch, data_dir, options, message):
    monkeypatch.delenv("TPU_NAME", raising=False)
    run_dir = tmp_path / "run"
    assert message in refused(capsys, "--data_dir", data_dir, "--run_dir", str(run_dir), *options)
    assert not run_dir.exists()


def test_a_directory_without_the_dataset_is_refused(capsys, tmp_path):
    said = refused(capsys, "--data_dir", str(tmp_path), "--run_dir", str(tmp_path / "run"), "--batch_size", "32")
    assert f"no imagenet2012 in '{tmp_path}'" in said
    assert "tfds build imagenet2012" in said
    assert list(tmp_path.iterdir()) == []
    assert "`--run_dir` is needed" in refused(capsys, "--data_dir", str(tmp_path))


def test_a_folder_of_something_else_is_left_alone(capsys, tmp_path, data_dir):
    options = ["--data_dir", data_dir, "--run_dir", str(tmp_path), "--batch_size", "32", "--model", "resnet_small"]
    (tmp_path / "thesis.tex").write_text("mine")
    assert "is not empty and no run of this program" in refused(capsys, *options)
    with pytest.raises(SystemExit) as stop:
        train.main(["--dry_run", "--run_dir", str(tmp_path)])
    assert stop.value.code == 2
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.tex"]


def test_a_run_with_other_settings_is_left_alone(capsys, tmp_path, data_dir):
    run_dir, settings = str(tmp_path / "run"), {"optimizer": "neumann", "batch_size": 32, "seed": 0}
    train.claim(run_dir, settings, chief=False)
    assert not (tmp_path / "run").exists()
    train.claim(run_dir, settings, chief=True)
    train.claim(run_dir, settings, chief=True)
    with pytest.raises(ValueError, match="--optimizer neumann there, sgd here; --seed 0 there, 1 here"):
        train.claim(run_dir, {**settings, "optimizer": "sgd", "seed": 1}, chief=True)
    options = ["--data_dir", data_dir, "--run_dir", run_dir, "--batch_size", "16", "--per_replica_batch", "16"]
    assert "--batch_size 32 there, 16 here" in refused(capsys, *options)


# The program.


def test_the_program_trains_and_goes_on(capsys, tmp_path, data_dir):
    options = [
        "--model", "resnet_small", "--image_size", "32", "--batch_size", "12", "--per_replica_batch", "12", "--epochs",
        "1", "--warmup_epochs", "0", "--data_dir", data_dir, "--run_dir", str(tmp_path), "--log_every", "1",
    ]  # fmt: skip
    train.main(options)
    said = capsys.readouterr().out
    train.main([*options, "--epochs", "2"])
    more = capsys.readouterr().out
    assert "batch 12 = 1 replicas x 1 passes x 12 images; 4 steps per epoch, 1 epochs" in said
    assert "begins at step 0" in said
    assert "final: top-1 error " in said
    assert "resumed at step 4 (step 0 of epoch 2)" in more
    assert "step       5 " in more
    assert "step       4 " not in more
    tags = {}
    for file in sorted((tmp_path / "logs" / "train").glob("events*")):
        for event in tf.compat.v1.train.summary_iterator(str(file)):
            for value in event.summary.value:
                tags.setdefault(value.tag, []).append(event.step)
    assert tags["batch_loss"] == list(range(1, 9))
    assert tags["epoch_images_per_second"] == tags["epoch_top_1"] == [0, 1]
    assert keras.models.load_model(tmp_path / "model.keras", compile=False).output_shape == (None, 1000)


def state(run_dir):
    """All variables in a run's newest checkpoint."""
    reader = tf.train.load_checkpoint(tf.train.latest_checkpoint(run_dir / "checkpoints"))
    names = [name for name in reader.get_variable_to_shape_map() if "VARIABLE_VALUE" in name]
    return {name: reader.get_tensor(name) for name in names}


@pytest.mark.slow
def test_the_dry_run(tmp_path):
    run = subprocess.run(
        [sys.executable, str(TPU / "train.py"), "--dry_run", "--run_dir", str(tmp_path)], capture_output=True, text=True
    )
    assert run.returncode == 0, run.stdout[-3000:] + run.stderr[-2000:]
    for line in ("stopped by SIGTERM after", "resumed at step", "final: top-1 error", "passed"):
        assert line in run.stdout
    # and what is left is what a run that nobody stopped leaves, to the last bit
    whole = [*dry_run.OPTIONS, "--data_dir", str(tmp_path / "data"), "--run_dir", str(tmp_path / "whole")]
    _, code = dry_run.started(whole, tmp_path)
    assert code == 0
    one, two = state(tmp_path / "run"), state(tmp_path / "whole")
    assert set(one) == set(two)
    for name, value in one.items():
        np.testing.assert_array_equal(value, two[name], err_msg=name)
