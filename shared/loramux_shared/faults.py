"""Every failure that a person can cause or meet, as a tree of classes.

::

    Fault
    ├── AdapterInvalid       ADAPTER_INVALID         INVALID_ARGUMENT     an adapter breaks a rule
    ├── DeploymentInvalid    DEPLOYMENT_INVALID      INVALID_ARGUMENT     a file or message breaks a rule
    ├── RequestInvalid       REQUEST_INVALID         INVALID_ARGUMENT     a field is out of bounds
    ├── PromptTooLong        PROMPT_TOO_LONG         INVALID_ARGUMENT
    ├── PageTokenInvalid     PAGE_TOKEN_INVALID      INVALID_ARGUMENT
    ├── Unauthenticated      UNAUTHENTICATED         UNAUTHENTICATED      no API key, or an unknown one
    ├── PermissionDenied     PERMISSION_DENIED       PERMISSION_DENIED    a key of another scope
    ├── RepoNotFound         REPO_NOT_FOUND          NOT_FOUND
    ├── RevisionNotFound     REVISION_NOT_FOUND      NOT_FOUND
    ├── RepoGated            REPO_GATED              PERMISSION_DENIED
    ├── SourceRefused        SOURCE_REFUSED          PERMISSION_DENIED    not allowed by the operator
    ├── SourceChanged        SOURCE_CHANGED          ABORTED              it changed while it was read
    ├── SourceUnavailable    SOURCE_UNAVAILABLE      UNAVAILABLE
    ├── StoreUnavailable     STORE_UNAVAILABLE       UNAVAILABLE
    ├── ServerUnavailable    SERVER_UNAVAILABLE      UNAVAILABLE          seen by a client: no answer
    ├── ShuttingDown         SHUTTING_DOWN           UNAVAILABLE
    ├── ReplicaFailed        REPLICA_FAILED          UNAVAILABLE          its device or engine failed
    ├── ReplicaBehind        REPLICA_BEHIND          UNAVAILABLE          it does not serve the generation yet
    ├── ReplicaPaused        REPLICA_PAUSED          UNAVAILABLE          an operator ended what was under way
    ├── DeploymentNotFound   DEPLOYMENT_NOT_FOUND    NOT_FOUND
    ├── GenerationNotFound   GENERATION_NOT_FOUND    NOT_FOUND
    ├── AdapterNotFound      ADAPTER_NOT_FOUND       NOT_FOUND            no such adapter in a deployment
    ├── ModelNotFound        MODEL_NOT_FOUND         NOT_FOUND
    ├── RequestIdReused      REQUEST_ID_REUSED       ALREADY_EXISTS
    ├── AdapterExists        ADAPTER_EXISTS          ALREADY_EXISTS       the name of an adapter is taken
    ├── GenerationMismatch   GENERATION_MISMATCH     ABORTED              not the expected generation
    ├── BuildInProgress      BUILD_IN_PROGRESS       ABORTED
    ├── BuildInterrupted     BUILD_INTERRUPTED       ABORTED
    ├── BuildCancelled       BUILD_CANCELLED         ABORTED
    ├── BuildTimedOut        BUILD_TIMED_OUT         DEADLINE_EXCEEDED
    ├── DeadlineExceeded     DEADLINE_EXCEEDED       DEADLINE_EXCEEDED    the request's deadline passed
    ├── ClientStalled        CLIENT_STALLED          ABORTED              it sent or read too slowly
    ├── QueueFull            QUEUE_FULL              RESOURCE_EXHAUSTED
    ├── RateLimited          RATE_LIMITED            RESOURCE_EXHAUSTED   a model or a key used its share
    ├── BundleCorrupt        BUNDLE_CORRUPT          DATA_LOSS
    │   ├── RecordTooLarge   RECORD_TOO_LARGE        DATA_LOSS            larger than any that is written
    │   └── SignatureInvalid SIGNATURE_INVALID       DATA_LOSS            without a required signature
    ├── ProofFailed          PROOF_FAILED            DATA_LOSS            a bundle that answers otherwise
    ├── NumericsFault        NUMERICS                DATA_LOSS            an answer of NaN or infinity
    ├── ModelUnusable        MODEL_UNUSABLE          DATA_LOSS            an adapter with several of those
    ├── CheckpointInvalid    CHECKPOINT_INVALID      FAILED_PRECONDITION  a base that cannot be served
    ├── ResourcesExhausted   RESOURCES_EXHAUSTED     FAILED_PRECONDITION  it does not fit this machine
    ├── NoBuilder            NO_BUILDER              FAILED_PRECONDITION  a replica that knows no builder
    ├── SettingsInvalid      SETTINGS_INVALID        FAILED_PRECONDITION
    ├── MethodUnsupported    METHOD_UNSUPPORTED      UNIMPLEMENTED        of a service that others named
    └── InternalFault        INTERNAL                INTERNAL

A message says what was expected, what was found and what to do, in one line. It never holds a
secret, a prompt or a stack trace.
"""

