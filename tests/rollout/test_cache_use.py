from perl_megatron.rollout.cache_use import CacheUse


def test_hit_rates():
    use = CacheUse(100, 60, 8, 2) + CacheUse(100, 20, 0, 0)
    assert use.metrics() == {"rollout/prefix_hit_rate": 0.4, "rollout/image_hit_rate": 0.75}
    assert CacheUse(10, 0, 0, 0).metrics() == {"rollout/prefix_hit_rate": 0.0}
    assert CacheUse().metrics() == {}
