"""The texts of the board's pages: a question for each group of charts, and a description for each number.

A number and its limit share one tag in two runs, `curvature` and `curvature/limit`. So every page, not only Custom
Scalars, draws the limit as a second line in the number's chart.
"""

import re

# {tag: description}, in the order of the charts. `limit:` describes the second line.
DESCRIPTIONS = {
    "1_stability/gauge": (
        "Learning rate x largest eigenvalue of the (preconditioned) Hessian / limit of the optimizer. "
        "**limit: 1**, the edge of stability: above it steps grow along the sharpest direction. "
        "Training normally reaches 1 and stays there; far below it, a larger learning rate is possible."
    ),
    "1_stability/sharpness": (
        "Largest eigenvalue of the curvature. "
        "**limit:** the largest stable value for the optimizer's learning rate, where it does not precondition."
    ),
    "1_stability/sharpness_residual": (
        "|Hu - lu| / l of the sharpness l: an eigenvalue is this near. **limit: 0.05**: above it the board "
        "takes more products; if it stays above, do not rely on the gauge."
    ),
    "1_stability/preconditioned_residual": (
        "The same for the preconditioned sharpness. **limit: 0.05**."
    ),
    "1_stability/most_negative_residual": "The same for the most negative eigenvalue.",
    "1_stability/preconditioned_sharpness": (
        "Largest eigenvalue of M^1/2 H M^1/2, where the optimizer multiplies gradients by M. "
        "**limit:** the largest stable value for its learning rate."
    ),
    "1_stability/most_negative": (
        "Smallest eigenvalue of the curvature found by 20 products; the exact one is at or below it. "
        "Clearly below 0 means near a saddle; it shrinks during training. **limit: 0**."
    ),
    "1_stability/reduction_ratio": (
        "Actual decrease of the loss / decrease predicted by the optimizer's quadratic model. 1: the model is "
        "right; **limit: 0.25**: below it the model is not trusted, and adaptive damping rises."
    ),
    "1_stability/damping": "Damping of the optimizer: the larger, the closer its steps are to gradient steps.",
    "1_stability/steps_skipped": "Steps skipped since `fit` began because the loss or the step was not finite.",
    "1_stability/steps_rejected": "Steps undone since `fit` began because they made the loss worse.",
    "2_noise/noise_scale": (
        "Gradient noise scale in examples: the noise of the gradients over their signal. **limit: the batch size**. "
        "Well below the noise scale a larger batch shortens training, well above it does not. There is no point where "
        "noise hides the gradient: the noise scale is then larger than the examples measured. With batch "
        "normalization the statistics are those of a quarter of the batch, and the number is rough."
    ),
    "2_noise/gauge": "Batch size / noise scale. **limit: 1**: above it a larger batch hardly shortens training.",
    "3_step/loss": "Training loss, the mean over the steps since the last point.",
    "3_step/learning_rate": "Learning rate of the optimizer.",
    "3_step/best_rate": (
        "|g|^2 / g'Hg: the learning rate that reaches the minimum along the gradient. **limit: the learning rate**. "
        "Only for optimizers that step along the gradient."
    ),
    "3_step/curvature_along_gradient": "g'Hg / |g|^2: curvature along the gradient.",
    "3_step/gradient_norm": "Norm of the gradient on the measured examples.",
    "3_step/gradient_in_sharpest": (
        "Share of the squared gradient along the sharpest direction found, 0 to 1. Near 1, the gradient bounces "
        "between two walls."
    ),
    "3_step/update_norm": "Norm of the change of all weights in one call of the train step.",
    "3_step/update_to_weight_max": (
        "Norm of a layer's change / norm of its weights, the largest over the layers. **limit: 0.001**, a rule of "
        "thumb: far more makes the layer unstable, far less hardly trains it."
    ),
    "3_step/update_to_weight_median": (
        "Norm of a layer's change / norm of its weights, the median over the layers."
    ),
    "3_step/cosine": (
        "Cosine between the update and the negative gradient on the measured examples. 1: a step of gradient descent; "
        "**limit: 0**: below it the step goes uphill on these examples."
    ),
    "3_step/cosine_of_updates": (
        "Cosine between two consecutive updates after a measurement. Near 1: they continue; **limit: 0**: below it "
        "they go back and forth, as between two walls."
    ),
    "3_step/step_norm": "Norm of the optimizer's step, before the learning rate.",
    "4_solver/cg_iterations": "Iterations of conjugate gradients in one step.",
    "4_solver/mu": "Momentum that the optimizer chose.",
    "4_solver/rho": "Momentum that the optimizer chose: the share of the last step that it keeps.",
    "4_solver/beta": "Learning rate that the optimizer chose for the new part of the step.",
    "4_solver/alpha": "Step length that the optimizer chose.",
    "4_solver/step_length": "Step length that the line search chose.",
    "5_factors/failed_refreshes": "Factors whose refresh failed since `fit` began; the old ones stay in use.",
    "5_factors/kl_clip": "Factor by which the step was shortened to stay within the trusted change of the outputs.",
    "5_factors/unclipped": "Share of the entries of the step that were not clipped.",
    "5_factors/curvature_norm": "Norm of the curvature estimate that the optimizer keeps.",
    "6_layers/effective_directions": (
        "Trace (of the Gauss-Newton matrix, see `6_layers/trace`) / sharpness (of the curvature measured): how many "
        "directions as sharp as the sharpest one would make up all the curvature."
    ),
    "6_layers/trace": (
        "Trace of the Gauss-Newton (Fisher) matrix from labels drawn from the model, also where the curvature "
        "measured is the Hessian: in ReLU networks both have the same trace. Where the loss is no likelihood, the "
        "trace of the curvature measured."
    ),
    "6_layers/trace_stderr": "Standard error of the trace, itself rough because it comes from few draws.",
}
LAYER = "6_layers/trace_share/"
BOUNDS = ("2_noise/noise_scale_lower", "2_noise/noise_scale_upper")

