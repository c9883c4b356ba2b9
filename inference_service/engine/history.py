"""What the shaping of logits keeps of a sequence from step to step: a step costs its new tokens alone."""

from __future__ import annotations

from weakref import WeakKeyDictionary

import torch

from inference_service.core.sequence import Sequence


class History:
    """The distinct tokens of a sequence and their counts, and its bias, as tensors."""

    def __init__(self, seq: Sequence) -> None:
        self.tokens = torch.empty(0, dtype=torch.int64)
        """[D]: the distinct tokens of prompt and answer."""
        self.counts = torch.empty(0, dtype=torch.float32)
        """[D]: how often each occurs in the answer."""
        bias = seq.sampling.logit_bias
        self.bias_tokens = torch.tensor(list(bias), dtype=torch.int64)
        self.bias = torch.tensor(list(bias.values()), dtype=torch.float32)
        self._places: dict[int, int] = {}
        self._known = 0

    def follow(self, seq: Sequence) -> None:
        """Take in the tokens that came since the last time."""
        new = [token for token in dict.fromkeys(seq.tokens[self._known :]) if token not in self._places]
        if new:
            self._places |= {token: len(self._places) + place for place, token in enumerate(new)}
            self.tokens = torch.cat([self.tokens, torch.tensor(new)])
            self.counts = torch.cat([self.counts, torch.zeros(len(new))])
        for token in seq.tokens[max(self._known, seq.num_prompt) :]:
            self.counts[self._places[token]] += 1
        self._known = len(seq.tokens)


_histories: WeakKeyDictionary[Sequence, History] = WeakKeyDictionary()


def history_of(seq: Sequence) -> History:
    """Return the history of a sequence, up to its last token; it goes when the sequence goes."""
    if seq not in _histories:
        _histories[seq] = History(seq)
    history = _histories[seq]
    if seq.sampling.penalizes:
        history.follow(seq)
    return history
