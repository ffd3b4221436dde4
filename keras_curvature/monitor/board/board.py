"""Curvature in TensorBoard while a model trains."""

import math
import os
import time
import warnings

import keras

from keras_curvature import replicas
from keras_curvature.component import check, check_count, check_number
from keras_curvature.monitor.board import about, first_batch, layout, live
from keras_curvature.monitor.board.advice import Advice
from keras_curvature.monitor.board.budget import Budget, Costs
from keras_curvature.monitor.board.events import Events, make_folder
from keras_curvature.monitor.board.panels import (
    DENSITY_STEPS,
    DENSITY_VECTORS,
    WARM,
    NotFinite,
    Panels,
)
from keras_curvature.monitor.objective import kinds
from keras_curvature.monitor.objective.objective import mixes_examples
from keras_curvature.monitor.operator import Curvature, curvature
from keras_curvature.monitor.report.drawing import png
from keras_curvature.monitor.report.measure import measure
from keras_curvature.monitor.report.reporting import Report
from keras_curvature.solvers.flat import ProductNotFinite
from keras_curvature.training.callbacks.chief import is_chief

# Share of the wall clock for the numbers that training has anyway, beside the budget.
LIVE_SHARE = 0.005
# Share of the budget that is for the spectral density, which would never be afforded if each probe took what there is.
DENSITY_SHARE = 0.25
SPECTRUM = "1_stability/spectrum"


