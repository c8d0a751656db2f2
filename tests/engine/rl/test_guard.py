"""The guard speaks when held-out AP50 falls while the reward rises, and in no other case."""

import pytest

from engine.rl.guard import OverOptimisationGuard


def spoken(guard: OverOptimisationGuard, history: list[tuple[float | None, float]]) -> list[bool]:
    return [guard.update(100 * i, reward, ap50) is not None for i, (reward, ap50) in enumerate(history)]


def test_speaks_after_patience_bad_evaluations_in_a_row():
    history = [(0.5, 0.60), (0.6, 0.57), (0.7, 0.57), (0.8, 0.50)]
    assert spoken(OverOptimisationGuard("warn"), history) == [False, False, True, True]
    assert spoken(OverOptimisationGuard("warn", patience=1), history) == [False, True, True, True]
    assert spoken(OverOptimisationGuard("warn", drop=0.05), history) == [False, False, False, False]
    assert spoken(OverOptimisationGuard("off"), history) == [False] * 4


def test_one_good_evaluation_in_between_starts_the_count_again():
    history = [(0.5, 0.60), (0.6, 0.57), (0.7, 0.59), (0.8, 0.57), (0.9, 0.57)]
    assert spoken(OverOptimisationGuard("warn"), history) == [False, False, False, False, True]


def test_a_drop_of_exactly_the_bound_is_allowed():
    assert spoken(OverOptimisationGuard("warn", drop=0.25, patience=1), [(0.5, 0.75), (0.6, 0.5)]) == [False, False]


def test_silent_when_the_reward_falls_too():
    history = [(0.5, 0.60), (0.5, 0.40), (0.4, 0.30), (0.3, 0.20)]
    assert spoken(OverOptimisationGuard("stop"), history) == [False] * 4


def test_compares_with_the_reward_at_the_best_not_at_the_start():
    history = [(0.5, 0.60), (0.9, 0.70), (0.8, 0.60), (0.8, 0.60)]
    assert spoken(OverOptimisationGuard("warn"), history) == [False] * 4


def test_slow_decline_is_measured_from_the_best():
    history = [(0.5, 0.60), (0.6, 0.59), (0.7, 0.58), (0.8, 0.57), (0.9, 0.56)]
    assert spoken(OverOptimisationGuard("warn"), history) == [False, False, False, False, True]


def test_before_the_first_update_there_is_no_reward():
    guard = OverOptimisationGuard("warn")
    assert spoken(guard, [(None, 0.60), (0.5, 0.50), (0.6, 0.50), (0.7, 0.50)]) == [False, False, False, True]
    assert guard.state() == {"best_step": 0, "best_ap50": 0.60, "best_reward": 0.5, "num_bad": 2}


def test_the_message_says_both_values_and_where_to_go_back():
    guard = OverOptimisationGuard("stop", patience=1, brake="--anchor")
    guard.update(100, 0.5, 0.6)
    message = guard.update(200, 0.75, 0.5)
    assert message is not None
    for part in ("step 200", "50.0 %", "60.0 %", "step 100", "0.5000 to 0.7500", "raise --anchor or"):
        assert part in message
    assert guard.stops and not OverOptimisationGuard("warn").stops


@pytest.mark.parametrize("cut", [1, 2, 3, 4])
def test_a_restored_guard_goes_on_as_if_never_interrupted(cut):
    history = [(None, 0.6), (0.6, 0.55), (0.7, 0.55), (0.8, 0.55), (0.9, 0.7), (1.0, 0.6), (1.1, 0.6)]
    whole = spoken(OverOptimisationGuard("warn"), history)
    first, second = OverOptimisationGuard("warn"), OverOptimisationGuard("warn")
    before = spoken(first, history[:cut])
    second.restore(first.state())
    assert before + spoken(second, history[cut:]) == whole
    assert any(whole)


def test_bad_values_are_refused():
    guard = OverOptimisationGuard("warn")
    with pytest.raises(ValueError, match="AP50 .* nan"):
        guard.update(1, 0.5, float("nan"))
    with pytest.raises(ValueError, match="AP50 .* 55"):
        guard.update(1, 0.5, 55.0)
    with pytest.raises(ValueError, match="reward .* inf"):
        guard.update(1, float("inf"), 0.5)
    with pytest.raises(ValueError, match=r"missing fields \['num_bad'\], unknown fields \['x'\]"):
        guard.restore({"best_step": 1, "best_ap50": 0.5, "best_reward": 0.5, "x": 1})
