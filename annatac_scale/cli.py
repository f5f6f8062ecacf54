"""The command ``annatac``: parse, call one function of the API, print. Commands stand in the order of the work."""

import errno
import json
import os
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from annatac_scale import api
from annatac_scale.cli_options import (
    LABEL_MAP_HELP,
    LOCATION,
    conversion_options,
    file,
    folder,
    islands_options,
    json_option,
    place,
    store_argument,
    text,
    training_options,
)
from annatac_scale.errors import AnnatacError, RunInterruptedError
from annatac_scale.terminal import TerminalProgress

if TYPE_CHECKING:
    from annatac_scale.store.place import Location

NOT_SOUND = 1
USER_ERROR = 2
INTERRUPTED = 130


class OrderedGroup(click.Group):
    """Lists commands in the order of the work, and turns the user's mistakes into one line and exit code 2."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        """In order of definition."""
        return list(self.commands)

    def make_context(self, *args: Any, **kwargs: Any) -> click.Context:
        """Parse what stands before the command."""
        with _one_line_errors():
            return super().make_context(*args, **kwargs)

    def invoke(self, ctx: click.Context) -> Any:
        """Run the command."""
        with _one_line_errors():
            return super().invoke(ctx)


@contextmanager
def _one_line_errors() -> Iterator[None]:
    try:
        yield
    except click.exceptions.NoArgsIsHelpError:
        raise
    except click.UsageError as error:
        command = error.ctx.command_path if error.ctx else "annatac"
        raise _Refused(f"{error.format_message().rstrip('.?')}; see `{command} --help`") from error
    except RunInterruptedError as error:
        click.echo(f"annatac: {error}", err=True)
        sys.exit(128 + error.number)
    except AnnatacError as error:
        raise _Refused(str(error)) from error
    except OSError as error:
        raise _Refused(_explained(error)) from error
    except KeyboardInterrupt:
        click.echo("annatac: interrupted; run the same command again to go on", err=True)
        sys.exit(INTERRUPTED)


def _explained(error: OSError) -> str:
    """What the system says, and what to do about it. Raises the error again where it is nothing a user could mend."""
    path = error.filename2 or error.filename
    place = "" if path is None else f"{path}: "
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return f"{place}{error.strerror}; free some space and run the same command again"
    if path is None:
        raise error
    return f"{place}{error.strerror}; check the path, and that you may read and write there"


class _Refused(click.ClickException):
    exit_code = USER_ERROR

    def show(self, file: Any = None) -> None:
        click.echo(f"annatac: error: {' '.join(self.message.split())}", err=True)


CONTEXT = {"help_option_names": ["-h", "--help"], "max_content_width": 110, "show_default": True}


@click.group(cls=OrderedGroup, context_settings=CONTEXT)
@click.version_option(package_name="annatac_scale")
def main() -> None:
    """Annotate the cell types of scATAC-seq atlases: convert, pretrain, fine-tune, predict, evaluate."""


@main.command()
@islands_options(assembly_needed=True)
@file("--out", help="Write the islands here (tsv.gz).")
def islands(out: "Location | None", **options: Any) -> None:
    """Show the islands of an assembly, or write them."""
    space = api.islands(out=out, progress=TerminalProgress(), **options)
    click.echo(
        f"{len(space):,} islands of {space.assembly}, selection {space.selection}, sha256 {space.sha256}"
    )
    for name, genes in list(zip(space.names(), space.genes, strict=True))[: 5 if out is None else 0]:
        click.echo(f"{name}\t{genes}")


@main.command()
@click.argument("inputs", nargs=-1)
@islands_options(assembly_needed=False)
@click.option(
    "--out", required=True, metavar="FOLDER|URL",
    help="The island store, on disk or as s3://...; one that is there gets the samples added.",
)  # fmt: skip
@text("--sheet", help="Table of inputs: sample, path, peaks, barcodes, obs; others become obs columns.")
@click.option(
    "--sample",
    multiple=True,
    metavar="NAME",
    help="Name of an input, in their order; default: after the files.",
)
@text("--peaks", help="BED file of peaks, for fragment files.")
@text("--barcodes", help="List of the cells to keep, one barcode a line; each gets a row.")
@click.option(
    "--min-fragments",
    default=1000,
    metavar="N",
    type=click.IntRange(min=0),
    help="Fragments that make a barcode a cell.",
)
@click.option(
    "--min-tsse",
    default=0.0,
    metavar="X",
    type=click.FloatRange(min=0),
    help="TSS enrichment that a cell needs besides.",
)
@click.option("--qc/--no-qc", default=True, help="Make the quality of each cell from fragments.")
@click.option(
    "--on-invalid",
    default="stop",
    type=click.Choice(["stop", "count"]),
    help="At an invalid line of a fragment file: stop there, or count such lines and go on.",
)
@click.option(
    "--counting", default="insertion", help="What is counted in a peak.",
    type=click.Choice(["insertion", "fragment", "paired-insertion"]),
)  # fmt: skip
@text("--obs", help="Table of labels: barcode, optional sample, any columns; X stays untouched.")
@click.option("--layer", metavar="NAME", help="Layer of an h5ad that holds the counts.")
@click.option("--use-raw", is_flag=True, help="The counts are in raw/X of the h5ad.")
@click.option(
    "--workers",
    default=1,
    metavar="N",
    type=click.IntRange(min=1),
    help="Threads that work at the same time.",
)
@click.option("--dask", metavar="ADDRESS", help="Scheduler of a Dask cluster to work on, as tcp://host:8786.")
@click.option(
    "--scratch", metavar="FOLDER", help="Where to put down what a stopped run finds again; default: in --out."
)
@click.option(
    "--range-bytes",
    default=32 << 20,
    metavar="N",
    type=click.IntRange(min=1),
    help="Size of the ranges that fragment files are cut into; a stopped run loses one a worker at most.",
)
@click.option(
    "--dry-run", is_flag=True, help="Only tell what would be done, what it costs and what is wrong."
)
@json_option
@click.pass_context
def convert(context: click.Context, inputs: Sequence[str], as_json: bool, **options: Any) -> None:
    """Convert peak matrices and fragment files into an island store.

    INPUTS are h5ad, 10x h5 and fragment files and 10x mtx folders, each a sample. Those that the store has already
    are skipped. Without INPUTS, --obs joins labels to the cells of the store.
    """
    found = api.convert(list(inputs), progress=TerminalProgress(), **options)
    if as_json:
        click.echo(_dumped(found.to_dict()))
    else:
        click.echo(found.text())
    if not found.is_sound:
        context.exit(USER_ERROR)


@main.command()
@store_argument
@click.option("--qc", is_flag=True, help="Show the quality of the cells instead, one line a sample.")
@file("--plot", help="With --qc: draw it as well; the ending says which of png, svg and pdf.")
@click.option("--digest", is_flag=True, help="Print the store's digest alone.")
@click.option(
    "--verify", is_flag=True,
    help="Read all of it instead, and tell what is not as the store says; exit code 1 where something is.",
)  # fmt: skip
@click.option(
    "--workers", metavar="N", type=click.IntRange(min=1),
    help="With --verify: threads; default: one a core, at most 8, and 32 for s3://.",
)  # fmt: skip
@click.option(
    "--cost", is_flag=True,
    help="Show instead what its cells cost by preset: FLOPs, memory, cells/s measured here in some seconds.",
)  # fmt: skip
@json_option
@click.pass_context
def info(context: click.Context, store: "Location", as_json: bool, **options: Any) -> None:
    """Show what a store holds, verify it, or tell what training costs."""
    found = api.info(store, progress=TerminalProgress(), **options)
    if isinstance(found, str):
        click.echo(_dumped({"digest": found}) if as_json else found)
    else:
        click.echo(_dumped(found.to_dict()) if as_json else found.text())
    if not getattr(found, "is_sound", True):
        context.exit(NOT_SOUND)


@main.command()
@store_argument
@place("--out", required=True, help="Folder of the run; the model is FOLDER/model.")
@click.option(
    "--preset", default="tiny", type=click.Choice(["tiny", "small", "paper"]),
    help="Size, objective and rates; paper: as published.",
)  # fmt: skip
@click.option(
    "--attend", type=click.Choice(["all", "open"]),
    help="Train the Linformer on tokens of these islands; default: as in the preset.",
)  # fmt: skip
@training_options
@click.option(
    "--workers", default="0", metavar="N|MIN:MAX",
    help="Processes on Ray Train, or as many as there are places for; 0: this one, or torchrun's.",
)  # fmt: skip
@click.option(
    "--ray", metavar="auto|HOST:PORT",
    help="A running Ray cluster; default: RAY_ADDRESS's, else one that is started here for the run.",
)  # fmt: skip
@click.option("--gpus", is_flag=True, help="One GPU a worker.")
@click.option(
    "--checkpoint-minutes", default=10.0, type=float, metavar="M",
    help="Keep the state when so much time has gone by, besides each epoch's end.",
)  # fmt: skip
@click.option("--checkpoint-steps", default=0, metavar="N", help="And after every N steps; 0: by time alone.")
@click.option("--keep", default=3, metavar="N", help="Newest checkpoints that stay, besides the best.")
@click.option(
    "--on-nan", default="stop", type=click.Choice(["stop", "skip"]),
    help="A loss that is not finite: name the cells and stop, or leave the step out.",
)  # fmt: skip
@click.option("--log-steps", default=20, metavar="N", help="Steps between two lines of metrics.jsonl.")
@click.option("--log-cells", is_flag=True, help="Write which cells each rank saw in which step.")
@click.option("--deterministic", is_flag=True, help="On GPUs, only kernels that repeat their bits.")
def pretrain(store: "Location", **options: Any) -> None:
    """Pretrain an encoder on the cells of a store.

    Alone on a laptop, under torchrun, or on a Ray cluster: the results are the same. Run again, the same command goes
    on after the newest checkpoint, on as many workers as there are then.
    """
    options["workers"] = 0 if options["workers"] == "0" else options["workers"]
    report = api.pretrain(store, progress=TerminalProgress(), **options)
    if os.environ.get("RANK", "0") == "0":  # of those that torchrun started, the first one speaks for all
        click.echo(
            f"{report.model}: {report.n_cells:,} cells, {report.n_islands:,} islands, {_figures(report.figures)}"
        )


@main.command()
@store_argument
@place("--model", required=True, help="The pretrained model.")
@click.option("--labels", required=True, metavar="COLUMN", help="obs column with the cell types.")
@folder("--out", required=True, help="Folder of the run; the model is FOLDER/model.")
@click.option(
    "--head",
    type=click.Choice(["pooled", "linear", "cnn", "subtype"]),
    help="Default: linear up to 12,000 training cells, where nothing is set that only training looks at, as --epochs; "
    "pooled above; cnn after preset paper.",
)
@click.option(
    "--holdout", default="0.2", metavar="SHARE|COLUMN=VALUE",
    help="Cells to test on, never trained on: a share of each type, or all with a value, as donor=D5.",
)  # fmt: skip
@click.option(
    "--group", metavar="COLUMN",
    help="Keep the cells of a donor or batch together: whole groups test, never cells of one that trains.",
)  # fmt: skip
@click.option("--freeze-encoder", is_flag=True, help="Train the head alone.")
@file("--label-map", help=LABEL_MAP_HELP)
@file(
    "--hierarchy",
    help="What lies above the labels: table of child and parent, or the Cell Ontology as .obo or .owl.",
)
@training_options
def finetune(store: "Location", **options: Any) -> None:
    """Fine-tune a pretrained model on the labelled cells of a store.

    Run again, the same command goes on after the newest checkpoint.
    """
    report = api.finetune(store, progress=TerminalProgress(), **options)
    click.echo(f"{report.model}: {len(report.types)} types, {report.judged_on} {_figures(report.figures)}")
    if report.test:
        click.echo(f"held-out cells ({report.split['test']:,}): {_figures(report.test)}")


@main.command()
@click.argument("inputs", nargs=-1, required=True, type=LOCATION)
@place("--model", required=True, help="The fine-tuned model.")
@place("--out", required=True, help="Where the labels go, a Parquet data set.")
@click.option(
    "--probabilities", is_flag=True, help="Also write the probabilities of all types, a column of lists."
)
@click.option(
    "--embeddings",
    is_flag=True,
    help="Also write embeddings: OUT/_embeddings.zarr, float16, an array a sample.",
)
@click.option(
    "--project",
    is_flag=True,
    help="Map a store of other islands of the same assembly onto the model's, by overlap.",
)
@text("--part", help="K/N: do share K of N, as one of N jobs over the same OUT.")
@click.option(
    "--workers", default=0, metavar="N", type=click.IntRange(min=0),
    help="Processes of this machine, or with --ray of a cluster; 0: this one alone.",
)  # fmt: skip
@click.option("--ray", metavar="auto|local|HOST:PORT", help="A running Ray cluster; local: start Ray here.")
@click.option("--gpus", is_flag=True, help="With --ray: one GPU a worker.")
@click.option(
    "--novelty", type=click.Choice(["max_probability", "energy", "mahalanobis", "knn", "profile", "joint"]),
    help="Score of how unlike the known cells a cell is; default: the model's own with a rate, else max_probability.",
)  # fmt: skip
@click.option(
    "--novel-rate", metavar="SHARE", type=float,
    help="Share of known cells that may be called Novel_cell_type; default: the model's own, else 0.05 with --novelty.",
)  # fmt: skip
@click.option(
    "--novel-threshold", metavar="SHARE", type=float,
    help="In their place, the paper's rule: confidence below which a cell is Novel_cell_type; 0: none is.",
)  # fmt: skip
@click.option(
    "--novel-adapt", is_flag=True,
    help="Take each sample's own median score as usual; assumes that few of its cells are novel.",
)  # fmt: skip
@click.option(
    "--coverage", metavar="SHARE", type=float,
    help="Share of the cells whose prediction set holds the true type; default: 0.9.",
)  # fmt: skip
@click.option(
    "--coverage-per-class/--coverage-marginal", default=True,
    help="That share of the cells of each type, or of all cells together.",
)  # fmt: skip
@click.option(
    "--min-open", metavar="N", default=0, type=click.IntRange(min=0),
    help="Cells with fewer open islands are Unassigned_low_depth, and never novel.",
)  # fmt: skip
@click.option(
    "--hierarchy-threshold", metavar="SHARE", type=float,
    help="Probability that a lineage needs, for a model with a hierarchy; default: 0.8.",
)  # fmt: skip
@click.option(
    "--consensus", metavar="leiden|COLUMN",
    help="Also vote in clusters, found on embeddings or named by an obs column: cluster, consensus, consensus_share.",
)  # fmt: skip
@click.option(
    "--consensus-resolution", metavar="X", default=1.0, type=click.FloatRange(min=0, min_open=True),
    help="Of leiden: the higher, the more clusters.",
)  # fmt: skip
@file("--write-h5ad", help="Also write the h5ad that was converted, with the labels in its obs.")
@click.option("--write-obs", is_flag=True, help="Also write the labels into the obs of the store's samples.")
@conversion_options
def predict(inputs: Sequence["Location"], **options: Any) -> None:
    """Label every cell of a store.

    INPUTS are an island store, or h5ad, 10x h5 and fragment files and 10x mtx folders: these go through a temporary
    store with the model's islands.

    Run again, the same command does the parts that are missing. Any number of jobs may share the work, each with a
    --part of its own, on machines that know nothing of each other; the last one completes the data set.
    """
    report = api.predict(list(inputs), progress=TerminalProgress(), **options)
    low_depth = f", {report.n_low_depth:,} Unassigned_low_depth" if options["min_open"] else ""
    others = "" if report.complete else "; other parts are still missing"
    click.echo(
        f"{report.out}: {report.n_cells:,} cells, {report.n_novel:,} named Novel_cell_type{low_depth}{others}"
    )
    if report.consensus is not None:
        click.echo(
            f"consensus of {report.consensus.n_clusters:,} clusters: {report.consensus.share:.1%} of the cells that "
            "vote have its label"
        )


@main.command()
@click.argument("labels", type=LOCATION)
@place("--store", help="The store with the true types.")
@text("--truth-file", help="In place of --store: a CSV, TSV, Parquet or h5ad file with the true types.")
@click.option(
    "--truth", required=True, metavar="COLUMN", help="Column with the true types, of obs or the file."
)
@click.option("--labels-column", metavar="COLUMN", help="Column with the labels; default: label of predict.")
@click.option(
    "--against", metavar="PLACE", type=LOCATION, help="Other labels of the same cells, for a paired test."
)
@click.option("--against-column", metavar="COLUMN", help="The same as --labels-column, of --against.")
@click.option(
    "--cells",
    type=click.Choice(["test", "all"]),
    help="Held-out test cells, or all; default: test where predict wrote any of the labels.",
)
@file("--label-map", help=LABEL_MAP_HELP)
@click.option(
    "--group",
    metavar="COLUMN",
    help="Column beside --truth, as of the donor: figures of each, intervals over them.",
)
@json_option
def evaluate(labels: "Location", as_json: bool, **options: Any) -> None:
    """Compare labels with the truth.

    LABELS is a folder that predict wrote, of which the held-out cells count, or any CSV, TSV, Parquet or h5ad file or a
    store, with --labels-column. Cells are joined by barcode, and by sample where both sides name it.
    """
    report = api.evaluate(labels, **options)
    click.echo(_dumped(report.to_dict()) if as_json else "\n".join(report.text()))


@main.command()
@click.argument("labels", type=LOCATION)
@file("--out", help="Also write it as one HTML file, with pictures.")
@json_option
def report(labels: "Location", as_json: bool, **options: Any) -> None:
    """Sum up the labels that predict wrote, sample by sample.

    LABELS is a folder or URL that predict wrote; of one that is not complete the parts that are there count.
    """
    found = api.report(labels, progress=TerminalProgress(), **options)
    click.echo(_dumped(found.to_dict()) if as_json else "\n".join(found.text()))


@main.command()
@store_argument
@click.option(
    "--out", required=True, metavar="FILE.h5ad|FOLDER.zarr", help="Where to; the ending says what it is."
)
@click.option("--samples", multiple=True, metavar="NAME", help="Only these, NAME or NAME,NAME; repeatable.")
@click.option("--overwrite", is_flag=True, help="Replace an AnnData that is there.")
def export(store: "Location", **options: Any) -> None:
    """Write the cells of a store as a standard AnnData, levels as CSR."""
    click.echo(api.export(store, progress=TerminalProgress(), **options).text())


@main.command()
@folder("--out", default=Path("demo"), help="Folder to work in.")
@click.option("--full", is_flag=True, help="All five folds of each data set, pooled.")
@json_option
def demo(out: "Location", full: bool, as_json: bool) -> None:
    """Run the whole road on real data that the package ships."""
    figures = api.demo(out, full=full, progress=TerminalProgress())
    if as_json:
        click.echo(_dumped(figures))


def _dumped(values: Any) -> str:
    # NaN is no JSON: a report that holds one is our mistake.
    return json.dumps(values, indent=1, allow_nan=False)


def _figures(figures: dict[str, float]) -> str:
    return ", ".join(
        f"{name} {value:.4g}" for name, value in figures.items() if name not in ("score", "epoch")
    )
