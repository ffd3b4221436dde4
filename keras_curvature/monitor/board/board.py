"""`CurvatureBoard`: curvature in TensorBoard while a model trains."""

import os
import time
from typing import Any, Literal

import keras

from keras_curvature import replicas
from keras_curvature.component import check, check_choice, check_count, check_number
from keras_curvature.monitor.board import about, first_batch, layout, live
from keras_curvature.monitor.board.budget import Budget, Costs
from keras_curvature.monitor.board.events import make_folder
from keras_curvature.monitor.board.failures import Failures
from keras_curvature.monitor.board.pages import Pages
from keras_curvature.monitor.board.panels import DENSITY_STEPS, DENSITY_VECTORS, WARM, Panels
from keras_curvature.monitor.objective import kinds
from keras_curvature.monitor.objective.objective import mixes_examples
from keras_curvature.monitor.operator import Curvature, curvature
from keras_curvature.monitor.report.drawing import png
from keras_curvature.monitor.report.measure import measure
from keras_curvature.monitor.report.reporting import Report
from keras_curvature.training.callbacks.chief import is_chief
from keras_curvature.typing import Kind, Logs

# Share of the wall time for the numbers that training already computes, beside the budget.
LIVE_SHARE = 0.005
# Share of the budget for the spectral density, which measurements would otherwise leave no time for.
DENSITY_SHARE = 0.25