# {number that an optimizer reports: its tag}. Other numbers go to `4_solver/`.
REPORTED = {
    "reduction_ratio": "1_stability/reduction_ratio",
    "damping": "1_stability/damping",
    "skipped_steps": "1_stability/steps_skipped",
    "rejected_steps": "1_stability/steps_rejected",
    "step_norm": "3_step/step_norm",
    "failed_refreshes": "5_factors/failed_refreshes",
    "kl_clip": "5_factors/kl_clip",
    "unclipped": "5_factors/unclipped",
    "curvature_norm": "5_factors/curvature_norm",
}
# Limits that never change.
LIMITS = {
    "1_stability/gauge": 1.0,
    "1_stability/most_negative": 0.0,
    "1_stability/sharpness_residual": 0.05,
    "1_stability/preconditioned_residual": 0.05,
    "1_stability/reduction_ratio": 0.25,
    "2_noise/gauge": 1.0,
    "3_step/update_to_weight_max": 1e-3,
    "3_step/cosine": 0.0,
    "3_step/cosine_of_updates": 0.0,
}

# (question, whether initially closed, ((title of the chart, its tags), ...)). A tag that ends in "/" matches all below.
QUESTIONS = (
    ("Is the step stable?", False, (
        ("stability gauge: 1 is the edge", ("1_stability/gauge",)),
        ("sharpness, and its limit", ("1_stability/sharpness",)),
        ("preconditioned sharpness, and its limit", ("1_stability/preconditioned_sharpness",)),
        ("most negative eigenvalue", ("1_stability/most_negative",)),
        ("relative errors of these: their residuals",
         ("1_stability/sharpness_residual", "1_stability/preconditioned_residual",
          "1_stability/most_negative_residual")),
        ("reduction ratio: near 1 the quadratic model is right, below 0.25 it is not",
         ("1_stability/reduction_ratio",)),
        ("damping", ("1_stability/damping",)),
        ("steps skipped or undone", ("1_stability/steps_skipped", "1_stability/steps_rejected")),
    )),
    ("Is the batch of the right size?", False, (
        ("noise scale, and the batch size", ("2_noise/noise_scale",)),
        ("batch size / noise scale: above 1 a larger batch hardly helps", ("2_noise/gauge",)),
    )),
    ("How far does a step go?", False, (
        ("loss", ("3_step/loss",)),
        ("learning rate", ("3_step/learning_rate",)),
        ("best rate along the gradient, and the learning rate", ("3_step/best_rate",)),
        ("update / weight of a layer: 0.001 is usual",
         ("3_step/update_to_weight_max", "3_step/update_to_weight_median")),
        ("cosine of update and negative gradient: below 0 is uphill", ("3_step/cosine",)),
        ("cosine of two updates in a row: below 0 they bounce", ("3_step/cosine_of_updates",)),
        ("share of the gradient in the sharpest direction", ("3_step/gradient_in_sharpest",)),
        ("gradient and update, norms", ("3_step/gradient_norm", "3_step/update_norm", "3_step/step_norm")),
        ("curvature along the gradient", ("3_step/curvature_along_gradient",)),
    )),
    ("What does the solver do?", True, (("iterations, momentum, lengths", ("4_solver/",)),)),
    ("Are the factors healthy?", True, (("failures and clipping", ("5_factors/",)),)),
    ("Where is the curvature?", False, (
        ("share of each layer in the trace", (LAYER,)),
        ("effective directions: trace / sharpness", ("6_layers/effective_directions",)),
        ("trace, and its error", ("6_layers/trace", "6_layers/trace_stderr")),
    )),
)  # fmt: skip
# Charts of a value between bounds: (question, title, value, lower, upper).
MARGINS = (("Is the batch of the right size?", "noise scale, with its error bar", "2_noise/noise_scale", *BOUNDS),)


