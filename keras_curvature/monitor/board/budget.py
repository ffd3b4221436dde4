"""Shares of the wall clock, kept by whoever spends them."""


class Budget:
    """Time that may be spent: shares of the time that has gone by, each for one kind of work.

    Work may begin where `spent + expected <= share * elapsed`. What is done only once, such as tracing graphs, is
    counted apart, and is on neither side.

    Args:
        shares: `{kind of work: share in [0, 1)}`.
        clock: A function without arguments that gives seconds, such as `time.perf_counter`.
    """

    def __init__(self, shares, clock):
        self.shares, self._clock, self._began = dict(shares), clock, clock()
        self.spent, self.once = dict.fromkeys(shares, 0.0), {}

    @property
    def elapsed(self):
        """Seconds since it was made, without what was done only once."""
        return self._clock() - self._began - sum(self.once.values())

    def allows(self, kind, expected):
        """Whether work of so many seconds may begin now."""
        return self.spent[kind] + expected <= self.shares[kind] * self.elapsed

    def timed(self, kind, work, once=False):
        """The seconds that `work()` takes; they are spent, or, `once`, counted apart."""
        began = self._clock()
        try:
            work()
        finally:
            account, seconds = self.once if once else self.spent, self._clock() - began
            account[kind] = account.get(kind, 0.0) + seconds
        return seconds


class Costs:
    """What pieces of work are known to cost: as much as the last time, but for the first, which has tracing in it.

    Before there was a second time a piece is taken to cost its number of products with the curvature.

    Attributes:
        product: Seconds of one product.
    """

    def __init__(self):
        self._seconds, self.product = {}, 0.0

    def is_new(self, name):
        """Whether a piece was never worked on."""
        return name not in self._seconds

    def note(self, name, seconds):
        """A piece has taken so many seconds."""
        self._seconds[name] = None if self.is_new(name) else seconds

    def expected(self, name, products):
        """Seconds that a piece will take, which is about so many products."""
        known = self._seconds.get(name)
        return products * self.product if known is None else known
