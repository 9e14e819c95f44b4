"""Numbers with units: what is one, what converts, what is refused."""

from fractions import Fraction

import pytest

from perl_megatron.reward.quantities import read_known_unit, read_quantity, read_unit


def same(first: str, second: str) -> bool:
    return read_unit(first) is not None and read_unit(first) == read_unit(second)


@pytest.mark.parametrize(
    ("first", "second"),
    [
        ("cm", "centimeters"),
        ("cm", "CM"),
        ("cm^2", "cm²"),
        ("cm^{2}", "square centimetres"),
        ("sq. ft", "square feet"),
        ("m/s", "meters per second"),
        ("m/s^2", "m s^{-2}"),
        ("m/s^2", "m/s/s"),
        ("km/h", "kph"),
        ("N·m", "J"),
        ("N \\cdot m", "J"),
        ("W h", "Wh"),
        ("mL", "cm^3"),
        ("\\mu m", "µm"),
        ("^\\circ", "degrees"),
        ("^{\\circ}C", "°C"),
        ("degrees Celsius", "°C"),
        ("degrees F", "Fahrenheit"),
        ("deg", "°"),
        ("$", "USD"),
        ("dollars", "\\$"),
        ("apples", "Apple"),
        ("people/km^2", "people per square kilometer"),
        ("%", "percent"),
    ],
)
def test_one_unit_in_two_spellings(first, second):
    assert same(first, second)


@pytest.mark.parametrize(
    ("first", "second"),
    [
        ("cm", "m"),
        ("cm", "cm^2"),
        ("mW", "MW"),
        ("g", "kg"),
        ("°C", "°F"),
        ("$", "€"),
        ("¥", "yuan"),
        ("apples", "pears"),
    ],
)
def test_different_units(first, second):
    assert not same(first, second)


@pytest.mark.parametrize("text", ["", "5", "cm or 6", "(m)", "m^", "m^22", "m" * 200, "\\frac{m}{s}"])
def test_not_a_unit(text):
    assert read_unit(text) is None


@pytest.mark.parametrize(
    ("answer", "unit", "value"),
    [
        ("12 cm", "cm", 12),
        ("12cm", "cm", 12),
        ("12", "cm", 12),
        ("$12$", "cm", 12),
        ("0.12\\,\\text{m}", "cm", 12),
        ("120\\ \\mathrm{mm}", "cm", 12),
        ("\\text{12 cm}", "cm", 12),
        ("1,200 mm", "cm", 120),
        ("1\\,200\\,mm", "cm", 120),
        ("2 min", "s", 120),
        ("1.5 hours", "min", 90),
        ("1 ft", "in", 12),
        ("36 km/h", "m/s", 10),
        ("1 L", "cm^3", 1000),
        ("1 kWh", "J", 3600000),
        ("\\frac{1}{2} m", "cm", 50),
        ("3/4 cup", "cups", Fraction(3, 4)),
        ("\\$5", "dollars", 5),
        ("-$5", "$", -5),
        ("$5", "USD", 5),
        ("5 dollars", "$", 5),
        ("$5 USD", "$", 5),
        ("50 cents", "$", Fraction(1, 2)),
        ("$15/hour", "dollars per hour", 15),
        ("50\\%", "%", 50),
        ("50", "%", 50),
        ("90^\\circ", "degrees", 90),
        ("25 °C", "°C", 25),
        ("5 apples", "apple", 5),
        ("12 g", "cm", None),
        ("12 cm^2", "cm", None),
        ("€5", "$", None),
        ("$5", "€", None),
        ("25 °F", "°C", None),
        ("1 year", "days", None),
        ("90°", "rad", None),
    ],
)
def test_value_in_the_expected_unit(answer, unit, value):
    quantity, wanted = read_quantity(answer), read_unit(unit)
    assert quantity is not None
    assert wanted is not None
    assert quantity.in_unit(wanted) == value


@pytest.mark.parametrize(
    "answer",
    [
        "",
        "cm",
        "5 or 6",
        "5 cm or 6 cm",
        "5 m, 3 cm",
        "1/0 m",
        "1,23 m",
        "½ m",
        "10² m",
        "6:30 pm",
        "5-6 cm",
        "$5 €",
        "9" * 1001,
    ],
)
def test_not_a_quantity(answer):
    assert read_quantity(answer) is None


@pytest.mark.parametrize(
    ("text", "apart", "known"),
    [
        *((" m", True, True), ("m", False, False), ("m^2", False, False), ("km", False, True), ("m/s", False, True)),
        *((" n", True, False), ("mn", False, False), ("mN", False, True), ("gt^2", False, False), (" h", True, True)),
        *(("°", False, True), ("%", False, True), ("°C", False, True), ("元", False, True), ("apples", True, False)),
        *((" points", True, True), ("or 3", True, False), ("x", True, False), ("", True, False), ("KM", True, True)),
    ],
)
def test_known_units(text, apart, known):
    """What follows a number is a unit, and no product of variables."""
    assert (read_known_unit(text, apart=apart, others=frozenset({"point"})) is not None) == known
