"""Parsed answers in parts, and their sum."""

from collections.abc import Sequence

from inference_service.api.chat.formats.reading import AnswerReader
from inference_service.api.chat.request import CallArguments, CallBegun, Piece, TextPiece, Thought

Collected = list[list[str]]
"""``["said", text]``, ``["thought", text]`` and ``["call", name, arguments]``, each as long as it continues."""


def read(reading: AnswerReader, text: str, cuts: Sequence[int] = ()) -> Collected:
    """Return the pieces of an answer that arrives in so many parts."""
    pieces: list[Piece] = []
    for begin, end in zip([0, *cuts], [*cuts, len(text)], strict=True):
        pieces += reading.push(text[begin:end])
    return merge_pieces(pieces + reading.finish())


def merge_pieces(pieces: Sequence[Piece]) -> Collected:
    """Return the sum of pieces; those of a call follow each other, and calls are numbered."""
    reported: Collected = []
    calls = 0
    for piece in pieces:
        match piece:
            case TextPiece() | Thought():
                assert piece.text
                kind = "said" if isinstance(piece, TextPiece) else "thought"
                if not reported or reported[-1][0] != kind:
                    reported.append([kind, ""])
                reported[-1][1] += piece.text
            case CallBegun():
                assert piece.index == calls
                calls += 1
                reported.append(["call", piece.name, ""])
            case CallArguments():
                assert piece.index == calls - 1
                reported[-1][2] += piece.text
    return reported
