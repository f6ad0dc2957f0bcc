"""Results that are remembered: which, how many, and by what."""

from lora_hub.recent import MOST, Recent, RecentOfSame


def test_a_result_is_kept_from_its_second_time_on() -> None:
    recent: Recent[str] = Recent()

    recent.keep(b"key", "value")
    first = recent.get(b"key")
    recent.keep(b"key", "value")

    assert (first, recent.get(b"key")) == (None, "value")


def test_the_result_that_was_not_asked_for_longest_goes() -> None:
    recent: Recent[int] = Recent()

    for number in range(MOST + 1):
        for _ in range(2):
            recent.keep(number, number + 1)
        recent.get(0)

    assert recent.get(0) == 1
    assert recent.get(1) is None
    assert recent.get(MOST) == MOST + 1


def test_equal_values_that_are_not_the_same_are_no_key() -> None:
    recent: RecentOfSame[str] = RecentOfSame()
    mine, other = [1], [1]

    for _ in range(2):
        recent.keep(mine, result="value")

    assert recent.get(mine) == "value"
    assert recent.get(other) is None


def test_a_value_that_is_gone_leaves_its_place_to_no_other() -> None:
    recent: RecentOfSame[str] = RecentOfSame()
    lost = []

    for _ in range(200):
        value = [0]
        for _ in range(2):
            recent.keep(value, result="value")
        del value
        lost.append(recent.get([0]))

    assert lost == [None] * 200
