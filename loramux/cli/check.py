"""``loramux check``: everything that a build would say about an adapter, shown; nothing is written."""

import asyncio
import functools
from collections.abc import Awaitable, Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.filesize import decimal

from loramux.cli import shell
from loramux.cli.documents import emit
from loramux.cli.exits import Exit
from loramux.cli.local.services import builder_command, local_roots
from loramux.cli.local.tree import ProcessTree, free_address, run_tree
from loramux.cli.tables import kind, task
from loramux.client import AsyncClient
from loramux.records import AdapterReport, RowReport
from loramux.servers.forms import FailOn, Format
from loramux_shared.bases.files import GGUF_SUFFIX
from loramux_shared.bundle.modules import NO_LAYER
from loramux_shared.deployment import SCHEMES, LoraConfiguration, Repository, SourceKind
from loramux_shared.deployment_file import parse_lora_configuration
from loramux_shared.faults import Finding, RepoNotFound, SourceUnavailable
from loramux_shared.spelling import parse_repository
from loramux_shared.wording import counted

Base = Annotated[
    str, typer.Option("--base", metavar="BASE", help="Base, in the form of ADAPTER.", show_default=False)
]
For = Annotated[
    str,
    typer.Option("--for", metavar="SERVERS", help="vllm, sglang, llama.cpp, tensorrt-llm, peft, loramux."),
]
Fix = Annotated[
    Path | None, typer.Option("--fix", metavar="OUT", help="New folder for it as every server reads it.")
]
FailOnOption = Annotated[
    FailOn, typer.Option("--fail-on", metavar="WHEN", help="never, ignored, refused or unknown.")
]
FormatOption = Annotated[Format, typer.Option("--format", metavar="FORM", help="text, json, sarif or junit.")]
AdapterArgument = Annotated[
    str, typer.Argument(metavar="ADAPTER", help=f"Adapter: org/name[@rev], path, {' '.join(SCHEMES)}")
]
MaxRank = Annotated[
    int, typer.Option("--max-rank", metavar="R", min=1, help="Ceiling of ranks (max_lora_rank).")
]
StorageDtype = Annotated[
    str | None,
    typer.Option("--dtype", metavar="NAME", help="bfloat16, float16 or float32; default: the base's."),
]
Secret = Annotated[str, typer.Option("--secret", metavar="NAME", help="Name of the repositories' secret.")]
SignedBy = Annotated[
    list[str] | None, typer.Option("--signed-by", metavar="SIGNER", help="Required signer; repeatable.")
]
SomeBuilder = Annotated[
    str, typer.Option("--builder", metavar="HOST:PORT", help="Builder's address; default: a private one, here.")
]


@dataclass(frozen=True)
class CheckOptions:
    """The options of a check."""

    adapter: Repository
    base: Repository
    lora: LoraConfiguration
    signed_by: tuple[str, ...] = ()

    @property
    def repositories(self) -> tuple[Repository, Repository]:
        """The adapter's and the base's."""
        return self.adapter, self.base

    @property
    def local_roots(self) -> list[Path]:
        """The folders that a builder must be allowed to read."""
        return local_roots(self.repositories)


@shell.command
def check(
    context: typer.Context,
    adapter: AdapterArgument,
    base: Base = "",
    max_rank: MaxRank = 64,
    truncate_to: shell.TruncateTo = None,
    dtype: StorageDtype = None,
    secret: Secret = "",
    signed_by: SignedBy = None,
    builder: SomeBuilder = "",
    as_json: shell.Json = False,
    for_servers: For = "",
    fail_on: FailOnOption = FailOn.REFUSED,
    form: FormatOption = Format.TEXT,
    fix: Fix = None,
) -> None:
    """Check an adapter against a base; exit 1 if it is refused.

    Example: loramux check ./my-adapter --base org/base@main
    """
    if not base and (fix or not for_servers):
        context.fail("Missing option '--base'.")
    if fix and (builder or truncate_to):
        context.fail("--fix goes with neither --builder nor --truncate-to.")
    trained, known = named(adapter, secret), named(base, secret) if base else None

    def options() -> CheckOptions:
        lora = parse_lora_configuration(max_lora_rank=max_rank, truncate_to_rank=truncate_to, dtype=dtype)
        return CheckOptions(trained, named(base, secret), lora, shell.signers(signed_by))

    if not (for_servers or fix):
        tell_report(check_with(builder, options()), as_json)
        return
    from loramux.cli.check_for import Question, server_names, tell_verdicts

    names, fixed = server_names(for_servers) if for_servers else (), None
    if fix:
        from loramux.cli.check_fix import fix_adapter

        fixed = fix_adapter(options(), fix)
        trained = fixed.repository
    report = (lambda: check_with(builder, options())) if base else None
    question = Question(trained, known, names, max_rank, report)
    tell_verdicts(question, Format.JSON if as_json else form, fail_on, fixed)


