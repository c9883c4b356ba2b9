"""The search for the sequence that a step raises for."""

from collections.abc import Collection, Mapping, Sequence as Seq

from inference_service.core.sequence import Sequence


class Search:
    """Groups of the sequences of a step that raised: each runs apart from all others, and is halved if it
    raises.

    A group of one that raises is found. After a search that finds none, its sequences are spared once: where a
    step raises with them again, they are the ones that end. So a failure of several together has an end too.
    """

    def __init__(self) -> None:
        self.trial: dict[str, int] = {}
        """The group that runs: known tokens of each sequence when it began, by id."""
        self._groups: list[Seq[str]] = []
        """Groups that have not run yet, the next one last."""
        self._suspects: frozenset[str] = frozenset()
        self._spared: frozenset[str] = frozenset()
        self._has_found = False

    def divide(self, running: Seq[str]) -> Seq[str]:
        """Divide the sequences that were under way in a step that raised; return those that it is to end."""
        if not self._suspects:
            self._suspects, self._has_found = frozenset(running), False
            found = running if len(running) == 1 else [each for each in running if each in self._spared]
        else:
            found = running if len(running) == 1 else []
        left = [each for each in running if each not in found]
        behind = [each for each in self.trial if each not in running]
        half = -(-len(left) // 2)
        self._groups += filter(None, (behind, left[half:], left[:half]))
        self._has_found |= bool(found)
        self.trial = {}
        return found

    def next_group(self, present: Collection[str]) -> Seq[str]:
        """Return the next group, as far as it is still there; an empty one at the end of the search."""
        while self._groups:
            if group := [each for each in self._groups.pop() if each in present]:
                return group
        self._spared = frozenset() if self._has_found else self._suspects
        self._suspects = frozenset()
        return ()

    def has_passed(self, seqs: Mapping[str, Sequence]) -> bool:
        """Return True if every sequence of the group that runs got a token, or ended."""
        behind = (
            len(seqs[each].progress.tokens) <= known for each, known in self.trial.items() if each in seqs
        )
        return bool(self.trial) and not any(behind)
