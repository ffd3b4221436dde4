"""The recipes of `tpu/`: presets, schedules, optimizers, networks."""

import keras
import numpy as np
import pytest
import tensorflow as tf
import tpu_folder  # noqa: F401

import keras_curvature as kc

import making  # isort: skip
import models  # isort: skip
import options  # isort: skip
import presets  # isort: skip
import schedule  # isort: skip
from lars import LARS  # isort: skip


def test_presets_are_the_papers_tables():
    published = {name: recipe.published for name, recipe in presets.PRESETS.items() if recipe.published}
    assert published == {
        "paper/resnet50-b1600": 23.0, "paper/resnet50-b4000": 23.0, "paper/resnet50-b8000": 23.1,
        "paper/resnet50-b16000": 23.5, "paper/resnet50-b32000": 24.0,
        "paper/inception_v3": 20.8, "paper/resnet50": 23.0, "paper/resnet101": 21.7, "paper/inception_resnet_v2": 19.5,
    }  # fmt: skip
    # updates as the paper counts them, in thousands
    for batch, updates in {1600: 181, 4000: 73.6, 8000: 41.3, 16000: 16.8, 32000: 9.5}.items():
        recipe = presets.get(f"paper/resnet50-b{batch}")
        assert recipe.epochs * 1_281_167 / batch / 1000 == pytest.approx(updates, rel=0.005)
    assert all(name in presets.table() for name in presets.PRESETS)
    assert "24.0%" in options.arguments([])[1].format_help()


def test_the_command_line_overrides_a_preset():
    args, _ = options.arguments(["--preset", "paper/resnet50-b32000", "--epochs", "90", "--weight_decay", "0"])
    recipe = options.recipe_of(args)
    assert (recipe.batch_size, recipe.epochs, recipe.weight_decay) == (32000, 90, 0.0)
    assert recipe.published is None  # another protocol than the paper's
    same, _ = options.arguments(["--preset", "paper/resnet50-b32000", "--epochs", "237"])
    assert options.recipe_of(same).published == 24.0
    assert options.recipe_of(options.arguments(["--model", "resnet101"])[0]).model == "resnet101"


def rates(recipe, steps_per_epoch, *epochs):
    """The learning rate at the beginning of epochs."""
    of = making.schedule_of(recipe, steps_per_epoch)
    return [float(of(round(epoch * steps_per_epoch))) for epoch in epochs]


def test_schedules_are_the_papers():
    recipe = presets.get("paper/resnet50-b4000")
    peak = 0.1 * 4000 / 256
    found = rates(recipe, 320, 0, 2.5, 5, 39.9, 40, 80)
    np.testing.assert_allclose(found, [0.1, (0.1 + peak) / 2, peak, peak, 0.3 * peak, 0.09 * peak], rtol=1e-5)
    baseline = presets.get("paper/resnet50-baseline")
    # synchronous: the whole batch's rate, by the rule of Neumann, and not that of 32 images
    peak = 0.1 * 1600 / 256
    np.testing.assert_allclose(rates(baseline, 800, 0, 5, 20), [0.1, peak * 0.94**2, peak * 0.94**10], rtol=1e-5)
    of = making.schedule_of(recipe, 320)
    again = keras.saving.deserialize_keras_object(keras.saving.serialize_keras_object(of))
    assert isinstance(again, schedule.RampThenStairs)
    assert again.get_config() == of.get_config()


def test_optimizers_have_the_papers_settings():
    recipe = presets.get("paper/resnet50-b8000")
    recipes = {name: presets.Recipe(optimizer=name, batch_size=8000) for name in making.OPTIMIZERS}
    made = {name: making.optimizer_of(recipe, 160) for name, recipe in recipes.items()}
    neumann = making.optimizer_of(recipe, 160)
    assert (neumann.warmup_steps, neumann.reset_every, neumann.reset_growth) == (800, 1600, 2)
    assert (neumann.alpha, neumann.beta, neumann.gamma, neumann.mu_end) == (1e-7, 1e-5, 0.99, 0.9)
    assert (made["sgd"].momentum, made["sgd"].nesterov) == (0.9, False)
    assert (made["rmsprop"].rho, made["rmsprop"].momentum, made["rmsprop"].epsilon) == (0.9, 0.9, 1.0)
    assert (made["adam"].weight_decay, made["lamb"].weight_decay, made["lars"].decay) == (1e-4, 1e-4, 1e-4)
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


