from growth import is_linear


def test_linear_and_quadratic_work_are_told_apart():
    assert is_linear(lambda size: sum(range(size)), 400_000)
    assert is_linear(lambda size: None, 8)
    assert not is_linear(lambda size: sum(first * second for first in range(size) for second in range(size)), 1600)
