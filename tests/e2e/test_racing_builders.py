"""Builders that publish one deployment at once, on a store without conditional writes."""

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from loramux_shared.bundle.claims import claimed_numbers, generation_numbers
from loramux_shared.bundle.deployments import current_generation, publish_generation
from loramux_shared.bundle.generation import Current, current_key
from loramux_shared.faults import BundleCorrupt
from loramux_shared.storage.base import Store
from loramux_shared.storage.memory import MemoryStore
from loramux_shared.storage.open import open_store
from tests.support.generations import generation
from tests.support.s3_gateway import S3Server


@pytest.mark.parametrize("kind", ["memory", "file", "s3"])
def test_many_real_threads_keep_all_generations(
    kind: str, tmp_path: Path, s3_server: S3Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Eight builders in threads publish eight generations, on stores that ignore conditional writes too."""
    for name, value in s3_server.environment.items():
        monkeypatch.setenv(name, value)
    uri = f"file://{tmp_path}" if kind == "file" else f"s3://{s3_server.new_bucket()}"
    store: Store = MemoryStore() if kind == "memory" else open_store(uri)
    each = [store if kind == "memory" else open_store(uri) for _ in range(8)]
    with ThreadPoolExecutor(8) as pool:
        publishing = pool.map(lambda i: publish_generation(each[i], generation(max_seq_len=101 + i)), range(8))
        seen = [current_generation(store, "tiny") for _ in range(20)]
        published = list(publishing)
    assert all(found is None or found in published for found in seen)
    assert sorted(found.number for found in published) == generation_numbers(store, "tiny")
    assert {found.max_seq_len for found in published} == set(range(101, 109))
    assert current_generation(store, "tiny").number == max(found.number for found in published)
    assert claimed_numbers(store, "tiny") == {}
    newest = current_generation(store, "tiny")
    assert publish_generation(store, newest) == newest  # the same content again


class Torn(MemoryStore):
    """Sends a pointer with one version's length and another's bytes, a few times."""

    def __init__(self, torn: int, mix: Callable[[bytes], bytes]) -> None:
        super().__init__()
        self.torn, self.mix = torn, mix

    def get(self, key: str, bound: int | None = None) -> bytes:
        """Read, torn at first."""
        data = super().get(key, bound)
        if key == current_key("tiny") and self.torn:
            self.torn -= 1
            return self.mix(data)
        return data


OLD = Current(generation=99, sha256="0" * 64).to_bytes()
MIXES = [
    pytest.param(lambda data: data[:-1], id="cut by one byte"),
    pytest.param(lambda data: data[: len(data) // 2], id="half"),
    pytest.param(lambda data: OLD[:20] + data[20:], id="the beginning of another version"),
    pytest.param(lambda data: data[:-30] + OLD[-30:], id="the end of another version"),
    pytest.param(lambda data: data + b"\n", id="longer"),
]


@pytest.mark.parametrize("mix", MIXES)
def test_a_torn_pointer_is_read_again(mix):
    """A pointer that does not fit is read again and found whole; one that stays torn is BUNDLE_CORRUPT."""
    store: Store = Torn(0, mix)
    assert isinstance(store, Torn)
    published = publish_generation(store, generation(max_seq_len=101))
    store.torn = 2
    assert current_generation(store, "tiny") == published
    store.torn = 100
    with pytest.raises(BundleCorrupt):
        current_generation(store, "tiny")
