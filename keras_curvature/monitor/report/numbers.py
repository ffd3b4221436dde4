"""Numbers in the form in which people write them."""

import math


def count(n):
    """`38282` as `38 282`."""
    return f"{n:,}".replace(",", " ")


def number(value, digits=4):
    """A number with so many significant digits, without an exponent where that is short; NaN for `None`."""
    value = math.nan if value is None else value
    if not math.isfinite(value):
        return str(value)
    if value == 0:
        return "0"
    size = _size(value)
    if -4 <= size < 6:
        return f"{value:,.{max(0, digits - 1 - size)}f}".replace(",", " ")
    return f"{value:.{digits - 1}e}"


def with_error(value, error):
    """`69.0 ± 5.0`: two digits of the error, as many decimals of the value, and at most four digits of it."""
    value, error = (math.nan if a is None else a for a in (value, error))
    if not (math.isfinite(value) and math.isfinite(error)):
        return f"{number(value, 3)} ± {number(error, 2)}"
    if value == error == 0:
        return "0 ± 0"
    size = max(_size(value), _size(error))
    if not -4 <= size < 6:
        return f"{value:.2e} ± {error:.0e}"
    decimals = max(0, min(1 - _size(error) if error > 0 else 9, 3 - size))
    small = error < 0.5 * 10.0**-decimals
    said = f"{error:.0e}" if small and error > 0 else f"{error:,.{decimals}f}".replace(",", " ")
    return f"{value:,.{decimals}f} ± {said}".replace(",", " ")


def percent(share):
    """A share as `13.7 %`."""
    return f"{100 * share:.1f} %" if abs(share) < 1.1 else f"{100 * share:.0f} %"


def _size(value):
    """The power of ten of the first digit."""
    return math.floor(math.log10(abs(value))) if value else -99
