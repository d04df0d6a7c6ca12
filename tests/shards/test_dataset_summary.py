"""What a data set holds, counted from its index."""

from shards.summary import quantiles


def test_medians_are_of_videos_and_not_of_lengths():
    assert quantiles({100: 1, 200: 1, 300: 5}) == (1.0, 3.0, 3.0)  # pyright: ignore[reportArgumentType]
    assert quantiles({100: 5, 200: 1}) == (1.0, 1.0, 2.0)  # pyright: ignore[reportArgumentType]
    assert quantiles({}) == (0.0, 0.0, 0.0)  # pyright: ignore[reportArgumentType]
