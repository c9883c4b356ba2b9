"""The commits of a hub's repository that its owners took: those of its branches and tags.

Any user may open a pull request, and the hub serves the commits of one by their hashes as well as by refs/pr/N.
"""

from typing import Any, Final

from huggingface_hub import get_session, hf_raise_for_status

from loramux_shared.sources.base import Progress

MAX_PAGES: Final = 40
"""Most pages of commits that are read, of all branches and tags; the hub's have 50 commits or more."""


def is_taken(address: str, commit: str, token: str | bool, timeout_s: float, progress: Progress) -> bool:
    """Return True where a branch or tag of a repository, at the hub's API, has a commit in its history."""
    headers = {"authorization": f"Bearer {token}"} if token else {}

    def ask(page: str) -> Any:
        progress(0)
        answer = get_session().get(page, headers=headers, timeout=timeout_s)
        hf_raise_for_status(answer)
        return answer

    refs = ask(f"{address}/refs").json()
    tips = dict.fromkeys(ref["targetCommit"] for kind in ("branches", "tags") for ref in refs[kind])
    if commit in tips:
        return True
    hub = address.partition("api/")[0]
    pages = [f"{address}/commits/{tip}" for tip in reversed(tips)]
    for _ in range(MAX_PAGES):
        if not pages:
            break
        answer = ask(pages.pop())
        if any(each["id"] == commit for each in answer.json()):
            return True
        older = answer.links.get("next", {}).get("url", "")
        if older.startswith(hub):  # the token goes nowhere else
            pages.append(older)
    return False
