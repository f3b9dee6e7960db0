import pytest

from moekit.lookup import look_up


def test_without_a_near_match_all_names_are_listed():
    with pytest.raises(ValueError, match=r"unknown thing 'zzz'\. Known: a, b"):
        look_up({"b": 1, "a": 2}, "zzz", what="thing")
