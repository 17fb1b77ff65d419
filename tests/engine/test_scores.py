"""Each score stands beside its own chance and interval, in the real shapes that evaluators return."""

from __future__ import annotations

from vlm_train.engine.scores import cells, controls_of, counts_of, scores_of

RETRIEVAL = {
    "step": 7,
    "text_to_image": {"R@1": 20.0, "R@5": 40.0},
    "image_to_text": {"R@1": 30.0, "R@5": 50.0},
    "num_pairs": 40,
    "num_images": 20,
    "chance": {"R@1": 5.0, "R@5": 25.0},
    "chance_image_to_text": {"R@1": 5.1, "R@5": 26.0},
    "interval_95": {
        "text_to_image": {"R@1": [8.0, 40.0], "R@5": [20.0, 60.0]},
        "image_to_text": {"R@1": [14.0, 52.0], "R@5": [30.0, 70.0]},
    },
}
ZERO_SHOT = {
    "step": 7,
    "top1": 50.0,
    "top5": 90.0,
    "macro_top1": 45.0,
    "interval_95": [30.0, 70.0],
    "chance": {"top1": 10.0, "top5": 50.0},
    "majority_class": 56.0,
    "num_images": 20,
}
VQA = {
    "exact_match": 40.0,
    "f1": 50.0,
    "exact_match_shuffled_images": 12.0,
    "text_blind_prior": 10.0,
    "num_questions": 9,
}


def test_groups_have_their_own_chance_and_interval() -> None:
    found = [(score.name, score.value, score.chance, score.interval) for score in scores_of(RETRIEVAL)]
    assert found == [
        ("text to image R@1", 20.0, 5.0, (8.0, 40.0)),
        ("text to image R@5", 40.0, 25.0, (20.0, 60.0)),
        ("image to text R@1", 30.0, 5.1, (14.0, 52.0)),
        ("image to text R@5", 50.0, 26.0, (30.0, 70.0)),
    ]
    assert controls_of(RETRIEVAL) == {} and counts_of(RETRIEVAL) == {"pairs": 40, "images": 20}


def test_a_bare_interval_belongs_to_the_first_score_only() -> None:
    found = [(score.name, score.chance, score.interval) for score in scores_of(ZERO_SHOT)]
    assert found == [("top1", 10.0, (30.0, 70.0)), ("top5", 50.0, None), ("macro top1", 10.0, None)]
    assert controls_of(ZERO_SHOT) == {"majority_class": 56.0}


def test_controls_are_not_scores() -> None:
    assert [score.name for score in scores_of(VQA)] == ["exact match", "f1"]
    assert controls_of(VQA) == {"exact_match_shuffled_images": 12.0, "text_blind_prior": 10.0}
    assert [score.chance for score in scores_of(VQA)] == [None, None]


COMPOSITION = {
    "accuracy": {"all": 70.0, "order": 60.0},
    "chance": 50.0,
    "blind": {"all": 51.0, "order": 52.0},
    "interval_95": {"accuracy": {"all": [60.0, 80.0]}},
    "spread": {"all": 1.0},
    "settings": {"l2": 0.1},
    "held_out_types": ["order"],
}


def test_a_control_of_each_score_is_a_column() -> None:
    assert controls_of(COMPOSITION) == {}
    header, rows = cells(scores_of(COMPOSITION), interval=".1f")
    assert header == ["score", "chance", "blind", "95% interval"]
    assert rows == [["accuracy all", "70.00", "50.00", "51.00", "60.0 to 80.0"],
                    ["accuracy order", "60.00", "50.00", "52.00", ""]]  # fmt: skip
    assert cells(scores_of(ZERO_SHOT), interval=".1f")[0] == ["score", "chance", "95% interval"]
