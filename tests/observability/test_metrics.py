import ast
from pathlib import Path

import pytest

import perl_megatron
from perl_megatron.observability.metrics import CATALOGUE, catalogue_markdown, check_names, find_metric


def test_names_are_unique_and_explained():
    names = [metric.name for metric in CATALOGUE]
    assert len(names) == len(set(names))
    assert all(metric.unit and metric.meaning for metric in CATALOGUE)


def test_families():
    assert find_metric("seconds/update").name == "seconds/{phase}"
    assert find_metric("seconds/step").name == "seconds/step"
    assert find_metric("groups/dropped").name == "groups/dropped"
    assert find_metric("groups/dropped_no_signal").name == "groups/dropped_{reason}"
    assert find_metric("evaluation/accuracy/look-up").name == "evaluation/accuracy/{kind}"
    assert find_metric("logprob_gap/mean").name == "logprob_gap/mean"
    assert find_metric("logprob_gap/mean_2_images").name == "logprob_gap/mean_{part}"
    assert find_metric("importance/masked_permuted").name == "importance/masked_{part}"
    assert find_metric("seconds/a/b") is None
    assert find_metric("xloss") is None


def test_unknown_name_is_an_error():
    check_names(["loss", "sync/seconds"])
    with pytest.raises(AssertionError, match="my_metric"):
        check_names(["loss", "my_metric"])


def test_markdown_has_a_row_for_each():
    assert len(catalogue_markdown().splitlines()) == len(CATALOGUE) + 2


def test_step_metrics_are_catalogued():
    source = Path(perl_megatron.__file__).with_name("step_metrics.py").read_text()
    names = [
        node.value
        for node in ast.walk(ast.parse(source))
        if isinstance(node, ast.Constant)
        and isinstance(node.value, str)
        and "/" in node.value
        and " " not in node.value
    ]
    check_names(name for name in names if not name.endswith(("_", "/")))