def test_rates_of_adam_and_lamb_go_by_the_square_root_of_the_batch():
    peaks = {
        (name, batch): making.schedule_of(presets.Recipe(optimizer=name, batch_size=batch), 100).peak
        for name in ("adam", "lamb", "sgd", "neumann") for batch in (1024, 4096)
    }  # fmt: skip
    for name in ("adam", "lamb", "sgd", "neumann"):
        growth = 2 if name in ("adam", "lamb") else 4
        assert peaks[name, 4096] == pytest.approx(growth * peaks[name, 1024])
    assert making.schedule_of(presets.get("slice/resnet50-b32768-lamb"), 39).peak == pytest.approx(0.04, rel=1e-2)


@pytest.mark.parametrize(("decay", "half"), [("polynomial", 0.25), ("cosine", 0.5)])
def test_rates_fall_to_zero(decay, half):
    recipe = presets.Recipe(batch_size=256, epochs=25, decay=decay, warmup_epochs=5, base_learning_rate=2.0)
    of = making.schedule_of(recipe, 10)
    np.testing.assert_allclose([float(of(step)) for step in (0, 50, 150, 250, 300)], [2, 2, 2 * half, 0, 0], atol=1e-6)
    again = keras.saving.deserialize_keras_object(keras.saving.serialize_keras_object(of))
    assert isinstance(again, schedule.RampThenFall) and again.get_config() == of.get_config()
    large = making.schedule_of(presets.get("slice/resnet50-b32768-lars"), 39)
    np.testing.assert_allclose(float(large(12 * 39)), 34.0, rtol=1e-6)


def test_lars_is_its_formula():
    """Two steps by hand, of a kernel, of a bias, and of a kernel of zeros."""
    random = np.random.default_rng(0)
    start = [random.standard_normal((3, 2)), random.standard_normal(2), np.zeros((2, 2))]
    variables = [keras.Variable(w, dtype="float64", name=name) for w, name in zip(start, ("kernel", "bias", "kernel"))]
    optimizer = LARS(0.5, momentum=0.8, decay=0.1, trust=0.01)
    w, v = [a.copy() for a in start], [np.zeros_like(a) for a in start]
    for step in range(2):
        gradients = [random.standard_normal(a.shape) for a in start]
        optimizer.apply([tf.constant(g) for g in gradients], variables)
        for i, g in enumerate(gradients):
            if i != 1:
                length, slope = np.linalg.norm(w[i]), np.linalg.norm(g)
                rate = 0.01 * length / (slope + 0.1 * length + 1e-9) if length else 1.0
                g = rate * (g + 0.1 * w[i])
            v[i] = 0.8 * v[i] + 0.5 * g
            w[i] = w[i] - v[i]
        for variable, expected in zip(variables, w):
            np.testing.assert_allclose(variable.numpy(), expected, rtol=1e-6, err_msg=f"step {step}")
    again = LARS.from_config(optimizer.get_config())
    assert (again.momentum, again.decay, again.trust, again.excluded) == (0.8, 0.1, 0.01, ["bias", "gamma", "beta"])


def test_the_ablation_of_the_paper_is_options():
    given = ["--alpha", "0", "--beta", "0", "--gamma", "0.95", "--mu_end", "0.5"]
    made = making.optimizer_of(options.recipe_of(options.arguments(given)[0]), 10)
    assert (made.alpha, made.beta, made.gamma, made.mu_end) == (0, 0, 0.95, 0.5)


def test_batches_of_slices_divide():
    for name, recipe in presets.PRESETS.items():
        if name.startswith("slice/"):
            assert recipe.batch_size % (32 * 128) == 0 and recipe.published is None
    assert {presets.PRESETS[name].batch_size for name in presets.PRESETS if "slice/" in name} == {4096, 8192, 32768}


def test_residual_blocks_can_begin_as_the_identity():
    model = models.build("resnet_small", 32, 10, momentum=0.75, zero_gamma=True)
    norms = [layer for layer in model.layers if isinstance(layer, keras.layers.BatchNormalization)]
    assert {layer.momentum for layer in norms} == {0.75}
    ends = [layer for layer in norms if not np.any(layer.gamma.numpy())]
    assert len(ends) == 4 and len(norms) > 4


def test_resnet_v1_5_strides_in_its_3x3_convolutions():
    model = models.build("resnet50_v1_5", 64)
    assert sum(int(np.prod(w.shape)) for w in model.trainable_variables) == 25_557_032
    strided = [layer for layer in model.layers if isinstance(layer, keras.layers.Conv2D) and layer.strides == (2, 2)]
    assert sorted({layer.kernel_size[0] for layer in strided}) == [1, 3, 7]
    assert sum(layer.kernel_size == (3, 3) for layer in strided) == 3
    assert sum(layer.kernel_size == (1, 1) for layer in strided) == 3  # of the shortcuts
