"""The named failures that the clients raise; ``Fault`` is the base of them all."""

from loramux_shared.faults import *  # noqa: F403 - all of them
from loramux_shared.rpc.status import CallFailed as CallFailed
