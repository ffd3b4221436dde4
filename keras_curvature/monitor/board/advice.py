"""Advice in words, given once when a limit is crossed."""

import dataclasses
from collections.abc import Callable

from keras_curvature.monitor.board.layout import LAYER


@dataclasses.dataclass(frozen=True)
class Rule:
    """A sentence and the condition for it.

    Args:
        tag: The tag of the number.
        crossed: A function of the number that tells whether it is beyond the limit.
        text: The sentence.
        times: So many points in a row must be beyond the limit.
    """

    tag: str
    crossed: Callable
    text: str
    times: int = 1


RULES = (
    Rule("1_stability/gauge", lambda v: v > 1.0, (
        "The step bounces along the sharpest direction (stability gauge {:.2f}, three times above 1): lower the "
        "learning rate, or expect training to stay at the edge."
    ), times=3),
    Rule("2_noise/gauge", lambda v: v > 2.0, (
        "The batch is past the critical size ({:.1f} times the noise scale): larger batches will not shorten training."
    ), times=3),
    Rule("2_noise/gauge", lambda v: v < 0.2, (
        "A larger batch would still shorten training: this one is {:.2g} of the noise scale."
    ), times=3),
    Rule("1_stability/reduction_ratio", lambda v: v < 0.25, (
        "The quadratic model is not trusted (reduction ratio {:.2f}, three times below 0.25); damping is rising."
    ), times=3),
)  # fmt: skip
LAYER_SHARE = "One layer, `{}`, has {:.0%} of the trace."


class Advice:
    """Counts the limits crossed."""

    def __init__(self, rules=RULES):
        self._counts = dict.fromkeys(rules, 0)
        self._heavy = None

    def of(self, values):
        """The sentences for new numbers `{tag: value}`."""
        said = [rule.text.format(values[rule.tag]) for rule in self._counts if self._crosses(rule, values)]
        return said + self._of_layers(values)

    def _crosses(self, rule, values):
        """Whether these numbers cross a rule's limit, having been within it before."""
        if rule.tag not in values:
            return False
        beyond = rule.crossed(values[rule.tag])
        self._counts[rule] = self._counts[rule] + 1 if beyond else 0
        return self._counts[rule] == rule.times

    def _of_layers(self, values):
        shares = {tag.removeprefix(LAYER): value for tag, value in values.items() if tag.startswith(LAYER)}
        if not shares:
            return []
        heaviest = max(shares, key=shares.get)
        before, self._heavy = self._heavy, heaviest if shares[heaviest] > 0.8 else None
        return [LAYER_SHARE.format(heaviest, shares[heaviest])] if self._heavy not in (None, before) else []