def tell_report(report: AdapterReport, as_json: bool) -> None:
    """Print a report; one of a refused adapter ends the command with exit code 1."""
    if as_json:
        emit(report_fields(report))
    else:
        show_report(report)
    if not report.accepted:
        raise typer.Exit(Exit.FAILED)


def named(word: str, secret: str) -> Repository:
    """Return the repository that a word names, with the name of its secret."""
    repository = parse_repository(word)
    return repository.model_copy(update={"runtime_secret_name": secret}) if secret else repository


def check_with(builder: str, options: CheckOptions) -> AdapterReport:
    """Check with a running builder, or with one of our own."""
    found: list[AdapterReport] = []

    async def ask(client: AsyncClient) -> None:
        with shell.step(f"checking {options.adapter.label}"):
            found.append(
                await client.check(options.adapter, options.base, options.lora, signed_by=options.signed_by)
            )

    with folders_meant(options):
        with_builder(builder, options.local_roots, ask)
    return found[0]


@contextmanager
def folders_meant(options: CheckOptions) -> Iterator[None]:
    """Say of a repository that the hub lacks that there is no such folder either."""
    try:
        yield
    except (RepoNotFound, SourceUnavailable) as fault:
        if fault.repository not in {each.repo for each in options.repositories if each.source is SourceKind.HF}:
            raise
        message = f"{fault.message.rstrip('.')}. If a folder was meant: there is no {fault.repository} here."
        raise fault.with_message(message) from fault


def with_builder(
    address: str, local_roots: Sequence[Path], work: Callable[[AsyncClient], Awaitable[None]]
) -> None:
    """Call a running builder, or a private one whose store is thrown away; none is left afterwards."""
    if address:
        asyncio.run(_call(address, work))
    else:
        run_tree(functools.partial(_private, local_roots=local_roots, work=work))


async def _private(
    tree: ProcessTree, local_roots: Sequence[Path], work: Callable[[AsyncClient], Awaitable[None]]
) -> None:
    require_folders(local_roots)
    address = free_address()
    argv = builder_command(f"file://{tree.folder / 'store'}", address, local_roots, extra="check")
    with shell.step("starting a private builder"):
        await tree.serve("builder", argv)
    await _call(address, work)


def require_folders(folders: Sequence[Path]) -> None:
    """Raise RepoNotFound where a folder of an adapter or of a base is not there."""
    for folder in folders:
        if not folder.is_dir() and not (folder.suffix == GGUF_SUFFIX and folder.is_file()):
            found = "a file, not a folder" if folder.exists() else "no such folder on this machine"
            raise RepoNotFound(f"LOCAL {folder}: {found}")


async def _call(address: str, work: Callable[[AsyncClient], Awaitable[None]]) -> None:
    async with AsyncClient(builder=address) as client:
        await work(client)


def report_fields(report: AdapterReport) -> dict[str, Any]:
    """Return a report for JSON; every field is always there."""
    return {
        "accepted": report.accepted,
        "adapter": _repository_fields(report.adapter),
        "base": _repository_fields(report.base),
        "base_model_name": report.base_model_name,
        "licence": report.licence,
        "base_licence": report.base_licence,
        "kinds": list(report.kinds),
        "replaced_rows": dict(report.replaced_rows),
        "invocation_tokens": list(report.invocation_tokens),
        "labels": list(report.labels),
        "problem_type": report.problem_type,
        "dtype": report.dtype.value,
        "bundle_bytes": report.bundle_bytes,
        "files": {name: file.model_dump() for name, file in report.files.items()},
        "findings": [finding.model_dump(exclude={"adapter"}) for finding in report.findings],
        "rows": [asdict(row) for row in report.rows],
    }


def _repository_fields(repository: Repository) -> dict[str, str]:
    return {
        "source": repository.source.value,
        "repo": repository.label,
        "revision": repository.revision,
        "subfolder": repository.subfolder,
    }