from __future__ import annotations

from collections.abc import Sequence
from enum import Enum
from typing import ClassVar, Self

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
    """Base of all named failures; ``reason`` and ``status`` are fixed per class."""

    reason: ClassVar[str]
    status: ClassVar[Status]
    retry_after_s: float | None = None
    """After which the same call may succeed; None: nobody knows."""

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

    def with_message(self, message: str) -> Self:
        """Return a fault that says the same in other words, and holds nothing of where it happened."""
        return type(self)(message, self.findings, self.repository, self.retry_after_s)

    def __str__(self) -> str:
        return "\n  ".join([self.message, *map(str, self.findings)])


class AdapterInvalid(Fault):
    """One or more adapters break a rule; every violation of every adapter is listed."""

    reason = "ADAPTER_INVALID"
    status = Status.INVALID_ARGUMENT


class DeploymentInvalid(Fault):
    """A deployment file or message breaks a rule; the findings name the fields."""

    reason = "DEPLOYMENT_INVALID"
    status = Status.INVALID_ARGUMENT


class RequestInvalid(Fault):
    """A field of a request is missing or out of bounds; the findings name the fields."""

    reason = "REQUEST_INVALID"
    status = Status.INVALID_ARGUMENT


class PromptTooLong(Fault):
    """Prompt and new tokens do not fit the longest sequence that is served."""

    reason = "PROMPT_TOO_LONG"
    status = Status.INVALID_ARGUMENT


class PageTokenInvalid(Fault):
    """A page token that no answer gave."""

    reason = "PAGE_TOKEN_INVALID"
    status = Status.INVALID_ARGUMENT


class Unauthenticated(Fault):
    """The call shows no API key, or one that this server does not know."""

    reason = "UNAUTHENTICATED"
    status = Status.UNAUTHENTICATED


class PermissionDenied(Fault):
    """The API key lacks the scope that the call needs."""

    reason = "PERMISSION_DENIED"
    status = Status.PERMISSION_DENIED


class RepoNotFound(Fault):
    """A repository or a file of it does not exist, or is private for this token."""

    reason = "REPO_NOT_FOUND"
    status = Status.NOT_FOUND


class RevisionNotFound(Fault):
    """The repository exists, the revision does not."""

    reason = "REVISION_NOT_FOUND"
    status = Status.NOT_FOUND


class RepoGated(Fault):
    """The repository's licence was not accepted with this token, or the token lacks access."""

    reason = "REPO_GATED"
    status = Status.PERMISSION_DENIED


class SourceRefused(Fault):
    """A source or path that the operator did not allow."""

    reason = "SOURCE_REFUSED"
    status = Status.PERMISSION_DENIED


class SourceChanged(Fault):
    """A repository changed between its listing and its reading; what was read is thrown away."""

    reason = "SOURCE_CHANGED"
    status = Status.ABORTED
    retry_after_s = 5.0


class SourceUnavailable(Fault):
    """A source does not answer; a later try may succeed."""

    reason = "SOURCE_UNAVAILABLE"
    status = Status.UNAVAILABLE
    retry_after_s = 5.0


class StoreUnavailable(Fault):
    """The object store does not answer or refuses; a later try may succeed."""

    reason = "STORE_UNAVAILABLE"
    status = Status.UNAVAILABLE
    retry_after_s = 2.0


class ServerUnavailable(Fault):
    """A service of ours does not answer; raised by clients."""

    reason = "SERVER_UNAVAILABLE"
    status = Status.UNAVAILABLE
    retry_after_s = 1.0


class ShuttingDown(Fault):
    """The server drains: it takes no new work, or had to cut off what was not done in time."""

    reason = "SHUTTING_DOWN"
    status = Status.UNAVAILABLE
    retry_after_s = 1.0


class ReplicaFailed(Fault):
    """The replica's device or engine failed; its process ends, to be started again."""

    reason = "REPLICA_FAILED"
    status = Status.UNAVAILABLE
    retry_after_s = 1.0


class ReplicaBehind(Fault):
    """The replica does not serve the generation that the request asks for, and could not catch up at once."""

    reason = "REPLICA_BEHIND"
    status = Status.UNAVAILABLE
    retry_after_s = 1.0


class ReplicaPaused(Fault):
    """An operator paused the replica, and had what was under way ended."""

    reason = "REPLICA_PAUSED"
    status = Status.UNAVAILABLE
    retry_after_s = 1.0


class DeploymentNotFound(Fault):
    """No deployment of that name; the message lists those that exist."""

    reason = "DEPLOYMENT_NOT_FOUND"
    status = Status.NOT_FOUND


class GenerationNotFound(Fault):
    """A deployment has no generation of that number; the message lists those that it has."""

    reason = "GENERATION_NOT_FOUND"
    status = Status.NOT_FOUND


