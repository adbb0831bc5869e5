"""Requests about one image stay on one replica, whatever comes and goes, and none of them starves."""

from __future__ import annotations

from collections import Counter

from endpoint_app import ask

from mmedpo_ray.serve.image_router import LOAD_BOUND, image_key, rank_replicas

KEYS = [number.to_bytes(8, "big") for number in range(600)]
IDLE = dict.fromkeys(("a", "b", "c"), 0)


def test_the_key_is_that_of_the_first_image() -> None:
    def key(*urls: str, text: str = "Q") -> bytes | None:
        return image_key({"messages": ask(*urls, text=text)})

    assert key("data:x,1") == key("data:x,1", "data:x,2", text="Another question?") != key("data:x,2")
    assert key() is None
    assert image_key({"messages": [{"role": "user", "content": "Hello"}]}) is None
    assert image_key({"prompt": "Hello"}) is None


def test_images_spread_evenly_and_keep_their_replica() -> None:
    first = [rank_replicas(key, IDLE)[0] for key in KEYS]
    assert all(150 < count < 250 for count in Counter(first).values())
    assert [rank_replicas(key, dict(reversed(IDLE.items())))[0] for key in KEYS] == first
    more = [rank_replicas(key, IDLE | {"d": 0})[0] for key in KEYS]
    assert all(new in (old, "d") for new, old in zip(more, first, strict=True))
    fewer = [rank_replicas(key, {"a": 0, "b": 0})[0] for key in KEYS]
    assert all(new == old for new, old in zip(fewer, first, strict=True) if old != "c")


def test_a_busy_replica_is_passed_over_but_never_lost() -> None:
    loads = {"a": 30, "b": 2, "c": 2}
    for key in KEYS[:50]:
        ranked = rank_replicas(key, loads)
        assert ranked[-1] == "a" and set(ranked) == set(loads)


def test_one_hot_image_spreads_over_all_replicas() -> None:
    loads = Counter(IDLE)
    for _ in range(90):
        loads[rank_replicas(KEYS[0], loads)[0]] += 1
    assert max(loads.values()) <= LOAD_BOUND * 30 + 1
