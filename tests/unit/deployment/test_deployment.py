"""The deployment file: hosted builders' files work as they are, and a mistake is named."""

import textwrap
from pathlib import Path

import pytest

from loramux_shared.deployment import Deployment
from loramux_shared.deployment_file import IGNORED_KEYS, UNSERVED_KEYS, DeploymentFile, load_deployment
from loramux_shared.faults import DeploymentInvalid, Finding
from tests.support.cases import cases

HOSTED = Path(__file__).with_name("hosted.yaml").read_text()
EXPECTED = Deployment.model_validate(cases(__file__, "EXPECTED"))


def _load(tmp_path: Path, text: str, name: str = "deployment.yaml") -> DeploymentFile:
    path = tmp_path / name
    path.write_text(textwrap.dedent(text), encoding="utf-8")
    return load_deployment(path)


def _refusal(tmp_path: Path, text: str) -> DeploymentInvalid:
    with pytest.raises(DeploymentInvalid) as caught:
        _load(tmp_path, text)
    return caught.value


def _findings(tmp_path: Path, text: str) -> dict[str, Finding]:
    findings = _refusal(tmp_path, text).findings
    assert len({finding.where for finding in findings}) == len(findings)
    return {finding.where: finding for finding in findings}


def test_a_hosted_builders_file_is_accepted(tmp_path: Path) -> None:
    """Keys without a meaning here are listed with their place, each once, in order."""
    file = _load(tmp_path, HOSTED)
    assert file.deployment == EXPECTED
    assert file.ignored == (
        "build.plugin_configuration",
        "build.quantization_type",
        "model_metadata",
        "resources",
        "runtime",
        "runtime.kv_cache_free_gpu_mem_fraction",
        "secrets",
        "trt_llm.inference_stack",
    )


def test_a_key_that_asks_for_what_is_not_done_is_a_warning(tmp_path: Path) -> None:
    """The warning has the key, its value and the replacement; a key with the usual value is ignored."""
    requests = HOSTED.replace(
        "no_quant", "fp8_kv\n    max_beam_width: 1\n    speculator: {num_draft_tokens: 4}"
    )
    requests = requests.replace("    request_default", "    tensor_parallel_size: 2\n    request_default")
    file = _load(tmp_path, requests)
    assert file.deployment == EXPECTED
    assert {each.where: (each.code, each.expected, each.found) for each in file.warnings} == {
        "build.quantization_type": ("W_UNSERVED", "no_quant or nothing", "'fp8_kv'"),
        "build.speculator": ("W_UNSERVED", "nothing", "{'num_draft_tokens': 4}"),
        "runtime.tensor_parallel_size": ("W_UNSERVED", "1 or nothing", "2"),
    }
    assert all(each.fix for each in file.warnings)
    assert "build.max_beam_width" in file.ignored
    assert not {each.where for each in file.warnings} & set(file.ignored)


def test_every_unserved_key_is_known() -> None:
    """A warning is only ever about a key that files of hosted builders have."""
    blocks = [key.split(".") for key in UNSERVED_KEYS]
    assert all(name in IGNORED_KEYS[block] for block, name in blocks)


def test_the_wrapper_is_optional(tmp_path: Path) -> None:
    """A file without `trt_llm` means what it means with it."""
    top, _, inner = HOSTED.partition("trt_llm:\n")
    unwrapped = top.replace("runtime: {predict_concurrency: 256}\n", "") + textwrap.dedent(inner)
    assert _load(tmp_path, unwrapped).deployment == EXPECTED


MINIMAL = """
build:
  checkpoint_repository: {source: HF, repo: org/base}
"""


def test_defaults(tmp_path: Path) -> None:
    """A checkpoint is enough: the name is the file's, the rank ceiling 64, the rest is the model's."""
    deployment = _load(tmp_path, MINIMAL, "my model.yaml").deployment
    assert deployment.model_name == deployment.served_model_name == "my-model"
    assert deployment.build.lora_configuration.max_lora_rank == 64
    assert (deployment.build.max_seq_len, deployment.build.lora_adapters) == (None, {})


def test_empty_blocks_are_as_good_as_none(tmp_path: Path) -> None:
    """A block whose entries are all commented out means its defaults."""
    text = "model_name:\nruntime:\n" + MINIMAL + "  lora_adapters:\n  lora_configuration:\n"
    assert _load(tmp_path, text).deployment == _load(tmp_path, MINIMAL).deployment


@pytest.mark.parametrize("block", ["", "  lora_configuration:\n", "  lora_configuration: {max_lora_rank: 8}\n"])
def test_the_older_spelling_of_the_rank(tmp_path: Path, block: str) -> None:
    """max_lora_rank directly under build is the ceiling, alone and beside the same newer one."""
    deployment = _load(tmp_path, MINIMAL + "  max_lora_rank: 8\n" + block).deployment
    assert deployment.build.lora_configuration.max_lora_rank == 8