def describe(tag):
    """The description of a tag in Markdown."""
    if tag.startswith(LAYER):
        return "Share of this layer in `6_layers/trace`, the sum of the traces of all layers."
    if tag in BOUNDS:
        return "The noise scale, one standard error below and above; at most ten times the noise scale."
    return DESCRIPTIONS.get(tag, "A number that the optimizer reports.")


def tag_of(report):
    """The tag of a number that an optimizer reports."""
    return REPORTED.get(report, f"4_solver/{report}")


def layout(tags):
    """The `Layout` message of the Custom Scalars page, with the charts that have `tags`."""
    from tensorboard.plugins.custom_scalar import layout_pb2 as pb

    categories = []
    for question, closed, charts in QUESTIONS:
        there = [(title, _there(wanted, tags)) for title, wanted in charts]
        drawn = [
            pb.Chart(title=title, multiline=pb.MultilineChartContent(tag=found)) for title, found in there if found
        ]
        margins = [m for m in MARGINS if m[0] == question and set(m[2:]) <= set(tags)]
        drawn += [_margin(pb, *margin[1:]) for margin in margins]
        if drawn:
            categories.append(pb.Category(title=question, chart=drawn, closed=closed))
    return pb.Layout(category=categories)


def _there(wanted, tags):
    """Patterns for all tags of a chart if one of them exists; TensorBoard matches them at the start of a tag.

    All of them, because TensorBoard draws both charts where two runs have different ones.
    """
    there = any(tag.startswith(one) if one.endswith("/") else tag == one for one in wanted for tag in tags)
    ends = {True: ".*", False: "$"}
    return [f"^{re.escape(tag)}{ends[tag.endswith('/')]}" for tag in wanted] if there else []


def _margin(pb, title, value, lower, upper):
    series = pb.MarginChartContent.Series(value=value, lower=lower, upper=upper)
    return pb.Chart(title=title, margin=pb.MarginChartContent(series=[series]))


def check_tensorboard(owner):
    """Raise an `ImportError` that says what to install where TensorBoard is missing."""
    try:
        import tensorboard.plugins.custom_scalar.layout_pb2  # noqa: F401
    except ImportError as error:
        raise ImportError(
            f"`{type(owner).__name__}` writes pages of TensorBoard, which is not installed: {error}. Install it: "
            'pip install "keras_curvature[monitor]"'
        ) from error