class AdapterNotFound(Fault):
    """A deployment has no adapter of that name; the message says which it has."""

    reason = "ADAPTER_NOT_FOUND"
    status = Status.NOT_FOUND


class ModelNotFound(Fault):
    """No base or adapter of that name; the message lists those that are served."""

    reason = "MODEL_NOT_FOUND"
    status = Status.NOT_FOUND


class RequestIdReused(Fault):
    """A request id that was used for another deployment."""

    reason = "REQUEST_ID_REUSED"
    status = Status.ALREADY_EXISTS


class AdapterExists(Fault):
    """An adapter of that name is served, and was not to be replaced."""

    reason = "ADAPTER_EXISTS"
    status = Status.ALREADY_EXISTS


class GenerationMismatch(Fault):
    """The deployment changed before: its newest generation is not the expected one."""

    reason = "GENERATION_MISMATCH"
    status = Status.ABORTED


class BuildInProgress(Fault):
    """Another build of the same deployment runs."""

    reason = "BUILD_IN_PROGRESS"
    status = Status.ABORTED


class BuildInterrupted(Fault):
    """A build that the builder could not finish before it stopped."""

    reason = "BUILD_INTERRUPTED"
    status = Status.ABORTED


class BuildCancelled(Fault):
    """A build that a client cancelled; nothing of it is served."""

    reason = "BUILD_CANCELLED"
    status = Status.ABORTED


class BuildTimedOut(Fault):
    """A build that took longer than the operator allows; nothing of it is served."""

    reason = "BUILD_TIMED_OUT"
    status = Status.DEADLINE_EXCEEDED


class DeadlineExceeded(Fault):
    """The request's deadline passed; what it held was freed."""

    reason = "DEADLINE_EXCEEDED"
    status = Status.DEADLINE_EXCEEDED


class ClientStalled(Fault):
    """A client that took too long to send its request, or to read the answer."""

    reason = "CLIENT_STALLED"
    status = Status.ABORTED


class QueueFull(Fault):
    """Too many requests wait."""

    reason = "QUEUE_FULL"
    status = Status.RESOURCE_EXHAUSTED
    retry_after_s = 1.0


class RateLimited(Fault):
    """A model, or the holder of a key, has what its limits allow; others are not concerned."""

    reason = "RATE_LIMITED"
    status = Status.RESOURCE_EXHAUSTED
    retry_after_s = 1.0


class BundleNotFound(Fault):
    """The store has no bundle of that digest."""

    reason = "BUNDLE_NOT_FOUND"
    status = Status.NOT_FOUND


class BundleCorrupt(Fault):
    """Bytes of a store or a source whose digest is not the recorded one."""

    reason = "BUNDLE_CORRUPT"
    status = Status.DATA_LOSS


class RecordTooLarge(BundleCorrupt):
    """An object or a listing of a store exceeds its bound; it is not read."""

    reason = "RECORD_TOO_LARGE"


class SignatureInvalid(BundleCorrupt):
    """An object that is not signed by a required signer, or was changed since."""

    reason = "SIGNATURE_INVALID"


class ProofFailed(Fault):
    """A bundle whose adapter does not answer as its proof says; the message names adapter and error."""

    reason = "PROOF_FAILED"
    status = Status.DATA_LOSS


class NumericsFault(Fault):
    """An answer whose values are NaN or infinite; the message says by which model."""

    reason = "NUMERICS"
    status = Status.DATA_LOSS


class ModelUnusable(Fault):
    """An adapter whose answers held NaN or infinity several times; a replica stops serving the version."""

    reason = "MODEL_UNUSABLE"
    status = Status.DATA_LOSS


class CheckpointInvalid(Fault):
    """A base checkpoint that cannot be served."""

    reason = "CHECKPOINT_INVALID"
    status = Status.FAILED_PRECONDITION


class ResourcesExhausted(Fault):
    """The deployment does not fit this machine; the message gives the numbers."""

    reason = "RESOURCES_EXHAUSTED"
    status = Status.FAILED_PRECONDITION


class NoBuilder(Fault):
    """A replica that knows no builder was asked for what only a builder can do."""

    reason = "NO_BUILDER"
    status = Status.FAILED_PRECONDITION


class SettingsInvalid(Fault):
    """A setting with a bad name or value; the message says what is allowed."""

    reason = "SETTINGS_INVALID"
    status = Status.FAILED_PRECONDITION


class MethodUnsupported(Fault):
    """A method of another server's service, as of vLLM's, that is not served here."""

    reason = "METHOD_UNSUPPORTED"
    status = Status.UNIMPLEMENTED


class InternalFault(Fault):
    """A failure of loramux itself; the server's log has the details under the request id."""

    reason = "INTERNAL"
    status = Status.INTERNAL


FAULTS: dict[str, type[Fault]] = {
    kind.reason: kind for kind in (*Fault.__subclasses__(), *BundleCorrupt.__subclasses__())
}
"""Fault classes by reason."""