def test_two_ranks_are_refused(tmp_path: Path) -> None:
    """Two different ceilings are one finding, which shows both, beside whatever else is wrong."""
    text = MINIMAL + "  max_lora_rank: 8\n  lora_configuration: {max_lora_rank: 16}\n  max_seq_len: 0\n"
    findings = _findings(tmp_path, text)
    assert set(findings) == {"build.lora_configuration.max_lora_rank", "build.max_seq_len"}
    assert "16 here and 8 under build" in findings["build.lora_configuration.max_lora_rank"].found


@pytest.mark.parametrize(("text", "where", "near"), cases(__file__, "test_a_misspelt_key"))
def test_a_misspelt_key(tmp_path: Path, text: str, where: str, near: str) -> None:
    """A finding of a misspelt key has the nearest key."""
    finding = _findings(tmp_path, text)[where]
    assert (finding.code, finding.fix) == ("E_UNKNOWN_FIELD", f"Did you mean {near}?")


def test_local_repositories_start_at_the_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """LOCAL paths are relative to the file's folder, in any working directory of the process; ~ is the home."""
    monkeypatch.setenv("HOME", "/home/someone")
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    build = _load(
        tmp_path,
        """
        build:
          checkpoint_repository: {source: LOCAL, repo: /models/base}
          lora_adapters:
            relative: {source: LOCAL, repo: ./adapters/one}
            above: {source: LOCAL, repo: ../two}
            home: {source: LOCAL, repo: ~/three}
            hub: {source: HF, repo: org/four}
        """,
    ).deployment.build
    assert build.checkpoint_repository.repo == "/models/base"
    assert {name: repository.repo for name, repository in build.lora_adapters.items()} == {
        "relative": str(tmp_path / "adapters/one"),
        "above": str(tmp_path.parent / "two"),
        "home": "/home/someone/three",
        "hub": "org/four",
    }


@pytest.mark.parametrize("name", ["a b", "a/b", "", "ä", ".", "..", ".a", "-a", "--help", "...", "x" * 129])
def test_a_bad_adapter_name(tmp_path: Path, name: str) -> None:
    """A name that cannot be an OpenAI model and a part of a key is refused where it stands."""
    text = MINIMAL + f'  lora_adapters: {{"{name}": {{source: HF, repo: a/b}}}}\n'
    assert _findings(tmp_path, text)[f"build.lora_adapters.{name}"].code == "E_BAD_FIELD"
    assert "model_name" in _findings(tmp_path, f'model_name: "{name}"\n' + MINIMAL)


@pytest.mark.parametrize("name", ["a", "org.name-v1:2_b", "_a.", ":a-", "0", "x" * 128])
def test_a_good_adapter_name(tmp_path: Path, name: str) -> None:
    """Letters, digits, _, -, . and : make a name; dots and dashes are not at its beginning."""
    text = MINIMAL + f'  lora_adapters: {{"{name}": {{source: HF, repo: a/b}}}}\n'
    assert list(_load(tmp_path, text).deployment.build.lora_adapters) == [name]


def test_a_file_that_is_hidden_gives_a_name(tmp_path: Path) -> None:
    """A file without `model_name` gives its name, with what a name may not have replaced."""
    path = tmp_path / ".-smol v2.yaml"
    path.write_text(MINIMAL)
    assert load_deployment(path).deployment.model_name == "smol-v2"


def test_an_adapter_may_have_the_deployments_name(tmp_path: Path) -> None:
    """Only the name under which the base is served is taken."""
    text = "model_name: same\nruntime: {served_model_name: base}\n" + MINIMAL
    deployment = _load(tmp_path, text + "  lora_adapters: {same: {source: HF, repo: a/b}}\n").deployment
    assert "same" in deployment.build.lora_adapters


@pytest.mark.parametrize(
    ("text", "expected"),
    [*cases(__file__, "test_what_is_no_deployment_file"), ("[" * 5000, "is not valid YAML")],
)
def test_what_is_no_deployment_file(tmp_path: Path, text: str, expected: str) -> None:
    """A file that is no YAML, or no deployment, is refused with its place and its cure."""
    assert expected in str(_refusal(tmp_path, text))


def test_a_small_file_that_unfolds_to_a_large_one(tmp_path: Path) -> None:
    """Nested aliases of YAML do not fill the memory on their way into the refusal."""
    levels = ["x0: &x0 [a]"] + [f"x{n}: &x{n} [{','.join([f'*x{n - 1}'] * 9)}]" for n in range(1, 12)]
    text = "model_name: *x11\n" + MINIMAL
    findings = _refusal(tmp_path, "description:\n  " + "\n  ".join(levels) + "\n" + text).findings
    assert [finding.where for finding in findings] == ["model_name"]
    assert len(findings[0].found) < 2000


def test_a_file_that_cannot_be_read(tmp_path: Path) -> None:
    """A missing file, a folder, binary data and a file without end are refused with the path and the reason."""
    (tmp_path / "binary").write_bytes(b"\xff\xfe\x00")
    reasons = {"missing": "No such file or directory", ".": "Is a directory", "binary": "not UTF-8 text"}
    for name, reason in (reasons | {"/dev/zero": "it has more than 16 MiB"}).items():
        with pytest.raises(DeploymentInvalid, match=f"cannot read the deployment file .*: {reason}"):
            load_deployment(tmp_path / name)
