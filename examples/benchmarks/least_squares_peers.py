"""jaxopt, somax and tf-levenberg-marquardt on problems of `least_squares.py`, which runs this program.

    python examples/benchmarks/least_squares_peers.py problem.npz '{"peer": "jaxopt", "seconds": 20}'

in a Python that has the packages; `least_squares.py --peers` takes its path. Prints one line of JSON. The packages are
called as their documentation does. Seconds are those of the processor, of all threads, without the first steps, which
trace and compile.
"""

import json
import os
import sys
import time

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")

import numpy as np


def until(seconds, step):
    """`(steps, seconds)` of `step(i)`, called until the seconds are over; those of the first two are not counted.

    The second compiles anew where the state of the first has other types than the one to begin with.
    """
    step(0)
    step(1)
    count, begin = 2, time.process_time()
    while time.process_time() - begin < seconds:
        step(count)
        count += 1
    return count, time.process_time() - begin


# The curve: a network 1-20-1 with tanh, in float64, batches of 1000.


def batches(problem, size=1000):
    """The data in pieces."""
    x, y = problem["x"], problem["y"]
    return [(x[i : i + size], y[i : i + size]) for i in range(0, len(x), size)]


def predicted(weights, x):
    """The network."""
    import jax.numpy as jnp

    kernel, bias, last, end = weights
    return jnp.tanh(x @ kernel + bias) @ last + end


def jaxopt(problem, seconds):
    """`LevenbergMarquardt` on all points: it has no mini-batches."""
    import jax
    from jax.flatten_util import ravel_pytree
    from jaxopt import LevenbergMarquardt

    jax.config.update("jax_enable_x64", True)
    x, y = problem["x"], problem["y"]
    flat, unflatten = ravel_pytree([jax.numpy.asarray(problem[f"w{i}"]) for i in range(4)])
    solver = LevenbergMarquardt(
        lambda flat: (predicted(unflatten(flat), x) - y).ravel(), materialize_jac=True, solver="cholesky"
    )
    update, state = jax.jit(lambda w, s: solver.update(w, s)), solver.init_state(flat)
    at = {"w": flat, "s": state}

    def step(_):
        at["w"], at["s"] = update(at["w"], at["s"])
        jax.block_until_ready(at["w"])

    steps, spent = until(seconds, step)
    error = float(np.mean((np.asarray(predicted(unflatten(at["w"]), x)) - y) ** 2))
    return {"error": error, "steps": steps, "seconds": spent}


def somax(problem, seconds):
    """`egn_mse` with its trust-region damping."""
    import jax
    import somax

    jax.config.update("jax_enable_x64", True)
    weights = [jax.numpy.asarray(problem[f"w{i}"]) for i in range(4)]
    method = somax.egn_mse(predict_fn=predicted, lam_policy="trust_region", lam0=1.0, learning_rate=1.0)
    take = jax.jit(lambda weights, batch, state, rng: method.step(weights, batch, state, rng))
    at, pieces = {"w": weights, "s": method.init(weights)}, batches(problem)

    def step(i):
        x, y = pieces[i % len(pieces)]
        at["w"], at["s"], _ = take(at["w"], {"x": x, "y": y}, at["s"], jax.random.PRNGKey(i))
        jax.block_until_ready(at["w"])

    steps, spent = until(seconds, step)
    error = float(np.mean((np.asarray(predicted(at["w"], problem["x"])) - problem["y"]) ** 2))
    return {"error": error, "steps": steps, "seconds": spent}


def tf_levenberg_marquardt(problem, seconds):
    """`ModelWrapper` with a learning rate of 1, as its example of this curve."""
    import keras
    import tensorflow as tf
    import tf_levenberg_marquardt as lm

    keras.config.set_floatx("float64")
    model = keras.Sequential([keras.Input((1,)), keras.layers.Dense(20, activation="tanh"), keras.layers.Dense(1)])
    model.set_weights([problem[f"w{i}"] for i in range(4)])
    wrapper = lm.model.ModelWrapper(model)
    wrapper.compile(keras.optimizers.SGD(learning_rate=1.0), lm.loss.MeanSquaredError())
    pieces = [tf.data.Dataset.from_tensors(piece) for piece in batches(problem)]
    data = pieces[0]
    for piece in pieces[1:]:
        data = data.concatenate(piece)
    data = data.cache()
    epochs, spent = until(seconds, lambda _: wrapper.fit(data, epochs=1, verbose=0))
    error = float(np.mean((model.predict(problem["x"], verbose=0, batch_size=4000) - problem["y"]) ** 2))
    return {"error": error, "steps": epochs * len(pieces), "seconds": spent}


def mnist(problem, steps, network, seed):
    """tf-levenberg-marquardt's own protocol for so many steps after the first."""
    import keras
    import tensorflow as tf
    import tf_levenberg_marquardt as lm

    keras.utils.set_random_seed(seed)
    model = keras.models.model_from_json(network)
    wrapper = lm.model.ModelWrapper(model)
    wrapper.compile(
        keras.optimizers.SGD(learning_rate=0.1), lm.loss.SparseCategoricalCrossentropy(from_logits=True),
        solve_method="solve", metrics=["accuracy"],
    )  # fmt: skip
    data = tf.data.Dataset.from_tensor_slices((problem["x"], problem["y"].astype("float32")))
    data = data.shuffle(len(problem["x"]), seed=seed).batch(6000).cache().repeat()
    wrapper.fit(data, steps_per_epoch=1, verbose=0)
    begin = time.process_time()
    wrapper.fit(data, steps_per_epoch=steps, verbose=0)
    spent = time.process_time() - begin
    found, labels = wrapper.predict(problem["x_test"], verbose=0, batch_size=2000), problem["y_test"]
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)(labels, found)
    return {"test": float(np.mean(found.argmax(-1) == labels)), "loss": float(loss), "steps": steps, "seconds": spent}


PEERS = {"jaxopt": jaxopt, "somax": somax, "tf_levenberg_marquardt": tf_levenberg_marquardt, "mnist": mnist}

if __name__ == "__main__":
    asked = json.loads(sys.argv[2])
    with np.load(sys.argv[1]) as file:
        given = dict(file)
    print(json.dumps(PEERS[asked.pop("peer")](given, **asked)))
