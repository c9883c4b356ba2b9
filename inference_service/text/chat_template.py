"""Chat templates: rendered in processes of their own, which end when a template takes too much.

A template comes with a base or an adapter, so it is untrusted. The sandbox keeps it from reaching anything, but
nothing inside a process can end a loop, a power or a doubled list that never comes back.
"""

import asyncio
import secrets
from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Any, Final

from inference_service.text.sandbox.process import SandboxPool
from loramux_shared.faults import CheckpointInvalid, Finding, RequestInvalid

MAX_TEMPLATE_CHARS: Final = 1_000_000
MAX_PROCESSES: Final = 4
"""Most processes, of 20 MB each, for all templates together; one template has one at a time."""


class ChatTemplate:
    """Renders messages as Hugging Face does."""

    def __init__(self, source: str, special_tokens: Mapping[str, str]) -> None:
        """Take a template; raise CheckpointInvalid for one that cannot be compiled within the limits."""
        if len(source) > MAX_TEMPLATE_CHARS:
            raise CheckpointInvalid(
                f"the chat template has {len(source)} characters, at most {MAX_TEMPLATE_CHARS} are rendered."
            )
        self.source = source
        self._special = dict(special_tokens)
        answer = _RENDERERS.ask(source, {"source": source, "variables": None}).result()
        if "error" in answer:
            raise CheckpointInvalid(f"the chat template cannot be parsed: {answer['error']}")

    async def render(
        self,
        messages: Sequence[Mapping[str, Any]],
        tools: Sequence[Mapping[str, Any]] = (),
        variables: Mapping[str, Any] = MappingProxyType({}),
        *,
        add_generation_prompt: bool = True,
        continue_final_message: bool = False,
    ) -> str:
        """Return the prompt; it ends within the last message where an answer is to continue with that.

        The other inputs of a template are variables, whose names are none of its own. Raise RequestInvalid
        where the template refuses the messages, or takes more time or memory than it may.
        """
        mark = secrets.token_hex(16) if continue_final_message else ""
        if mark:  # the space shows whether the template cuts spaces off, the text's own too
            messages = [*messages[:-1], {**messages[-1], "content": f"{messages[-1]['content']}{mark} "}]
        variables = self._special | {
            "documents": None,
            **variables,
            "messages": list(messages),
            "tools": list(tools) or None,
            "add_generation_prompt": add_generation_prompt,
        }
        rendered = _RENDERERS.ask(self.source, {"source": self.source, "variables": variables})
        answer = await asyncio.wrap_future(rendered)
        if "text" not in answer:
            finding = Finding(code="E_MESSAGES", where="messages", found=answer.get("error", "no text"))
            raise RequestInvalid("the chat template refuses the messages.", [finding])
        return _before(mark, answer["text"]) if mark else answer["text"]

    async def marks(self) -> tuple[str, ...]:
        """Return the words right before and right behind a user's message; raise what `render` does."""
        content = secrets.token_hex(16)
        before, _, behind = (await self.render([{"role": "user", "content": content}])).partition(content)
        return (*before.split()[-1:], *behind.split()[:1])


def _before(mark: str, rendered: str) -> str:
    before, found, behind = rendered.rpartition(mark)
    if not found:
        finding = Finding(code="E_MESSAGES", where="continue_final_message", found="a changed last message")
        raise RequestInvalid("the chat template changes the last message.", [finding])
    return before if behind.startswith(" ") else before.rstrip()


_RENDERERS: Final = SandboxPool("templates", MAX_PROCESSES)
