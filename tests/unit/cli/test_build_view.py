"""The view of a build on a terminal and elsewhere, and the lines to try that ``up`` and the demo print."""

import json
import shlex
import threading
from collections.abc import Sequence
from dataclasses import replace
from io import StringIO

import pytest
from google.protobuf.json_format import ParseDict

from loramux.cli import shell
from loramux.cli.build_view import ROWS, BuildView, show_built
from loramux.cli.local.tree import listening_address
from loramux.cli.local.up import show_lines_to_try
from loramux.cli.shell import Later, Screen
from loramux.inference.v1 import inference_pb2 as pb
from loramux.records import AdapterInfo, DeploymentInfo, DeploymentState, Stage
from loramux_shared.faults import Finding
from tests.support.waiting import BOUND_S

WARNING = Finding(code="W_FP32", where="weights", found="float32")


def adapter(number: int, stage: Stage) -> AdapterInfo:
    done = stage is Stage.DONE
    return AdapterInfo(
        f"adapter-{number:04}",
        stage,
        0,
        None,
        "ab" * 32,
        (8,),
        ("attn_q",),
        4,
        1000 * done,
        (WARNING,) * done,
        False,
    )


def state(adapters: Sequence[AdapterInfo], ended: bool = False) -> DeploymentInfo:
    kind = DeploymentState.ACTIVE if ended else DeploymentState.BUILDING
    return DeploymentInfo("many", kind, 1, None, None, tuple(adapters), None, False)


def build(view: BuildView, count: int) -> list[AdapterInfo]:
    """Show a build in which one adapter after the other is fetched, then all end."""
    adapters = [adapter(number, Stage.WAITING) for number in range(count)]
    view.update(state(adapters))
    for number in range(count):
        adapters[number] = adapter(number, Stage.FETCHING)
        view.update(state(adapters))
        adapters[number] = adapter(number, Stage.DONE)
        view.update(state(adapters))
    view.update(state(adapters, ended=True))
    return adapters


def test_many_adapters_are_counted_where_there_is_no_terminal(capsys: pytest.CaptureFixture[str]) -> None:
    """Sixty adapters have only sums: at the beginning, now and then, and at the end."""
    view = BuildView(counts_s=3600)
    view.update(state(build(view, 60), ended=True))  # a call's answer and the first of a watch are the same
    assert capsys.readouterr().err.splitlines() == ["60 adapters: 60 waiting", "60 adapters: 60 done"]


def test_rounding_is_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    """Rounded adapters share a line with the largest error; of one that was kept the code is known."""
    found = ("4 float32, stored as bfloat16, largest relative error 3.9e-03", "1 float16, stored as bfloat16, "
             "largest relative error 2.0e-03", "")  # fmt: skip
    adapters = [
        replace(adapter(number, Stage.DONE), warnings=(Finding(code="W_NARROWED", found=text),))
        for number, text in enumerate(found)
    ]
    show_built(state(adapters, ended=True))
    names = "adapter-0000, adapter-0001, adapter-0002"
    line = f"rounded to bfloat16, by at most 3.9e-03 of a value (W_NARROWED): {names}"
    assert capsys.readouterr().err.splitlines() == [line]
    show_built(state(adapters[2:], ended=True))
    assert capsys.readouterr().err.splitlines() == ["rounded (W_NARROWED): adapter-0002"]


@pytest.mark.parametrize("count", [3, 300])
def test_a_terminal_is_not_drawn_for_every_adapter(count: int) -> None:
    """The output to a terminal depends on its height, not on the number of adapters; the end shows all done."""
    sent, screen = screen_of()
    with BuildView(console=screen) as view:
        build(view, count)
    text = sent.getvalue()
    assert len(text) < 100_000
    last = text[text.rindex("adapter-0002" if count == 3 else "300 adapters") :]
    assert "done" in last


