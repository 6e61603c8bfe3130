"""A short run of the soak; `python -m benchmarks.soak` is the long one."""

from benchmarks.soak import soak


def test_faults_and_cancels_at_random_places_change_no_answer():
    figures = soak(seed=1, faults=150, cancels=40, progress=lambda line: None)
    assert sum(figures["faults"].values()) >= 150
    assert figures["ended"]["cancelled"] >= 40
    assert figures["wrong_answers"] == figures["tensors_left"] == 0
