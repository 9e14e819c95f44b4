import json
import math

import pytest

from perl_megatron.verification.report import Item, Report, Row

GOOD, BAD = Item("good", 1e-6, 1e-5), Item("bad", 2e-5, 1e-5)


@pytest.mark.parametrize("error", [1.1e-5, math.inf, math.nan])
def test_an_error_above_the_tolerance_or_none_at_all_does_not_pass(error):
    row = Row("check", (GOOD, Item("off", error, 1e-5), GOOD))
    assert not row.passed
    assert row.worst.name == "off"


def test_the_worst_item_is_the_one_nearest_to_its_own_tolerance():
    assert Row("check", (Item("large", 0.5, 1.0), Item("strict", 0.9e-6, 1e-6))).worst.name == "strict"
    assert Row("check", (Item("same", 0.0, 0.0), Item("other bits", 1e-9, 0.0), BAD)).worst.name == "other bits"


def test_nothing_compared_does_not_pass():
    assert not Row("check", ()).passed
    assert not Report("layout", {}, ()).passed


def test_one_failing_row_fails_the_report_and_is_named():
    report = Report("pipeline 2", {"parallel": {"pipeline": 2}}, (Row("first", (GOOD,)), Row("second", (GOOD, BAD))))
    assert not report.passed
    text = report.render()
    assert text.endswith("FAILED: second")
    assert max(map(len, text.splitlines())) <= 120
    assert Report("one", {}, (Row("first", (GOOD,)),)).render().endswith("in all 1 checks")


def test_json_is_strict_and_holds_every_item():
    report = Report("one", {"tied": True}, (Row("check", (GOOD, Item("off", math.nan, 1e-5))),))

    def refuse(constant):
        raise AssertionError(constant)

    content = json.loads(report.as_json(), parse_constant=refuse)
    assert (content["passed"], content["settings"]) == (False, {"tied": True})
    (row,) = content["rows"]
    assert row["worst"] == {"name": "off", "error": "nan", "tolerance": 1e-5, "passed": False}
    assert [item["name"] for item in row["items"]] == ["good", "off"]