def test_the_table_of_many_adapters_fits_a_screen(capsys: pytest.CaptureFixture[str]) -> None:
    """The first rows and a count are shown; a warning that sixty adapters have is reported once, with names."""
    adapters = [adapter(number, Stage.DONE) for number in range(60)]
    adapters[7] = replace(adapters[7], warnings=(WARNING, replace_code(WARNING)))
    show_built(state(adapters, ended=True))
    output = capsys.readouterr()
    lines = output.out.splitlines()
    assert len(lines) == 1 + ROWS + 2
    assert lines[-2] == "... and 40 more, 60.0 kB in all (all of them: --json)"
    assert output.err.splitlines() == [
        "warning: W_FP32 adapter-0000: weights: found float32",
        "  and so adapter-0001, adapter-0002, adapter-0003, adapter-0004, adapter-0005 and 54 more",
        "warning: W_ALPHA adapter-0007: weights: found float32",
    ]


def replace_code(finding: Finding) -> Finding:
    return finding.model_copy(update={"code": "W_ALPHA"})


def screen_of(height: int = 12) -> tuple[StringIO, Screen]:
    """A terminal, and the bytes that it receives."""
    sent = StringIO()
    return sent, Screen(file=sent, force_terminal=True, width=100, height=height)


class Drawn:
    """Notes whether something was drawn."""

    def __init__(self) -> None:
        self.calls: list[str] = []
        self.begun = threading.Event()

    def start(self) -> None:
        self.calls.append("start")
        self.begun.set()

    def stop(self) -> None:
        self.calls.append("stop")


def test_what_is_soon_over_is_never_seen() -> None:
    """A spinner begins after a while and ends with its block; one whose block is short does neither."""
    short, long = Drawn(), Drawn()
    with Later(short, after_s=3600):
        pass
    with Later(long, after_s=0):
        assert long.begun.wait(BOUND_S)
    assert (short.calls, long.calls) == ([], ["start", "stop"])


def test_a_step_says_what_came_of_it(capsys: pytest.CaptureFixture[str]) -> None:
    """A step reports the result too, not only its begin, also without a terminal and for an old result."""
    with shell.step("base model") as came:
        came.of_it = "was there already"
    with shell.step("builder"):
        pass
    assert capsys.readouterr().err.splitlines() == [
        "base model ...",
        "base model: was there already",
        "builder ...",
    ]


def test_the_lines_work_as_they_stand(capsys, monkeypatch) -> None:
    """Each is a chat with a limit, at an address that can be reached, with the key where one is used."""
    monkeypatch.setenv("LORAMUX_API_KEY", "lmx_x")
    show_lines_to_try("0.0.0.0:50060", "[::]:8123", "lora1")
    text = capsys.readouterr().out.removeprefix("try\n")
    chat, python, curl, grpcurl = (shlex.split(block) for block in text.replace("\\\n", " ").split("\n\n"))
    assert chat[1:] == ["chat", "lora1", "--grpc", "127.0.0.1:50060"]
    compile(python[2], "hint", "exec")
    call = 'complete("lora1", [{"role": "user", "content": "Hi"}], max_tokens=64)'
    assert f'Client("127.0.0.1:50060").{call}' in python[2]
    assert curl[:4] == [
        *("curl", "http://127.0.0.1:8123/v1/chat/completions"),
        *("-H", "authorization: Bearer $LORAMUX_API_KEY"),
    ]
    assert json.loads(curl[-1])["max_tokens"] == 64
    request = ParseDict(json.loads(grpcurl[grpcurl.index("-d") + 1]), pb.GenerateRequest())
    assert request.sampling.max_tokens == 64
    assert [turn.role for turn in request.messages.messages] == ["user"]
    assert grpcurl[-2:] == ["127.0.0.1:50060", "loramux.inference.v1.InferenceService/Generate"]


def test_port_0_is_a_free_port_of_the_same_host() -> None:
    """An address with port 0 keeps its host, another one stays, and without one it is a local one."""
    host, _, port = listening_address("10.0.0.4:0", "127.0.0.1:50052").rpartition(":")
    assert (host, int(port) > 0) == ("10.0.0.4", True)
    assert listening_address("10.0.0.4:7", "127.0.0.1:50052") == "10.0.0.4:7"
    assert listening_address("", "127.0.0.1:0").startswith("127.0.0.1:")