RIGHT = frozenset({"rows", "rank", "scale", "|A|", "|B|", "|BA| least", "|BA| most"})


def show_report(report: AdapterReport) -> None:
    """Print a report."""
    _show_origin(report)
    _show_contents(report)
    if report.rows:
        shell.show()
        _show_rows(report.rows)
    for finding in report.findings:
        shell.show()
        show_finding(finding)
    shell.show()
    errors = sum(not finding.code.startswith("W_") for finding in report.findings)
    warnings = len(report.findings) - errors
    summary = f"{_count(errors, 'error')}, {_count(warnings, 'warning')}"
    if report.accepted:
        shell.show(f"accepted: {summary}", "bold green")
    else:
        shell.show(f"refused: {summary}", "bold red")


def _show_origin(report: AdapterReport) -> None:
    """Print the repositories, their licences and their files."""
    shell.show(f"adapter  {_name(report.adapter)}")
    shell.show(f"base     {_name(report.base)}")
    if report.base_model_name:
        shell.show(f"trained  on {report.base_model_name}, as the adapter says")
    if report.licence or report.base_licence:
        shell.show(f"licence  {report.licence or 'not said'}; the base's: {report.base_licence or 'not said'}")
    sizes = ", ".join(f"{name} {decimal(file.size)}" for name, file in sorted(report.files.items()))
    if sizes:
        shell.show(f"files    {sizes}")


def _show_contents(report: AdapterReport) -> None:
    """Print what the adapter is, its task, and the bundle that a build would make of it."""
    if report.kinds:
        shell.show(f"kind     {kind(report.kinds, report.replaced_rows, len(report.labels))}")
    if purpose := task(report.kinds, report.labels, report.problem_type):
        shell.show(f"task     {purpose}")
    if report.invocation_tokens:
        shell.show(f"acts     from the tokens {shell.numbers(report.invocation_tokens)} on")
    if report.kinds:
        shell.show(f"bundle   {decimal(report.bundle_bytes)} as {report.dtype}, {len(report.rows)} rows")


def _show_rows(rows: Sequence[RowReport]) -> None:
    """Print a line per module and (rank, scale): the layers that share them, and norms over all of these."""
    kinds: dict[tuple[int, str, int, float, int | None], list[RowReport]] = {}
    for row in rows:
        key = (row.module_id, row.module, row.rank, row.scale, row.truncated_from)
        kinds.setdefault(key, []).append(row)
    headers = ("module", "layers", "rank", "scale", "|A|", "|B|", "|BA| least", "|BA| most")
    cells = [
        (
            module,
            layers([row.layer for row in same if row.layer != NO_LAYER]) or "none",
            f"{cut} -> {rank}" if cut else str(rank),
            f"{scale:.6g}",
            f"{_mean([row.norm_a for row in same]):.4g}",
            f"{_mean([row.norm_b for row in same]):.4g}",
            f"{min(row.norm_ba for row in same):.4g}",
            f"{max(row.norm_ba for row in same):.4g}",
        )
        for (_, module, rank, scale, cut), same in sorted(kinds.items(), key=lambda item: item[0][:4])
    ]
    shell.table(headers, cells, RIGHT)


def layers(numbers: Sequence[int]) -> str:
    """Return layers for a cell: ``0-3, 7``."""
    parts: list[list[int]] = []
    for number in sorted(set(numbers)):
        if parts and parts[-1][-1] == number - 1:
            parts[-1].append(number)
        else:
            parts.append([number])
    return ", ".join(f"{part[0]}-{part[-1]}" if len(part) > 1 else str(part[0]) for part in parts)


def show_finding(finding: Finding, show: Callable[..., None] = shell.show) -> None:
    """Print a finding, a line for each of its parts."""
    warning = finding.code.startswith("W_")
    show(f"{finding.code}  {finding.where}".rstrip(), "yellow" if warning else "bold red")
    for name, value in (("expected", finding.expected), ("found", finding.found), ("fix", finding.fix)):
        if value:
            show(f"  {name:<8} {value}")


def _name(repository: Repository) -> str:
    place = "/".join(part for part in (repository.label, repository.subfolder) if part)
    return f"{repository.source} {place}" + (f" @ {repository.revision}" if repository.revision else "")


def _count(number: int, word: str) -> str:
    return counted(number, word) if number else f"no {word}s"


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)
