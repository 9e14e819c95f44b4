r"""Numbers with units: '12 cm', '3.5\,\text{m/s}^2', '\$5', '90^\circ', '5 apples'.

A unit is a product of powers of named units. Those in the tables below have exact factors, so '1.2 m' is '120 cm' to
the last digit; any other word is a unit of its own ('apples', compared without case and plural). Degrees Celsius and
Fahrenheit, and months and years, are units of their own too: they do not convert by a factor.

The general libraries (pint, sympy) parse expressions, in floats: too much power over hostile text for a few dozen
definitions that do not change.
"""

from __future__ import annotations

import re
from collections import Counter
from dataclasses import dataclass
from fractions import Fraction

from perl_megatron.reward.answers import (
    MAX_LENGTH,
    NUMBER,
    THIN_SPACE,
    number_value,
    plain_inside_math,
    spaces_of_latex,
)


@dataclass(frozen=True)
class Unit:
    """``factor`` times a product of powers of units that do not convert into each other."""

    dimensions: frozenset[tuple[str, int]] = frozenset()
    """(unit, power) without powers of 0; a percentage has none."""
    factor: Fraction = Fraction(1)


@dataclass(frozen=True)
class Quantity:
    """A number and its unit."""

    value: Fraction
    unit: Unit | None
    """None where the answer names no unit."""

    def in_unit(self, unit: Unit) -> Fraction | None:
        """The value in ``unit``, which also is the unit that was left out; None where it does not convert."""
        if self.unit is None:
            return self.value
        if self.unit.dimensions != unit.dimensions:
            return None
        return self.value * self.unit.factor / unit.factor


_PREFIXES = {"G": "1e9", "M": "1e6", "k": "1e3", "d": "0.1", "c": "0.01", "m": "0.001", "µ": "1e-6", "n": "1e-9"}
_PREFIX_NAMES = dict(zip(("giga", "mega", "kilo", "deci", "centi", "milli", "micro", "nano"), _PREFIXES, strict=True))

# Symbol: (names without their plural s, prefixes, factor, definition in other symbols; '' for a unit of its own).
_DEFINITIONS: dict[str, tuple[str, str, str, str]] = {
    "m": ("meter metre", "kdcmµn", "1", ""),
    "in": ("inch inche", "", "0.0254", "m"),
    "ft": ("foot feet", "", "0.3048", "m"),
    "yd": ("yard", "", "0.9144", "m"),
    "mi": ("mile", "", "1609.344", "m"),
    "g": ("gram gramme", "kmµ", "1", ""),
    "t": ("tonne", "", "1000000", "g"),
    "lb": ("pound", "", "453.59237", "g"),
    "oz": ("ounce", "", "28.349523125", "g"),
    "s": ("second sec", "mµn", "1", ""),
    "min": ("minute", "", "60", "s"),
    "h": ("hour hr", "", "3600", "s"),
    "d": ("day", "", "86400", "s"),
    "week": ("week wk", "", "604800", "s"),
    "month": ("month", "", "1", ""),
    "year": ("year yr", "", "12", "month"),
    "L": ("liter litre l", "dcmµ", "0.001", "m^3"),
    "gal": ("gallon", "", "0.003785411784", "m^3"),
    "ha": ("hectare", "", "10000", "m^2"),
    "acre": ("acre", "", "4046.8564224", "m^2"),
    "mph": ("mph", "", "1", "mi/h"),
    "kph": ("kph kmh", "", "1000", "m/h"),
    "N": ("newton", "kMm", "1000", "g m/s^2"),
    "Pa": ("pascal", "kMG", "1000", "g/m s^2"),
    "J": ("joule", "kMm", "1000", "g m^2/s^2"),
    "W": ("watt", "kMGm", "1000", "g m^2/s^3"),
    "Wh": ("", "kMG", "3600000", "g m^2/s^2"),
    "Hz": ("hertz", "kMG", "1", "s^-1"),
    "A": ("ampere amp", "mµ", "1", ""),
    "C": ("coulomb", "mµn", "1", "A s"),
    "V": ("volt", "kmµ", "1000", "g m^2/s^3 A"),
    "Ω": ("ohm", "kM", "1000", "g m^2/s^3 A^2"),
    "mol": ("mole", "m", "1", ""),
    "K": ("kelvin", "", "1", ""),
    "°C": ("celsius degc °celsius ℃", "", "1", ""),
    "°F": ("fahrenheit degf °fahrenheit ℉", "", "1", ""),
    "°": ("degree deg", "", "1", ""),
    "rad": ("radian", "", "1", ""),
    "$": ("dollar usd buck", "", "1", ""),
    "¢": ("cent", "", "0.01", "$"),
    "€": ("euro eur", "", "1", ""),
    "£": ("gbp", "", "1", ""),
    "¥": ("yen jpy", "", "1", ""),
    "元": ("yuan rmb cny", "", "1", ""),
    "₹": ("rupee inr", "", "1", ""),
    "%": ("percent", "", "0.01", "1"),
}

