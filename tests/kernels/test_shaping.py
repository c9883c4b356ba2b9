"""Logits that requests shape: on the device they are those of the host bit for bit, and so are the tokens."""

import gc
import weakref
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings, strategies as st
from torch import Tensor

from inference_service.api.requests.terms import completing
from inference_service.core.sampling import SamplingParams
from inference_service.core.sequence import Sequence as EngineSequence, Token
from inference_service.engine.execution import sampler
from inference_service.engine.execution.shaping import Reading, Shaper
from inference_service.engine.kernels.sampling import ShapingTables, pack_shapes, sample_shaped
from inference_service.engine.kernels.sampling.shaping import PIECE, ShapedRow, ShapingState
from loramux_shared.bases.memory import shaping_bytes
from tests.support.examples import examples
from tests.support.grammars import ScriptedGrammar, mask_of

VOCAB = 2100
"""Two tiles, and no whole words of a mask."""
SEQS = 8
FEW = 6
"""Tokens that answers are made of, so that all that looks back finds something."""


def shifting(tokens: Sequence[int]) -> ScriptedGrammar:
    """A grammar that allows some tokens, shifted by each that came."""
    return ScriptedGrammar(lambda before: [(each + sum(before) + len(before)) % VOCAB for each in tokens])


few = st.integers(0, FEW - 1)
tokens = st.one_of(few, st.integers(0, VOCAB - 1))
WORDS = st.lists(st.lists(few, min_size=1, max_size=3).map(tuple), max_size=9).map(completing)
REQUESTS = st.fixed_dictionaries(
    {
        "prompt": st.lists(tokens, min_size=1, max_size=5),
        "answer": st.lists(few, max_size=6),
        "grammar": st.one_of(st.none(), st.lists(tokens, max_size=9)),
        "sampling": st.fixed_dictionaries(
            {"seed": st.integers(0, 99)},
            optional={
                "temperature": st.sampled_from([0.7, 5.0]),
                "top_k": st.just(3),
                "top_p": st.just(0.8),
                "repetition_penalty": st.floats(0.01, 10),
                "presence_penalty": st.floats(-2, 2),
                "frequency_penalty": st.floats(-2, 2),
                "logit_bias": st.dictionaries(tokens, st.floats(-100, 100), max_size=5),
                "allowed_token_ids": st.lists(tokens, max_size=9).map(mask_of),
                "bad_words": WORDS,
                "min_tokens": st.integers(0, 8),
                "stop_token_ids": st.frozensets(tokens, max_size=4),
                "logprobs": st.just(2),
                "logprobs_mode": st.sampled_from(["raw", "processed"]),
            },
        ),
    }
)
LISTS = st.lists(REQUESTS, min_size=1, max_size=SEQS)
TRIED: dict[str, Any] = {"deadline": None, "suppress_health_check": [HealthCheck.function_scoped_fixture]}


def seq_of(request: dict[str, Any]) -> EngineSequence:
    grammar = None if request["grammar"] is None else shifting(request["grammar"])
    params = SamplingParams(**request["sampling"])
    seq = EngineSequence("s", list(request["prompt"]), params, grammar=grammar)
    seq.progress.tokens += request["answer"]
    return seq


