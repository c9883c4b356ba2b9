"""A base's own mode of pooling, and the map from numbers to vectors."""

import json
from pathlib import Path

import numpy as np
import pytest

from inference_service.adapters.texts import Scorer
from inference_service.api.requests.pooling import check_dimensions, pooling_of, shaped
from loramux_shared.bundle.manifest import ScoreHead
from loramux_shared.faults import CheckpointInvalid, RequestInvalid
from loramux_shared.runtime import FILE, PROMPTS, Pooling, pooling_in, prompts_in
from tests.support.cases import cases


@pytest.mark.parametrize(("fields", "pooling"), cases(__file__, "test_how_a_base_was_trained_to_make_vectors"))
def test_how_a_base_was_trained_to_make_vectors(tmp_path: Path, fields: object, pooling: str | None):
    """A base's mode is read in both forms of sentence-transformers; an unserved mode gives none."""
    if fields is not None:
        (tmp_path / FILE).parent.mkdir()
        (tmp_path / FILE).write_text(json.dumps(fields))
    assert pooling_in(tmp_path) == pooling


def test_the_prompts_that_a_base_was_trained_with(tmp_path: Path) -> None:
    """A base without the file, or whose mean leaves prompts out, has none; what is no text is refused."""
    assert prompts_in(tmp_path) == {}
    (tmp_path / PROMPTS).write_text('{"prompts": {"query": "find: "}, "default_prompt_name": null}')
    assert prompts_in(tmp_path) == {"query": "find: "}
    (tmp_path / FILE).parent.mkdir()
    (tmp_path / FILE).write_text('{"include_prompt": false}')
    assert prompts_in(tmp_path) == {}
    for wrong in ('{"prompts": ["find: "]}', '{"prompts": {"query": 1}}', "[]", "{"):
        (tmp_path / PROMPTS).write_text(wrong)
        with pytest.raises(CheckpointInvalid, match=PROMPTS):
            prompts_in(tmp_path)


@pytest.mark.parametrize("text", ["[]", "{"])
def test_a_file_that_says_nothing_that_can_be_meant(tmp_path: Path, text: str) -> None:
    """A base with an invalid file of pooling is refused, with the file's name."""
    (tmp_path / FILE).parent.mkdir()
    (tmp_path / FILE).write_text(text)
    with pytest.raises(CheckpointInvalid, match="1_Pooling"):
        pooling_in(tmp_path)


def test_a_request_comes_before_what_is_usual() -> None:
    """A request must name its mode where the default is not served."""
    assert pooling_of("mean", Pooling.LAST) is Pooling.MEAN
    assert pooling_of(None, Pooling.MEAN) is Pooling.MEAN
    assert pooling_of("last", None) is Pooling.LAST
    with pytest.raises(RequestInvalid, match="not served") as refused:
        pooling_of(None, None)
    assert refused.value.findings[0].where == "pooling"
    with pytest.raises(RequestInvalid):
        check_dimensions(3, 2)


def test_numbers_of_a_vector() -> None:
    """Cut, then of length 1; zeros have no direction, and stay zeros."""
    vector = np.array([3, 4, 12], np.float32)
    assert shaped(vector, 2, normalize=True).tolist() == pytest.approx([0.6, 0.8])
    assert shaped(vector, 2, normalize=False).tolist() == [3, 4]
    assert np.linalg.norm(shaped(vector, None, normalize=True)) == pytest.approx(1)
    assert shaped(0 * vector, None, normalize=True).tolist() == [0, 0, 0]


@pytest.mark.parametrize(("labels", "kind", "expected"), cases(__file__, "test_probabilities_of_labels"))
def test_probabilities_of_labels(labels: int, kind: str | None, expected: list[float]) -> None:
    """Softmax where one label excludes the others, else a sigmoid of each; scores beyond exp stay finite."""
    head = ScoreHead(num_labels=labels, hidden_size=1, problem_type=kind)
    scorer = Scorer(head, np.zeros((labels, 1), np.float32))
    assert scorer.activated(np.arange(labels, dtype=np.float32)).tolist() == pytest.approx(expected)
    far = scorer.activated(np.full(labels, 5000, np.float32) * np.arange(labels, dtype=np.float32))
    assert np.isfinite(far).all()