_LATEX = (
    (re.compile(r"\\\$"), "$"),
    (re.compile(r"\\%"), "%"),
    (re.compile(r"\^\s*\{?\s*\\circ\s*\}?|\\degree(?![a-z])|º"), "°"),
    (re.compile(r"\\(?:cdot|times)(?![a-z])|[*⋅×]"), "·"),
    (re.compile(r"\\mu\s*|μ"), "µ"),
    (re.compile(r"\\Omega(?![a-z])|Ω"), "Ω"),
    (re.compile(r"\\q?quad(?![a-z])"), " "),
    (re.compile(r"\^\s*\{\s*(-?[0-9])\s*\}"), r"^\1"),
    (re.compile(r"(?<![0-9])²"), "^2"),
    (re.compile(r"(?<![0-9])³"), "^3"),
    (re.compile(r"(?:°|\bdeg(?:rees?)?\b)\s*(?=(?:celsius|fahrenheit|C|F)\b)", re.IGNORECASE), "°"),
)
_FACTOR = re.compile(
    r"\s*(?:(?P<slash>/|per\b)|·)?\s*(?:(?P<shape>square|sq\.?|cubic|cu\.?)\s+)?"
    r"(?P<name>°(?:celsius|fahrenheit|[cf])?|[%$¢€£¥₹℃℉]|[^\W\d_]+\.?)(?:\s*(?P<shaped>squared|cubed)"
    r"(?![^\W\d_])|\^?(?P<power>-?[0-9])(?![0-9]))?",
    re.IGNORECASE,
)
_CURRENCY_FIRST = re.compile(r"([+-]?)\s*([$€£¥₹])\s*(?=[0-9.])")


def read_quantity(answer: str) -> Quantity | None:
    """The number of an answer and its unit; None where it is not exactly one number and at most one unit."""
    text = plain_inside_math(answer) if len(answer) <= MAX_LENGTH else ""
    if len(text) > 1 and text.startswith("$") and text.endswith("$"):
        text = text.strip("$")
    text = _without_latex(text)
    currency = _CURRENCY_FIRST.match(text)
    if currency is not None:
        text = currency[1] + text[currency.end() :]
    match = NUMBER.match(text)
    if match is None:
        return None
    value, rest = number_value(match), text[match.end() :].replace(THIN_SPACE, " ").strip()
    if currency is not None:
        if not rest or rest.startswith(("/", "per ")):
            rest = currency[2] + rest
        elif read_unit(rest) != read_unit(currency[2]):  # '$5 USD' says it twice
            return None
    unit = read_unit(rest) if rest else None
    return None if value is None or (rest and unit is None) else Quantity(value, unit)


def read_unit(text: str) -> Unit | None:
    """'cm', 'square meters', 'km/h', 'm/s^2', 'N·m', 'apples'; None where it is no product of words and powers.

    Everything after a slash or 'per' is below it, as in 'g/m s^2'.
    """
    factors = _factors(text)
    return None if factors is None else _product(factors)


