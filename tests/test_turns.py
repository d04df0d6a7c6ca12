"""Tests that take minutes run in turns: each comes round, what a change touches comes first, and a turn has an end."""

from hypothesis import given
from hypothesis import strategies as st
from turns import THIRDS, LongTest, choose, thirds

tests_of_minutes = st.lists(st.floats(0.5, 6.0), min_size=1, max_size=60).map(
    lambda minutes: [
        LongTest(name=f"tests/test_{number}.py::test", minutes=each, subjects=(f"part{number % 5}/",))
        for number, each in enumerate(minutes)
    ]
)


@given(tests=tests_of_minutes)
def test_the_three_turns_are_all_tests_once_and_take_about_as_long(tests: list[LongTest]):
    parts = thirds(tests)
    assert sorted(test.name for part in parts for test in part) == sorted(test.name for test in tests)
    minutes = [sum(test.minutes for test in part) for part in parts]
    assert max(minutes) - min(minutes) <= max(test.minutes for test in tests)


@given(tests=tests_of_minutes, turn=st.integers(0, 2**32))
def test_without_an_end_three_turns_in_a_row_run_every_test(tests: list[LongTest], turn: int):
    chosen = [test for number in range(THIRDS) for test in choose(tests, turn + number, [], minutes=1e9)]
    assert sorted(test.name for test in chosen) == sorted(test.name for test in tests)


@given(tests=tests_of_minutes, turn=st.integers(0, 2**32), minutes=st.floats(1, 30))
def test_what_a_change_touches_comes_first_and_a_turn_takes_no_longer_than_it_may(tests, turn, minutes):
    chosen = choose(tests, turn, ["part3/file.py"], minutes)
    assert len(chosen) == 1 or sum(test.minutes for test in chosen) <= minutes
    touched = [test for test in tests if test.subjects == ("part3/",)]
    if touched and sum(test.minutes for test in touched) <= minutes:
        assert {test.name for test in touched} <= {test.name for test in chosen}


def test_a_test_is_touched_by_its_subject_and_by_its_own_file():
    test = LongTest(
        name="x", minutes=1, subjects=("cluster/workers/", "shards/store.py"), file="tests/cluster/test_x.py"
    )
    assert test.is_touched(["README.md", "cluster/workers/launch.py"])
    assert test.is_touched(["tests/cluster/test_x.py"])
    assert not test.is_touched(["cluster/engine.py", "shards/stores.md"])
