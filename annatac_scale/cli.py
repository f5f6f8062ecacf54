"""The command ``annatac``: parse, call one function of the API, print. Commands stand in the order of the work."""

import json
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import click
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TaskProgressColumn, TextColumn, TimeRemainingColumn
from rich.progress import Progress as Bars

from annatac_scale import api
from annatac_scale.errors import AnnatacError
from annatac_scale.progress import Advance

USER_ERROR = 2
INTERRUPTED = 130


class TerminalProgress:
    """Bars on a terminal, plain lines elsewhere; all on standard error, results on standard output."""

    def __init__(self) -> None:
        self.console = Console(stderr=True, highlight=False, soft_wrap=True)

    def say(self, line: str) -> None:
        """Print a line above the bars."""
        self.console.print(line, markup=False)

    @contextmanager
    def task(self, name: str, total: int | None, unit: str) -> Iterator[Advance]:
        """Show a bar while the task runs, if anybody is looking."""
        columns = (TextColumn("{task.description}"), BarColumn(), TaskProgressColumn(), MofNCompleteColumn())
        bars = Bars(
            *columns, TextColumn(unit), TimeRemainingColumn(), console=self.console, transient=True,
            disable=not self.console.is_terminal,
        )  # fmt: skip
        with bars:
            number = bars.add_task(name, total=total)
            yield lambda n: bars.advance(number, n)


