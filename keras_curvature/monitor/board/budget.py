"""The board's time: shares of the wall time, and what pieces of work cost."""


class Budget:
    """Time that may be spent: shares of the elapsed time, each for one kind of work.

    Work may begin where `spent + expected <= share * elapsed`. Work that is done only once, such as tracing graphs, is
    counted separately and is on neither side.

    Args:
        shares: `{kind of work: share in [0, 1)}`.
        clock: A function without arguments that returns seconds, such as `time.perf_counter`.
    """

    def __init__(self, shares, clock):
        self.shares, self._clock, self._began = dict(shares), clock, clock()
        self.spent, self.once = dict.fromkeys(shares, 0.0), {}

    @property
    def elapsed(self):
        """Seconds since construction, without the work that was done only once."""
        return self._clock() - self._began - sum(self.once.values())

    def allows(self, kind, expected):
        """Whether work of so many seconds may begin now."""
        return self.spent[kind] + expected <= self.shares[kind] * self.elapsed

    def timed(self, kind, work, once=False):
        """Run `work()` and return its seconds. They are spent, or counted separately with `once`."""
        began = self._clock()
        try:
            work()
        finally:
            account, seconds = self.once if once else self.spent, self._clock() - began
            account[kind] = account.get(kind, 0.0) + seconds
        return seconds


class Costs:
    """The expected cost of pieces of work.

    A piece is expected to cost what it last did; its first run, which includes tracing, is ignored. Before its second
    run it is expected to cost its number of products with the curvature.

    Attributes:
        product: Seconds of one product.
    """

    def __init__(self):
        self._seconds, self.product = {}, 0.0

    def is_new(self, name):
        """Whether a piece never ran."""
        return name not in self._seconds

    def note(self, name, seconds):
        """Note the seconds that a piece took."""
        self._seconds[name] = None if self.is_new(name) else seconds

    def expected(self, name, products):
        """Seconds that a piece of about so many products is expected to take."""
        known = self._seconds.get(name)
        return products * self.product if known is None else known