def logits_of(rows: int, device: str, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    """Random logits, some of them -inf."""
    made = torch.randn(rows, VOCAB, generator=torch.Generator().manual_seed(seed)) * 3
    made[:, 7::50] = -torch.inf
    return made.to(device, dtype)


def drawn(shaper: Shaper, logits: Tensor, seqs: Sequence[EngineSequence]) -> list[Token]:
    """Return the tokens that the runner draws from the shaped rows of a step."""
    ids = torch.zeros(len(seqs), dtype=torch.int32, device=logits.device)
    return Reading(logits, ids, seqs, shaper).wait()


@settings(max_examples=examples(40), **TRIED)
@given(LISTS, st.sampled_from([torch.float32, torch.bfloat16, torch.float16]))
def test_shaped_logits_are_those_of_the_host_bit_by_bit(
    device: str, requests: list[dict[str, Any]], dtype: torch.dtype
) -> None:
    """Every combination of a request's options draws the same token, and the model's own logits stay."""
    seqs = [seq_of(request) for request in requests]
    logits = logits_of(len(seqs), device, dtype)
    before = logits.clone()
    shaper = Shaper(SEQS, VOCAB, logits.device)
    rows = shaper.rows(seqs)
    if not rows:
        return
    tables = shaper.tables(rows)
    ids = torch.zeros(len(seqs), dtype=torch.int32, device=device)
    sample_shaped(logits, tables, shaper.state, ids)
    expected = torch.stack([sampler.shape(logits[row.row].cpu(), row.seq) for row in rows])
    torch.testing.assert_close(tables.shaped.cpu(), expected, rtol=0, atol=0)
    assert torch.equal(logits, before)
    host = sampler.sample(logits.cpu(), seqs)
    assert [(int(ids[row.row]), bool(shaper.state.impossible[row.row])) for row in rows] == [
        (host[row.row].id, host[row.row].impossible) for row in rows
    ]


@settings(max_examples=examples(15), **TRIED)
@given(LISTS, st.integers(0, 9))
def test_tokens_in_flight_are_counted(device: str, requests: list[dict[str, Any]], seed: int) -> None:
    """Five steps, each submitted before the tokens of the one before are known: they are those of the host."""
    known = [seq_of(request) for request in requests]
    ahead = [seq_of(request) for request in requests]
    shaper = Shaper(SEQS, VOCAB, torch.device(device))
    ids = torch.zeros(SEQS, dtype=torch.int32, device=device)
    pending: Reading | None = None
    for step in range(5):
        logits = logits_of(len(known), device, seed=seed * 9 + step)
        expected = sampler.sample(logits.cpu(), known)
        for seq, token in zip(known, expected, strict=True):
            append(seq, token.id)
        plain = [row for row, seq in enumerate(ahead) if not sampler.shapes(seq, seq.num_generated)]
        for row in plain:  # what the step's own draw does
            ids[row] = expected[row].id
        following = Reading(logits, ids, ahead, shaper)
        for seq in ahead:
            seq.progress.in_flight += 1
        if pending is not None:
            resolve(ahead, pending)
        following.finish()
        pending = following
    resolve(ahead, pending)
    assert [seq.progress.tokens for seq in ahead] == [seq.progress.tokens for seq in known]


@pytest.mark.parametrize("own", [{"temperature": 0.7, "top_k": 5}, {"temperature": 0.0}], ids=str)
def test_processed_log_probabilities_are_those_of_the_host(device: str, own: dict[str, Any]) -> None:
    """Processed log probabilities are equal with a grammar and without, beside plain rows and raw ones."""
    usual: dict[str, Any] = {"seed": 3, "logprobs": 4, **own}
    shaping: dict[str, Any] = {"logit_bias": {8: 4.0, 9: -3.0}, "repetition_penalty": 1.3}
    requests = [
        {
            "prompt": [3, 4],
            "answer": [5],
            "grammar": grammar,
            "sampling": {**usual, **shape, "logprobs_mode": mode},
        }
        for mode in ("raw", "processed")
        for shape in ({}, shaping)
        for grammar in (None, [*range(30)])
    ][:SEQS]
    seqs = [seq_of(request) for request in requests]
    logits = logits_of(len(seqs), device)
    expected = sampler.sample(logits.cpu(), seqs)
    ids = torch.tensor([token.id for token in expected], dtype=torch.int32, device=device)
    found = Reading(logits, ids, seqs, Shaper(SEQS, VOCAB, logits.device)).wait()
    assert [token.id for token in found] == [token.id for token in expected]
    for one, other in zip(found, expected, strict=True):
        assert one.logprob == pytest.approx(other.logprob, abs=1e-5)
        assert dict(one.top) == pytest.approx(dict(other.top), abs=1e-5)
        assert one.rank == other.rank


def append(seq: EngineSequence, token: int) -> None:
    seq.progress.tokens.append(token)
    if seq.grammar is not None:
        seq.grammar.accept(token)


def resolve(seqs: Sequence[EngineSequence], reading: Reading) -> None:
    for seq, token in zip(seqs, reading.wait(), strict=True):
        seq.progress.in_flight -= 1
        append(seq, token.id)


EVERYTHING: dict[str, Any] = {
    "prompt": [3, 4, 1999],
    "answer": [5, 5, 1],
    "grammar": [*range(2000)],
    "sampling": {
        "temperature": 0.9,
        "top_p": 0.9,
        "seed": 3,
        "repetition_penalty": 1.3,
        "presence_penalty": 0.5,
        "frequency_penalty": 0.25,
        "logit_bias": {8: 4.0, 9: -3.0},
        "allowed_token_ids": mask_of(range(1, 2050)),
        "bad_words": completing([(1, 8), (8,), (5, 1, 11)]),
        "min_tokens": 9,
        "stop_token_ids": frozenset({2, 12}),
        "logprobs": 1,
    },
}
PLAIN: dict[str, Any] = {"prompt": [1], "answer": [], "grammar": None, "sampling": {}}


def test_the_batch_makes_no_difference(device: str) -> None:
    """A row alone, among plain ones, and at the end of more than are shaped at once."""
    num = PIECE + 3
    logits = logits_of(1, device, seed=5).expand(num, -1).contiguous()
    alone = drawn(Shaper(1, VOCAB, logits.device), logits[:1], [seq_of(EVERYTHING)])
    others = [seq_of({**PLAIN, "sampling": {"logit_bias": {2 * row: 50.0}}}) for row in range(num - 2)]
    together = drawn(Shaper(num, VOCAB, logits.device), logits, [*others, seq_of(PLAIN), seq_of(EVERYTHING)])
    assert together[-1] == alone[0]
    assert [token.id for token in together[:-2]] == [*range(0, 2 * num - 4, 2)]


def test_a_row_that_nothing_is_left_of_says_so_each_time(device: str) -> None:
    """A row without an allowed token is reported, and no other row or step is."""
    nothing = {**PLAIN, "grammar": []}
    something = {**PLAIN, "grammar": [4]}
    shaper = Shaper(2, VOCAB, torch.device(device))
    for requests, expected in (([nothing, something], [True, False]), ([something, nothing], [False, True])):
        found = drawn(shaper, logits_of(2, device), [seq_of(each) for each in requests])
        assert [token.impossible for token in found] == expected
        gc.collect()


def test_a_sequence_finds_its_place_again_or_a_new_one(device: str) -> None:
    """Three sequences that share two places are drawn as on the host; a finished one frees its place."""
    shaper = Shaper(2, VOCAB, torch.device(device))
    seqs = [seq_of({**EVERYTHING, "sampling": {"presence_penalty": 2.0, "seed": row}}) for row in range(3)]
    for step in range(6):
        turn = [seqs[step % 3], seqs[(step + 1) % 3]]
        logits = logits_of(2, device, seed=step)
        expected = sampler.sample(logits.cpu(), turn)
        assert drawn(shaper, logits, turn) == expected
        for seq, token in zip(turn, expected, strict=True):
            append(seq, token.id)
    refs = [weakref.ref(seq) for seq in seqs]
    del turn, seq
    seqs.clear()
    gc.collect()
    assert all(ref() is None for ref in refs)


def test_memory_is_taken_on_demand_and_within_the_plan(device: str) -> None:
    """A bias takes no memory, allowed tokens take masks, penalties take counts; the sum is as planned."""
    shaper = Shaper(SEQS, VOCAB, torch.device(device))
    sizes = [shaper.state.num_bytes]
    for sampling in ({"logit_bias": {1: 1.0}}, {"allowed_token_ids": b"\x05"}, {"presence_penalty": 1.0}):
        drawn(shaper, logits_of(1, device), [seq_of({**PLAIN, "sampling": sampling})])
        sizes.append(shaper.state.num_bytes)
    assert sizes[0] == sizes[1] < 100
    assert sizes[2] - sizes[1] == SEQS * -(-VOCAB // 32) * 4
    assert sizes[3] - sizes[2] == SEQS * VOCAB * 4
    scratch = shaper.tables(shaper.rows([seq_of(EVERYTHING)] * 1))
    rows = min(SEQS, PIECE)
    assert sizes[3] + rows * scratch.shaped.nbytes <= shaping_bytes(SEQS, VOCAB)


def test_what_does_not_fit_is_refused(device: str) -> None:
    """A ValueError names the expected shape and the actual one."""
    state = ShapingState(2, VOCAB, device)
    row = ShapedRow(0, 0, sampler.row_params(seq_of(PLAIN), 0))
    packed = torch.from_numpy(pack_shapes([row], VOCAB)).to(device)
    tables, ids = ShapingTables.over(packed, 1, VOCAB), torch.zeros(3, dtype=torch.int32, device=device)
    with pytest.raises(ValueError, match=f"logits must have {VOCAB} columns, got 64"):
        sample_shaped(torch.zeros(1, 64, device=device), tables, state, ids[:1])
    with pytest.raises(ValueError, match="3 rows, but a state for 2"):
        sample_shaped(torch.zeros(3, VOCAB, device=device), tables, state, ids)