class OrderedGroup(click.Group):
    """Lists commands in the order of the work, and turns errors on purpose into one line and exit code 2."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        """In order of definition."""
        return list(self.commands)

    def invoke(self, ctx: click.Context) -> Any:
        """Run the command."""
        try:
            return super().invoke(ctx)
        except AnnatacError as error:
            raise _Refused(" ".join(str(error).split())) from error
        except OSError as error:
            if error.filename is None:
                raise
            raise _Refused(f"{error.filename}: {error.strerror}") from error
        except KeyboardInterrupt:
            click.echo("interrupted; run the same command again to go on", err=True)
            sys.exit(INTERRUPTED)


class _Refused(click.ClickException):
    exit_code = USER_ERROR

    def show(self, file: Any = None) -> None:
        click.echo(f"annatac: error: {self.message}", err=True)


@click.group(
    cls=OrderedGroup, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110}
)
@click.version_option(package_name="annatac_scale")
def main() -> None:
    """Annotate the cell types of scATAC-seq atlases: convert, pretrain, fine-tune, predict, evaluate."""


def _assembly_options(command: Any) -> Any:
    for option in (
        click.option("--gtf", type=Path, help="GTF file with the genes of the assembly."),
        click.option("--tss", type=Path, help="TSS table (chrom tss0 strand gene type) or BED6."),
        click.option(
            "--chrom-sizes", type=Path, help="Chromosome sizes, for an assembly that is not built in."
        ),
        click.option(
            "--select", default="tss", show_default=True, help="tss, all, or a BED file of windows."
        ),
        click.option(
            "--assembly", required=True, help="hg38, hg19, mm10, mm9, or a name with --chrom-sizes."
        ),
    ):
        command = option(command)
    return command


def _training_options(command: Any) -> Any:
    for option in (
        click.option(
            "--set", "settings", multiple=True, metavar="KEY=VALUE", help="Override one setting; repeatable."
        ),
        click.option("--config", type=Path, help="TOML file of settings over the preset."),
        click.option("--epochs", type=int, help="Epochs, in place of the preset's."),
    ):
        command = option(command)
    return command


@main.command()
@_assembly_options
@click.option("--out", type=Path, help="Write the islands here (tsv.gz).")
def islands(out: Path | None, **options: Any) -> None:
    """Show the islands of an assembly, or write them."""
    space = api.islands(out=out, progress=TerminalProgress(), **options)
    click.echo(
        f"{len(space):,} islands of {space.assembly}, selection {space.selection}, sha256 {space.sha256}"
    )
    for name, genes in list(zip(space.names(), space.genes, strict=True))[: 5 if out is None else 0]:
        click.echo(f"{name}\t{genes}")


@main.command()
@click.argument("inputs", nargs=-1, type=Path)
@_assembly_options
@click.option(
    "--out", type=Path, required=True, help="The island store; samples are added to one that is there."
)
@click.option(
    "--sheet", type=Path, help="Table of inputs: sample, path, peaks, barcodes, obs, further obs columns."
)
@click.option("--sample", multiple=True, help="Name of an input, in their order; default: the file's name.")
@click.option("--peaks", type=Path, help="BED file of peaks, for fragment files.")
@click.option(
    "--barcodes", type=Path, help="List of the cells to keep, one barcode a line; each keeps a row."
)
@click.option(
    "--min-fragments", default=1000, show_default=True, help="Fragments that make a barcode a cell."
)
@click.option(
    "--counting", default="insertion", show_default=True,
    type=click.Choice(["insertion", "fragment", "paired-insertion"]), help="What is counted in a peak.",
)  # fmt: skip
@click.option(
    "--obs", type=Path, help="Table of labels: barcode, optional sample, any columns. X stays untouched."
)
@click.option("--layer", help="Layer of an h5ad that holds the counts.")
@click.option("--use-raw", is_flag=True, help="Counts are in raw/X of the h5ad.")
@click.option("--workers", default=1, show_default=True, help="Threads that work at the same time.")
def convert(inputs: Sequence[Path], **options: Any) -> None:
    """Convert h5ad, 10x h5, 10x mtx folders and fragments.tsv.gz into an island store."""
    report = api.convert(list(inputs), progress=TerminalProgress(), **options)
    for state in ("converted", "skipped", "relabelled"):
        names = list(getattr(report, state))
        if names:
            click.echo(f"{state}: {', '.join(names)}")
    click.echo(f"{report.store}")


@main.command()
@click.argument("store", type=Path)
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def info(store: Path, as_json: bool) -> None:
    """Show what a store holds and where it came from."""
    found = api.info(store)
    click.echo(json.dumps(found.to_dict(), indent=1) if as_json else found.text())


@main.command()
@click.argument("store", type=Path)
@click.option("--out", type=Path, required=True, help="Folder of the run; the model is OUT/model.")
@click.option("--preset", default="tiny", show_default=True, type=click.Choice(["tiny", "small", "paper"]))
@click.option(
    "--attend", type=click.Choice(["all", "open"]), help="Which islands are tokens; default: the preset's."
)
@_training_options
@click.option(
    "--workers", default=0, show_default=True, help="Processes on Ray Train; 0: this process alone."
)
@click.option("--gpus", is_flag=True, help="One GPU a worker.")
def pretrain(store: Path, **options: Any) -> None:
    """Pretrain an encoder on the cells of a store."""
    report = api.pretrain(store, progress=TerminalProgress(), **options)
    click.echo(
        f"{report.model}: {report.n_cells:,} cells, {report.n_islands:,} islands, {_figures(report.figures)}"
    )


@main.command()
@click.argument("store", type=Path)
@click.option("--model", type=Path, required=True, help="Folder of the pretrained model.")
@click.option("--labels", required=True, help="obs column with the cell types.")
@click.option("--out", type=Path, required=True, help="Folder of the run; the model is OUT/model.")
@click.option(
    "--head", type=click.Choice(["pooled", "cnn", "subtype"]), help="Default: pooled; cnn after preset paper."
)
@click.option(
    "--holdout", default="0.2", show_default=True, help="Share of cells to test on, or column=value."
)
@click.option("--freeze-encoder", is_flag=True, help="Train the head alone.")
@_training_options
def finetune(store: Path, **options: Any) -> None:
    """Fine-tune a pretrained model on the labelled cells of a store."""
    report = api.finetune(store, progress=TerminalProgress(), **options)
    click.echo(f"{report.model}: {len(report.types)} types, val {_figures(report.figures)}")
    if report.test:
        click.echo(f"held-out cells ({report.split['test']:,}): {_figures(report.test)}")


@main.command()
@click.argument("store", type=Path)
@click.option("--model", type=Path, required=True, help="Folder of the fine-tuned model.")
@click.option("--out", type=Path, required=True, help="Folder for the Parquet tables.")
@click.option(
    "--novel-threshold",
    type=float,
    help="Confidence below which a cell is Novel_cell_type; 0: none. Default 0.5.",
)
@click.option("--write-h5ad", type=Path, help="Also write the input h5ad with the labels in its obs.")
def predict(store: Path, **options: Any) -> None:
    """Label every cell of a store."""
    report = api.predict(store, progress=TerminalProgress(), **options)
    click.echo(f"{report.out}: {report.n_cells:,} cells, {report.n_novel:,} named Novel_cell_type")


@main.command()
@click.argument("labels", type=Path)
@click.option("--store", type=Path, required=True, help="The store with the true types.")
@click.option("--truth", required=True, help="obs column with the true types.")
@click.option(
    "--cells", default="test", show_default=True, type=click.Choice(["test", "all"]), help="Held-out or all."
)
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def evaluate(labels: Path, as_json: bool, **options: Any) -> None:
    """Compare predicted labels with the truth, on held-out cells."""
    report = api.evaluate(labels, **options)
    click.echo(json.dumps(report.to_dict(), indent=1) if as_json else "\n".join(report.text()))


@main.command()
@click.option("--out", type=Path, default=Path("demo"), show_default=True, help="Folder to work in.")
@click.option("--full", is_flag=True, help="All five folds of each data set, pooled.")
@click.option("--json", "as_json", is_flag=True, help="Print the figures as JSON.")
def demo(out: Path, full: bool, as_json: bool) -> None:
    """Run the whole road on real data that the package ships."""
    figures = api.demo(out, full=full, progress=TerminalProgress())
    if as_json:
        click.echo(json.dumps(figures, indent=1))


def _figures(figures: dict[str, float]) -> str:
    return ", ".join(
        f"{name} {value:.4g}" for name, value in figures.items() if name not in ("score", "epoch")
    )