class CurvatureBoard(keras.callbacks.Callback):
    """Shows in TensorBoard how the curvature of the loss changes during training, for any optimizer.

    The pages are groups of questions. Is the step stable: the sharpness, and the **stability gauge**

        gauge = learning rate * lambda_max(M^1/2 H M^1/2) / limit of the optimizer,

    which is 1 at the edge of stability, with the matrix `M` that the optimizer multiplies gradients by. Does the batch
    have the right size: the gradient noise scale against it. How far does a step go. What do the solver and the factors
    of this package's optimizers do. Which layers have the curvature. Limits are drawn as second lines. Beside them are
    the spectral density over training as histograms, advice in words when a limit is crossed, and the report at the end
    as text and picture.

    Training with the board is bit for bit the same as without it. Measuring takes time, and the board keeps to a share
    of it: it times itself, and measures as often as `budget` allows. The budget leaves out tracing at the first
    measurement and `report_at`; the page Text says how long these took. All numbers are of the model in training mode,
    on the same examples. An error in a part of the board ends that part with a warning, and never the training.

    Under `MirroredStrategy` the numbers are those of one replica. With several processes only the live numbers are
    written, by the chief, at the end of each epoch.

    Reference: Cohen et al., "Gradient Descent on Neural Networks Typically Occurs at the Edge of Stability" (2021);
    McCandlish et al., "An Empirical Model of Large-Batch Training" (2018).

    Args:
        log_dir: Folder for TensorBoard, created if missing; the board writes the runs `curvature` and, for limits,
            `curvature/limit` into it. A resumed run continues its curves.
        data: The data to measure on: `(x, y)`, `(x, y, sample_weight)`, a `tf.data.Dataset` or a
            `keras.utils.PyDataset`; the first `examples` are read once. Reading a `Dataset` that shuffles changes its
            order: pass a separate object from the one that `fit` uses, or training changes. Few examples overestimate
            the sharpness, by about 5 % at 1024 and by up to half at 32. Defaults to the first batch of training.
        budget: Share of the wall time for measuring, in [0, 1). With 0, only quantities that training already computes
            are logged; for a Keras optimizer these are its loss and learning rate. What is shown of a step
            (`update_norm`, `cosine`, ...) needs a measurement before it. Defaults to `0.05`.
        examples: Largest number of examples of the data. Defaults to `1024`.
        kind: The curvature: `"hessian"`, `"ggn"`, `"fisher"` or `"empirical_fisher"`. Defaults to `"hessian"`, which
            the gauge is defined for.
        report_at: When to write the report of `keras_curvature.report`: `"end"`, `"epoch"` (after each) or `None`.
            Defaults to `"end"`.

    Raises:
        ValueError: An argument is invalid, or `log_dir` cannot be written.
        ImportError: TensorBoard is not installed.

    Example:

    ```python
    board = keras_curvature.callbacks.CurvatureBoard("logs")
    model.fit(x, y, batch_size=128, epochs=20, callbacks=[board])   # then: tensorboard --logdir logs
    ```
    """

    def __init__(
        self, log_dir: str | os.PathLike, data: Any = None, budget: float = 0.05, examples: int = 1024,
        kind: Kind = "hessian", report_at: Literal["end", "epoch"] | None = "end",
    ) -> None:  # fmt: skip
        super().__init__()
        check(self, "log_dir", log_dir, bool(log_dir) and isinstance(log_dir, (str, os.PathLike)), "a path")
        check_number(self, "budget", budget, low=0, high=1, open_high=True)
        check_count(self, "examples", examples)
        check_choice(self, "kind", kind, kinds.KINDS, kinds.EXPECTED)
        check_choice(self, "report_at", report_at, ("end", "epoch", None))
        layout.check_tensorboard(self)
        self.log_dir, self.data, self.budget, self.examples = os.fspath(log_dir), data, budget, examples
        self.kind, self.report_at = kind, report_at
        folder = os.path.join(self.log_dir, "curvature")
        make_folder(self, "log_dir", folder)
        self._pages, self._clock = Pages(folder), time.perf_counter
        self._lively = self._in_epoch = False  # until training begins

    # What Keras calls. A step is looked at where the next one begins: the weights are the same as where it ended, and
    # Keras need not wait for the numbers of each step to hand them to its callbacks.

    def on_train_begin(self, logs: Logs = None) -> None:
        """Start the clock."""
        strategy = self.model.distribute_strategy
        self._works, self._alone = is_chief(strategy), not replicas.of_several_workers(strategy)
        self._lively, self._measures = self._works, self._works and self._alone and self.budget > 0
        self._forget()
        self._measurements, self._calls, self._failures = 0, 0, Failures()
        self._live, self._costs = live.Live(self.model), Costs()
        self._pages.begin()
        density = self.budget * DENSITY_SHARE
        shares = {"live": LIVE_SHARE, "measurements": self.budget - density, "density": density}
        self._budget = Budget(shares, self._clock)
        if self._works and self.budget > 0 and not self._alone:
            self._failures.tell(
                "curvature is not measured where several processes train. Live numbers go on, once an epoch."
            )

    def on_epoch_begin(self, epoch: int, logs: Logs = None) -> None:
        """Keras' metrics restart, and changes of the weights between epochs are no step."""
        self._live.epoch()
        self._before = self._after = None
        self._in_epoch = True
        if self._measures and self._batch is None:
            first_batch.watch(self.model, lambda batch: self._measuring(lambda: self._keep(batch)))

    def on_train_batch_begin(self, batch: int, logs: Logs = None) -> None:
        """Look at the step before this one."""
        if self._measures:
            self._failures.guard("the update of the weights", self._write_updates)
        if batch and self._lively and self._alone and self._budget.allows("live", self._costs.expected("live", 0)):
            self._show_live()
        if self._measures and self._batch is not None and self._calls:
            expected = sum(self._costs.expected(piece.name, piece.products) for piece in self._due())
            if self._panels is None or self._budget.allows("measurements", expected):
                self._measuring(self._measure)
        self._calls += 1

    def on_test_begin(self, logs: Logs = None) -> None:
        """Look at the last step of an epoch, before validation takes the metrics."""
        if self._in_epoch and self._lively and self._alone:
            self._show_live()
        self._in_epoch = False

    def on_epoch_end(self, epoch: int, logs: Logs = None) -> None:
        """Look at the last step of an epoch, and write the spectrum and a report where asked for."""
        if self._in_epoch and self._lively:
            if self._alone and self._live.agrees(logs or {}):
                self._show_live()
            else:
                self._lively = self._failures.guard(
                    "live numbers", lambda: self._write(self._live.of_epoch(logs or {}))
                )
        self._in_epoch = False
        if self._measures and self._panels is not None:
            expected = self._costs.expected("density", DENSITY_VECTORS * DENSITY_STEPS)
            if self._budget.allows("density", expected):
                self._failures.guard("the spectrum", self._write_spectrum)
            if self.report_at == "epoch":
                self._failures.guard("the report", self._write_report)
        self._writing(self._pages.flush)

    def on_train_end(self, logs: Logs = None) -> None:
        """Write what is shown once, and a spectrum of the final weights."""
        if self._measures and self._panels is not None:
            self._failures.guard("the spectrum", lambda: self._budget.timed("report", self._draw_spectrum, once=True))
            if self.report_at == "end":
                self._failures.guard("the report", self._write_report)
            self._writing(self._write_about)
        self._writing(self._pages.close)
        self._works = self._lively = self._measures = False
        self._forget()

    def _forget(self):
        self._batch = self._panels = self._in_inference = self._before = self._after = None

    # Measurements.

    def _measuring(self, work):
        self._measures = self._failures.guard("measuring", work) and self._measures

    def _keep(self, batch):
        """Keep the first batch, of all replicas."""
        batch = replicas.whole(self.model.distribute_strategy, batch)
        self._batch = keras.utils.unpack_x_y_sample_weight(batch)
        self._batch_size = int(next(a for a in keras.tree.flatten(self._batch) if a is not None).shape[0])

    def _due(self):
        """The pieces of the next measurement."""
        pieces, dropped = [] if self._panels is None else self._panels.pieces, self._failures.dropped
        return [piece for piece in pieces if self._measurements % piece.every == 0 and piece.name not in dropped]

    def _measure(self):
        """Measure the pieces that are due, at the model's current weights."""
        first = self._panels is None
        if first:
            self._budget.timed("measurements", self._begin, once=True)
        self._budget.timed("measurements", lambda: self._panels.begin(self.model), once=first)
        due = self._due()
        self._measurements += 1
        for piece in due:
            self._ask(piece)
        step = self._step()
        self._budget.timed("measurements", lambda: self._write_measurement(step, first), once=first)
        self._before = step, self._panels.weights, self._panels.gradient
        if not self._costs.product:  # products are traced by now, so their time predicts that of the pieces
            self._costs.product = self._budget.timed("measurements", self._panels.again, once=True) / WARM
        if first:
            draw = lambda: self._budget.timed("measurements", self._draw_spectrum, once=True)  # noqa: E731
            self._failures.guard("the spectrum", draw)

    def _begin(self):
        data = self._batch if self.data is None else self.data
        batch_size = None if self.data is None or not mixes_examples(self.model) else self._batch_size
        measured = curvature(self.model, data, self.kind, None, self.examples, batch_size, training=True)
        self._panels = Panels(measured, self._batch_size)

    def _ask(self, piece):
        """Measure one piece; its first time, which includes tracing, is not in the budget."""
        new = self._costs.is_new(piece.name)
        seconds = self._budget.timed("measurements", lambda: self._answer(piece), once=new)
        self._costs.note(piece.name, seconds)

    def _answer(self, piece):
        if piece.needed:  # without it the whole measurement fails
            piece.ask(self._panels)
        else:
            self._failures.guard(piece.name, lambda: piece.ask(self._panels))

    def _step(self):
        taken = live.iterations(self.model)
        return self._calls if taken is None else taken

    # Writing.

    def _writing(self, work):
        if self._works:
            self._works = self._failures.guard("writing", work)

    def _write(self, values, limits=None, step=None):
        self._pages.numbers(values, limits or {}, self._step() if step is None else step)

    def _show_live(self):
        def show():
            self._lively = self._failures.guard("live numbers", self._write_live)

        first = self._costs.is_new("live")  # opens a file, and imports TensorBoard's modules
        self._costs.note("live", self._budget.timed("live", show, once=first))

    def _write_live(self):
        values = self._live.read()
        self._write(values)
        self._pages.advise(values, self._step())

    def _write_measurement(self, step, first):
        self._write(self._panels.values, self._panels.limits, step)
        self._pages.advise(self._panels.values, self._step())
        if first:
            self._write_about()

    def _write_updates(self):
        """Write what a step did to the weights that were measured, and whether the next step goes the same way."""
        after, self._after = self._after, None
        if after is not None:
            self._budget.timed("measurements", lambda: self._write(self._panels.bounce(), step=after))
        if self._before is not None:
            (step, weights, gradient), self._before = self._before, None
            update = lambda: self._write(self._panels.update(weights, gradient), step=step)  # noqa: E731
            self._budget.timed("measurements", update)
            self._after = self._step()

    def _write_spectrum(self):
        self._costs.note("density", self._budget.timed("density", self._draw_spectrum))

    def _draw_spectrum(self):
        self._panels.check_finite()
        bars = self._panels.bars(self._panels.density())
        self._pages.spectrum(bars, self._panels.axis, self._step())

    def _write_report(self):
        self._budget.timed("report", self._draw_report, once=True)

    def _draw_report(self):
        self._panels.check_finite()
        if self._in_inference is None:  # kept, since another one would be traced again
            self._in_inference = Curvature(self._panels.measured.objective.in_mode(False))
        report, step = Report(measure(self._in_inference)), self._step()
        self._pages.text("report", f"```\n{report}\n```", step)
        picture = png(report, dpi=100)
        if picture is not None:  # without matplotlib the text has all of the numbers
            self._pages.image("report_figure", picture, step)

    def _write_about(self):
        data = "the first batch of training" if self.data is None else "the data given"
        dropped, tags = sorted(self._failures.dropped), sorted(self._pages.tags)
        words = about.words(self._panels, data, self._budget, self._measurements, dropped, tags)
        self._pages.text("about", words, self._step())
