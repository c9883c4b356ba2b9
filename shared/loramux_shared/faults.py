"""Every failure that a person can cause or meet; docs/reference/errors.md has a table of them with their cures.

A message says what was expected, what was found and what to do, in one line. It never holds a
secret, a prompt or a stack trace.
"""

import re
from collections.abc import Sequence
from enum import Enum
from typing import Any, ClassVar, Self

from pydantic import BaseModel, ConfigDict


class Status(Enum):
    """The canonical status of a fault; names and numbers are those of google.rpc.Code."""

    INVALID_ARGUMENT = 3
    DEADLINE_EXCEEDED = 4
    NOT_FOUND = 5
    ALREADY_EXISTS = 6
    PERMISSION_DENIED = 7
    RESOURCE_EXHAUSTED = 8
    FAILED_PRECONDITION = 9
    ABORTED = 10
    UNIMPLEMENTED = 12
    INTERNAL = 13
    UNAVAILABLE = 14
    DATA_LOSS = 15
    UNAUTHENTICATED = 16


class Finding(BaseModel):
    """One thing found in an adapter, a deployment or a request; codes beginning with ``W_`` are warnings."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    code: str
    adapter: str = ""
    where: str = ""
    expected: str = ""
    found: str = ""
    fix: str = ""

    def __str__(self) -> str:
        place = ": ".join(part for part in (self.adapter, self.where) if part)
        contrast = ", ".join(
            part
            for part in (self.expected and f"expected {self.expected}", self.found and f"found {self.found}")
            if part
        )
        head = " ".join(part for part in (self.code, place) if part)
        body = ". ".join(part for part in (contrast, self.fix) if part)
        return ": ".join(part for part in (head, body) if part)


class Fault(Exception):
    """Base of all named failures; ``reason``, ``status`` and ``retry_after_s`` are those of the class.

    The reason of a class that names a status is the class's own name: ``BUILD_CANCELLED`` of `BuildCancelled`.
    """

    reason: ClassVar[str]
    status: ClassVar[Status]
    retry_after_s: float | None = None
    """After which the same call may succeed; None: nobody knows."""

    def __init_subclass__(cls, status: Status | None = None, retry_after_s: float | None = None) -> None:
        super().__init_subclass__()
        if status is not None:
            cls.status = status
            cls.reason = re.sub(r"(?<=[a-z])(?=[A-Z])", "_", cls.__name__.removesuffix("Fault")).upper()
        if retry_after_s is not None:
            cls.retry_after_s = retry_after_s

    def __init__(
        self,
        message: str,
        findings: Sequence[Finding] = (),
        repository: str = "",
        retry_after_s: float | None = None,
    ) -> None:
        super().__init__(message)
        if retry_after_s is not None:
            self.retry_after_s = retry_after_s
        self.message = message
        self.findings = tuple(findings)
        self.repository = repository
        """The one that was being read when it happened, as `Repository.shown` names it; empty: none was."""

    @classmethod
    def of_field(cls, message: str, where: str, expected: str, found: str = "", fix: str = "") -> Self:
        """Return the fault of one field: where it is, what is expected there, and what was found."""
        return cls(message, [Finding(code="E_BAD_FIELD", where=where, expected=expected, found=found, fix=fix)])

    @property
    def is_passing(self) -> bool:
        """Return True if another try of the same may not fail so."""
        return self.status in (
            Status.UNAVAILABLE,
            Status.RESOURCE_EXHAUSTED,
            Status.ABORTED,
            Status.DEADLINE_EXCEEDED,
        )

    def with_message(self, message: str) -> Self:
        """Return a fault that says the same in other words, and holds nothing of where it happened."""
        return type(self)(message, self.findings, self.repository, self.retry_after_s)

    def copy(self) -> Self:
        """Return the same fault without its traceback, which would keep what was open where it happened."""
        return self.with_message(self.message)

    def __str__(self) -> str:
        return "\n  ".join([self.message, *map(str, self.findings)])


class AdapterInvalid(Fault, status=Status.INVALID_ARGUMENT):
    """One or more adapters break a rule; every violation of every adapter is listed."""


class DeploymentInvalid(Fault, status=Status.INVALID_ARGUMENT):
    """A deployment file or message breaks a rule."""


class RequestInvalid(Fault, status=Status.INVALID_ARGUMENT):
    """A field of a request is missing or out of bounds."""


class PromptTooLong(Fault, status=Status.INVALID_ARGUMENT):
    """Prompt and new tokens do not fit the longest sequence that is served."""


class PageTokenInvalid(Fault, status=Status.INVALID_ARGUMENT):
    """A page token that no answer gave."""


class Unauthenticated(Fault, status=Status.UNAUTHENTICATED):
    """The call shows no API key, or one that this server does not know."""


class PermissionDenied(Fault, status=Status.PERMISSION_DENIED):
    """The API key lacks the scope that the call needs."""


class HostRefused(Fault, status=Status.PERMISSION_DENIED):
    """A Host or Origin that is no name of this server, which requires no key."""


class RepoNotFound(Fault, status=Status.NOT_FOUND):
    """A repository or a file of it does not exist, or is private for this token."""


class RevisionNotFound(Fault, status=Status.NOT_FOUND):
    """The repository exists, the revision does not."""


class RepoGated(Fault, status=Status.PERMISSION_DENIED):
    """The repository's licence was not accepted with this token, or the token lacks access."""


class SourceRefused(Fault, status=Status.PERMISSION_DENIED):
    """A source or path that the operator did not allow."""


class SourceChanged(Fault, status=Status.ABORTED, retry_after_s=5.0):
    """A repository changed between its listing and its reading."""