class CurvatureBoard(keras.callbacks.Callback):
    """Shows in TensorBoard how the curvature of the loss goes along with training, for any optimizer.

    Pages are groups of questions: is the step stable (sharpness, and the **stability gauge**,

        gauge = learning rate * lambda_max(M^1/2 H M^1/2) / limit of the optimizer,

    1 at the edge of stability, with `M` what the optimizer multiplies gradients by); is the batch of the right size
    (gradient noise scale against it); how far does a step go; what do the solver and the factors of our own optimizers
    do; which layers is the curvature in. Limits are second lines. Beside them: the spectral density over training as
    histograms, advice in words when a limit is crossed, and the report at the end as text and picture.

    Training with the board is bit for bit what it is without it. What is measured costs time, of which the board takes
    a share: it times itself, and probes as often as `budget` allows. Not in the budget are tracing at the first probe
    and `report_at`; the page Text says how long these took. The numbers are of the model in training mode, on the same
    examples all the time. An error inside the board ends a part of it with a warning, and never the training.

    Under `MirroredStrategy` the numbers are those of one replica. In several processes only the live numbers are
    written, at the end of each epoch, by the chief.

    Reference: Cohen et al., "Gradient Descent on Neural Networks Typically Occurs at the Edge of Stability" (2021);
    McCandlish et al., "An Empirical Model of Large-Batch Training" (2018).

    Args:
        log_dir: Folder for TensorBoard; the board writes the runs `curvature` and, for limits, `curvature/limit`
            into it. Created where it is not there. A run that goes on continues its curves.
        data: What to probe: `(x, y)`, `(x, y, sample_weight)`, a `tf.data.Dataset` or a `keras.utils.PyDataset`, of
            which the first `examples` are read, once. Reading a `Dataset` that shuffles moves its order: give the board
            another object than `fit`, or training is not what it was. Few examples overestimate the sharpness, by
            about 5 % at 1024 and by up to half at 32. Defaults to the first batch that training sees.
        budget: Share of the wall clock that probes may take, in [0, 1); 0: what training has anyway, and no curvature.
            With an optimizer of Keras' own that is its loss and learning rate; what is shown of a step (`update_norm`,
            `cosine`, ...) takes a probe before it. Defaults to `0.05`.
        examples: How many examples of the data at most. Defaults to `1024`.
        kind: The curvature: `"hessian"`, `"ggn"`, `"fisher"` or `"empirical_fisher"`. Defaults to `"hessian"`, which
            the gauge is defined by.
        report_at: When to write the report of `keras_curvature.report`: `"end"`, `"epoch"` (after each) or `None`.
            Defaults to `"end"`.

    Raises:
        ValueError: An argument is none of these, or `log_dir` cannot be written.
        ImportError: TensorBoard is not installed.

    Example:

    ```python
    board = keras_curvature.callbacks.CurvatureBoard("logs")
    model.fit(x, y, batch_size=128, epochs=20, callbacks=[board])   # then: tensorboard --logdir logs
    ```
    """

    def __init__(self, log_dir, data=None, budget=0.05, examples=1024, kind="hessian", report_at="end"):
        super().__init__()
        check(self, "log_dir", log_dir, bool(log_dir) and isinstance(log_dir, (str, os.PathLike)), "a path")
        check_number(self, "budget", budget, low=0, high=1, open_high=True)
        check_count(self, "examples", examples)
        check(self, "kind", kind, kind in kinds.KINDS, kinds.EXPECTED)
        check(self, "report_at", report_at, report_at in ("end", "epoch", None), '"end", "epoch" or None')
        layout.check_tensorboard(self)
        self.log_dir, self.data, self.budget, self.examples = os.fspath(log_dir), data, budget, examples
        self.kind, self.report_at = kind, report_at
        folder = os.path.join(self.log_dir, "curvature")
        make_folder(self, "log_dir", folder)
        self._values = Events(folder, layout.describe)
        self._limits = Events(os.path.join(folder, "limit"), lambda tag: f"The limit of `{tag}`.")
        self._clock = time.perf_counter
        self._lively = self._in_epoch = False  # until training begins

    # When things happen. A step is looked at where the next one begins: the weights are the same as where it ended, and
    # Keras need not wait for the numbers of each step to hand them to its callbacks.

    def on_train_begin(self, logs=None):
        """The clock begins to run."""
        strategy = self.model.distribute_strategy
        self._works, self._alone = is_chief(strategy), not replicas.of_several_workers(strategy)
        self._lively, self._probing = self._works, self._works and self._alone and self.budget > 0
        self._batch = self._panels = self._in_inference = self._before = self._after = None
        self._measurements, self._calls, self._dropped, self._tags, self._told = 0, 0, set(), set(), set()
        self._live, self._advice, self._costs = live.Live(self.model), Advice(), Costs()
        measurements, density = self.budget * (1 - DENSITY_SHARE), self.budget * DENSITY_SHARE
        self._budget = Budget({"live": LIVE_SHARE, "measurements": measurements, "density": density}, self._clock)
        if self._works and self.budget > 0 and not self._alone:
            self._tell("curvature is not measured where several processes train. Live numbers go on, once an epoch.")

    def on_epoch_begin(self, epoch, logs=None):
        """Keras' metrics begin again; and what happens to the weights between epochs is no step."""
        self._live.epoch()
        self._before = self._after = None
        self._in_epoch = True

    def on_train_batch_begin(self, batch, logs=None):
        """Look at the step before this one."""
        if self._probing and self._batch is None:
            first_batch.watch(self.model, self._take)
        if self._probing:
            self._guard("the update of the weights", self._write_updates)
        if batch and self._lively and self._alone and self._budget.allows("live", self._costs.expected("live", 0)):
            self._show_live()
        if self._probing and self._batch is not None:
            expected = sum(self._costs.expected(piece.name, piece.products) for piece in self._due())
            if self._panels is None or self._budget.allows("measurements", expected):
                self._guard("probing", self._probe, ends="_probing")
        self._calls += 1

    def on_test_begin(self, logs=None):
        """The last step of an epoch, before validation takes the metrics."""
        if self._in_epoch and self._lively and self._alone:
            self._show_live()
        self._in_epoch = False

    def on_epoch_end(self, epoch, logs=None):
        """The last step of an epoch, the spectrum, and a report where asked for."""
        if self._in_epoch and self._lively:
            if self._alone and self._live.agrees(logs or {}):
                self._show_live()
            else:
                self._guard("live numbers", lambda: self._write(self._live.of_epoch(logs or {})), ends="_lively")
        self._in_epoch = False
        if self._probing and self._panels is not None:
            expected = self._costs.expected("density", DENSITY_VECTORS * DENSITY_STEPS)
            if self._budget.allows("density", expected):
                self._guard("the spectrum", self._write_spectrum)
            if self.report_at == "epoch":
                self._guard("the report", self._write_report)
        if self._works:
            self._guard("writing", self._flush, ends="_works")

    def on_train_end(self, logs=None):
        """What is shown once, and a spectrum of the weights that training leaves."""
        if self._probing and self._panels is not None:
            self._guard("the spectrum", lambda: self._budget.timed("report", self._draw_spectrum, once=True))
            if self.report_at == "end":
                self._guard("the report", self._write_report)
            self._guard("writing", self._write_about, ends="_works")
        if self._works:
            self._guard("writing", self._close, ends="_works")
        self._works = self._lively = self._probing = False
        self._batch = self._panels = self._in_inference = self._before = self._after = None

    # Objective.

    def _take(self, batch):
        self._guard("probing", lambda: self._keep(batch), ends="_probing")

    def _keep(self, batch):
        """Keep the first batch, of all replicas."""
        batch = replicas.whole(self.model.distribute_strategy, batch)
        self._batch = keras.utils.unpack_x_y_sample_weight(batch)
        self._batch_size = int(next(a for a in keras.tree.flatten(self._batch) if a is not None).shape[0])

    def _due(self):
        """The pieces of the next probe."""
        pieces = [] if self._panels is None else self._panels.pieces
        return [piece for piece in pieces if self._measurements % piece.every == 0 and piece.name not in self._dropped]

    def _probe(self):
        """Measure what is due, at the weights that the model has now."""
        first = self._panels is None
        if first:
            self._budget.timed("measurements", self._begin, once=True)
        self._budget.timed("measurements", lambda: self._panels.begin(self.model), once=first)
        due = self._due()
        self._measurements += 1
        for piece in due:
            self._ask(piece)
        step = self._step()
        self._budget.timed("measurements", lambda: self._write_probe(step, first), once=first)
        self._before = step, self._panels.weights, self._panels.gradient
        if not self._costs.product:  # products are traced by now: these tell what the others will cost
            self._costs.product = self._budget.timed("measurements", self._panels.again, once=True) / WARM
        if first:
            self._guard("the spectrum", lambda: self._budget.timed("measurements", self._draw_spectrum, once=True))

    def _begin(self):
        given = self.data is not None
        batch_size = self._batch_size if given and mixes_examples(self.model) else None
        data = self.data if given else self._batch
        measured = curvature(
            self.model, data, kind=self.kind, examples=self.examples, batch_size=batch_size, training=True
        )
        self._panels = Panels(measured, self._batch_size)

    def _ask(self, piece):
        """One piece of a probe; the first time, tracing and all, is not in the budget."""
        new = self._costs.is_new(piece.name)
        seconds = self._budget.timed("measurements", lambda: self._answer(piece), once=new)
        self._costs.note(piece.name, seconds)

    def _answer(self, piece):
        if piece.needed:  # without it the probe fails, and not a part of it
            piece.ask(self._panels)
        else:
            self._guard(piece.name, lambda: piece.ask(self._panels))

    def _step(self):
        taken = live.iterations(self.model)
        return self._calls if taken is None else taken

    # Writing.

    def _show_live(self):
        first = self._costs.is_new("live")  # opens a file, and TensorBoard's own modules
        seconds = self._budget.timed("live", self._try_live, once=first)
        self._costs.note("live", seconds)

    def _try_live(self):
        self._guard("live numbers", self._write_live, ends="_lively")

    def _write_live(self):
        values = self._live.read()
        self._write(values)
        self._advise(values)

    def _write_probe(self, step, first):
        values = self._panels.values
        self._write(values, self._panels.limits, step)
        self._advise(values)
        if first:
            self._write_about()

    def _write_updates(self):
        """What a step has done to the weights that were probed, and whether the one after it goes the same way."""
        after, self._after = self._after, None
        if after is not None:
            self._budget.timed("measurements", lambda: self._write(self._panels.bounce(), step=after))
        if self._before is not None:
            (step, weights, gradient), self._before = self._before, None
            self._budget.timed("measurements", lambda: self._write(self._panels.update(weights, gradient), step=step))
            self._after = self._step()

    def _write_spectrum(self):
        self._costs.note("density", self._budget.timed("density", self._draw_spectrum))

    def _draw_spectrum(self):
        self._panels.check_finite()
        bars = self._panels.bars(self._panels.density())
        axis = self._panels.axis
        self._values.histogram(SPECTRUM, bars, self._step(), axis.title(), axis.words())

    def _write_report(self):
        self._budget.timed("report", self._draw_report, once=True)

    def _draw_report(self):
        self._panels.check_finite()
        if self._in_inference is None:  # kept: another one would be traced anew
            self._in_inference = Curvature(self._panels.measured.objective.in_mode(False))
        report, step = Report(measure(self._in_inference)), self._step()
        self._values.text("report", f"```\n{report}\n```", step)
        picture = png(report, dpi=100)
        if picture is not None:  # without matplotlib the text has all of the numbers
            self._values.image("report_figure", picture, step)

    def _write_about(self):
        data = "the first batch of training" if self.data is None else "the data given"
        dropped, tags = sorted(self._dropped), sorted(self._tags)
        words = about.words(self._panels, data, self._budget, self._measurements, dropped, tags)
        self._values.text("about", words, self._step())

    def _write(self, values, limits=None, step=None):
        """Numbers by their tags, their limits, and the layout of their charts, where there are new ones."""
        step = self._step() if step is None else step
        values = {tag: value for tag, value in values.items() if math.isfinite(value)}
        known = {tag: layout.LIMITS[tag] for tag in values if tag in layout.LIMITS}
        self._values.scalars(values, step)
        self._limits.scalars(known | (limits or {}), step)
        if not self._tags.issuperset(values):
            self._tags.update(values)
            self._values.layout(layout.layout(self._tags), step)

    def _advise(self, values):
        said = self._advice.of(values)
        if said:
            step = self._step()
            self._values.text("advice", "\n".join(f"* step {step}: {sentence}" for sentence in said), step)

    def _flush(self):
        self._values.flush()
        self._limits.flush()

    def _close(self):
        self._values.close()
        self._limits.close()

    # What goes wrong.

    def _guard(self, what, work, ends=None):
        """Do some work, unless it has failed before; where it fails, say so once, and go on without it.

        What was not finite may be so the next time.
        """
        if what in self._dropped:
            return
        try:
            work()
        except NotFinite as error:
            self._tell(f"{error}. Curvature is left out until they are.")
        except ProductNotFinite:
            self._tell(f"{what} is left out as long as products with the curvature overflow.")
        # Whatever it is: hours of training are worth more than a picture of them. Ctrl-C is no `Exception`.
        except Exception as error:
            self._dropped.add(what)
            if ends is not None:
                setattr(self, ends, False)
            self._tell(
                f"{what} failed with {type(error).__name__}: {error}. Training goes on, and so does what else the "
                "board shows."
            )

    def _tell(self, sentence):
        """A warning, once."""
        if sentence not in self._told:
            self._told.add(sentence)
            warnings.warn(f"`CurvatureBoard`: {sentence}", stacklevel=2)