def read_known_unit(text: str, *, apart: bool, others: frozenset[str] = frozenset()) -> Unit | None:
    """``read_unit`` for a text that may as well be a product of variables: other words than known units make it None.

    Args:
        text: what follows a number.
        apart: whether something sets the unit apart from the number. If not, one letter is a variable ('2n', '3m'), and
            the case of two letters counts ('mn' and 'mv' are no units). The case of one letter always does.
        others: words without plural s that are taken for units too.
    """
    factors = _factors(text)
    if factors is None:
        return None
    names = [factor["name"].removesuffix(".") for factor in factors]
    letters = [name for name in names if len(name) <= (1 if apart else 2)]
    is_variable = not apart and len(names) == 1 and len(names[0]) == 1 and names[0].isascii() and names[0].isalpha()
    if is_variable or any(name not in _UNITS for name in letters):
        return None
    units = [_named(name) for name in names]
    known = all(name in _DEFINITIONS or name in others for unit in units for name, _ in unit.dimensions)
    return _product(factors) if known else None


def _factors(text: str) -> list[re.Match[str]] | None:
    """The matches of ``_FACTOR`` that make up a whole text; None where it is no product of words and powers."""
    text = _without_latex(text).replace(THIN_SPACE, " ").strip().removesuffix(".")
    if not text or len(text) > 100:
        return None
    factors: list[re.Match[str]] = []
    position = 0
    while position < len(text):
        match = _FACTOR.match(text, position)
        if match is None:
            return None
        factors.append(match)
        position = match.end()
    return factors


def _product(factors: list[re.Match[str]]) -> Unit:
    dimensions: Counter[str] = Counter()
    factor, sign = Fraction(1), 1
    for match in factors:
        shape = (match["shape"] or match["shaped"] or "").lower()
        power = int(match["power"] or 1) * (2 if shape.startswith("s") else 3 if shape else 1)
        sign = -1 if match["slash"] else sign
        unit = _named(match["name"])
        factor *= unit.factor ** (sign * power)
        for name, exponent in unit.dimensions:
            dimensions[name] += exponent * power * sign
    return Unit(frozenset((name, power) for name, power in dimensions.items() if power), factor)


def _without_latex(text: str) -> str:
    for pattern, replacement in _LATEX:
        text = pattern.sub(replacement, text)
    return spaces_of_latex(text).strip()


def _named(name: str) -> Unit:
    """The unit of a symbol (its case counts: mW is not MW) or a name; a word that is neither is a unit of its own."""
    name = name.removesuffix(".")
    word = name.casefold()
    for candidate in (name, word, word.removesuffix("s")):
        if candidate in _UNITS:
            return _UNITS[candidate]
    return _UNITS_BY_WORD.get(word) or Unit(frozenset({(word.removesuffix("s"), 1)}))


def _fill_tables() -> None:
    """Every symbol and name, with prefixes; a definition uses the ones before it."""
    for symbol, (names, prefixes, factor, definition) in _DEFINITIONS.items():
        if definition:
            unit = Unit() if definition == "1" else read_unit(definition)
            assert unit is not None, definition
            unit = Unit(unit.dimensions, unit.factor * Fraction(factor))
        else:
            unit = Unit(frozenset({(symbol, 1)}))
        _UNITS.update(dict.fromkeys((symbol, *names.split()), unit))
        for prefix_name, prefix in _PREFIX_NAMES.items():
            if prefix in prefixes:
                prefixed = Unit(unit.dimensions, unit.factor * Fraction(_PREFIXES[prefix]))
                spelled = [prefix_name + name for name in names.split() if len(name) > 1]
                _UNITS.update(dict.fromkeys((prefix + symbol, *spelled), prefixed))
    same_word: dict[str, set[Unit]] = {}
    for name, unit in _UNITS.items():
        same_word.setdefault(name.casefold(), set()).add(unit)
    _UNITS_BY_WORD.update({word: units.pop() for word, units in same_word.items() if len(units) == 1})


_UNITS: dict[str, Unit] = {}
_UNITS_BY_WORD: dict[str, Unit] = {}
"""By name without case, where only one unit is written so."""
_fill_tables()