class SourceUnavailable(Fault, status=Status.UNAVAILABLE, retry_after_s=5.0):
    """A source does not answer."""


class StoreUnavailable(Fault, status=Status.UNAVAILABLE, retry_after_s=2.0):
    """The object store does not answer or refuses."""


class ServerUnavailable(Fault, status=Status.UNAVAILABLE, retry_after_s=1.0):
    """A service of ours does not answer; raised by clients."""


class ShuttingDown(Fault, status=Status.UNAVAILABLE, retry_after_s=1.0):
    """The server drains: it takes no new work, or had to cut off what was not done in time."""


class ReplicaFailed(Fault, status=Status.UNAVAILABLE, retry_after_s=1.0):
    """The replica's device or engine failed; its process ends, to be started again."""


class ReplicaBehind(Fault, status=Status.UNAVAILABLE, retry_after_s=1.0):
    """The replica does not serve the generation that the request asks for, and could not catch up at once."""


class ReplicaPaused(Fault, status=Status.UNAVAILABLE, retry_after_s=1.0):
    """An operator paused the replica, and had what was under way ended."""


class DeploymentNotFound(Fault, status=Status.NOT_FOUND):
    """No deployment of that name."""


class GenerationNotFound(Fault, status=Status.NOT_FOUND):
    """A deployment has no generation of that number."""


class AdapterNotFound(Fault, status=Status.NOT_FOUND):
    """A deployment has no adapter of that name."""


class ModelNotFound(Fault, status=Status.NOT_FOUND):
    """No base or adapter of that name."""


class FileNotFound(Fault, status=Status.NOT_FOUND):
    """No file of that id that belongs to the key of the request."""


class BatchNotFound(Fault, status=Status.NOT_FOUND):
    """No batch of that id that belongs to the key of the request."""


class RequestIdReused(Fault, status=Status.ALREADY_EXISTS):
    """A request id that was used for another deployment."""


class AdapterExists(Fault, status=Status.ALREADY_EXISTS):
    """An adapter of that name is served, and was not to be replaced."""


class GenerationMismatch(Fault, status=Status.ABORTED):
    """The deployment changed before: its newest generation is not the expected one."""


class BuildInProgress(Fault, status=Status.ABORTED):
    """Another build of the same deployment runs."""


class BuildInterrupted(Fault, status=Status.ABORTED):
    """A build that the builder could not finish before it stopped."""


class BuildCancelled(Fault, status=Status.ABORTED):
    """A build that a client cancelled; nothing of it is served."""


class BuildTimedOut(Fault, status=Status.DEADLINE_EXCEEDED):
    """A build that took longer than the operator allows; nothing of it is served."""


class DeadlineExceeded(Fault, status=Status.DEADLINE_EXCEEDED):
    """The request's deadline passed; what it held was freed."""


class ClientStalled(Fault, status=Status.ABORTED):
    """A client that took too long to send its request, or to read the answer."""


class QueueFull(Fault, status=Status.RESOURCE_EXHAUSTED, retry_after_s=1.0):
    """Too many requests wait, or the API key has its share of what is scarce."""


class RateLimited(Fault, status=Status.RESOURCE_EXHAUSTED, retry_after_s=1.0):
    """A model, or the holder of a key, has what its limits allow."""


class BundleNotFound(Fault, status=Status.NOT_FOUND):
    """The store has no bundle of that digest."""


class BundleCorrupt(Fault, status=Status.DATA_LOSS):
    """Bytes of a store or a source whose digest is not the recorded one."""


class RecordTooLarge(BundleCorrupt, status=Status.DATA_LOSS):
    """An object or a listing of a store exceeds its bound; it is not read."""


class SignatureInvalid(BundleCorrupt, status=Status.DATA_LOSS):
    """An object that is not signed by a required signer, or was changed since."""


class BatchCorrupt(Fault, status=Status.DATA_LOSS):
    """An object of the store of files and batches is not what was stored there."""


class ProofFailed(Fault, status=Status.DATA_LOSS):
    """A bundle whose adapter does not answer as its proof says; the message names adapter and error."""


class NumericsFault(Fault, status=Status.DATA_LOSS):
    """An answer whose values are NaN or infinite; the message says by which model."""


class ModelUnusable(Fault, status=Status.DATA_LOSS):
    """An adapter whose answers held NaN or infinity several times; a replica stops serving the version."""


class CheckpointInvalid(Fault, status=Status.FAILED_PRECONDITION):
    """A base checkpoint that cannot be served."""


class ResourcesExhausted(Fault, status=Status.FAILED_PRECONDITION):
    """The deployment does not fit this machine."""


class NoBuilder(Fault, status=Status.FAILED_PRECONDITION):
    """A replica that knows no builder was asked for what only a builder can do."""


class SettingsInvalid(Fault, status=Status.FAILED_PRECONDITION):
    """A setting with a bad name or value."""


class InternalFault(Fault, status=Status.INTERNAL):
    """A failure of loramux itself."""


FAULTS: dict[str, type[Fault]] = {
    kind.reason: kind for kind in (*Fault.__subclasses__(), *BundleCorrupt.__subclasses__())
}
"""Fault classes by reason."""


def fault_to(fault: Fault) -> list[Any]:
    """Return a fault as a message between processes has it."""
    findings = [finding.model_dump() for finding in fault.findings]
    return [fault.reason, fault.message, findings, fault.repository, fault.retry_after_s]


def fault_from(message: Sequence[Any]) -> Fault:
    """Return the fault of a message."""
    reason, text, findings, repository, retry_after_s = message
    return FAULTS[reason](text, [Finding(**each) for each in findings], repository, retry_after_s)
