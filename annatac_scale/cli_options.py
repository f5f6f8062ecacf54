"""Options of the command line that several commands have, and the kinds of values that they take."""

from functools import partial
from typing import TYPE_CHECKING, Any

import click

if TYPE_CHECKING:
    from annatac_scale.store.place import Location


class _LocationType(click.ParamType):
    """A Path, but for a URL, which stays text: a Path would make one slash of its two."""

    name = "location"

    def convert(
        self, value: "Location", param: click.Parameter | None, ctx: click.Context | None
    ) -> "Location":
        """As store.place.location_of."""
        from annatac_scale.store.place import location_of

        return location_of(value)


LOCATION = _LocationType()
file = partial(click.option, type=LOCATION, metavar="FILE")
folder = partial(click.option, type=LOCATION, metavar="FOLDER")
place = partial(click.option, type=LOCATION, metavar="FOLDER|URL")
text = partial(click.option, metavar="FILE")
LABEL_MAP_HELP = "Table of from and to that renames, merges and (empty to) drops labels first."
json_option = click.option("--json", "as_json", is_flag=True, help="Print JSON.")


def store_argument(command: Any) -> Any:
    """The store that a command works on."""
    return click.argument("store", type=LOCATION)(command)


def together(*options: Any) -> Any:
    """One decorator of several options, which help lists in the given order."""

    def decorate(command: Any) -> Any:
        for option in reversed(options):
            command = option(command)
        return command

    return decorate


def islands_options(assembly_needed: bool) -> Any:
    """What says which islands there are."""
    return together(
        click.option(
            "--assembly", metavar="NAME", required=assembly_needed,
            help="hg38, hg19, mm10, mm9, or any name with --chrom-sizes"
            + ("." if assembly_needed else "; needed with INPUTS."),
        ),
        click.option(
            "--select", default="tss", metavar="tss|all|FILE",
            help="Islands: bins with a TSS, all bins, or the windows of a BED file.",
        ),
        file("--chrom-sizes", help="Chromosome sizes, for an assembly that is not built in."),
        file("--tss", help="TSS table (chrom, tss0, strand, gene, type) or BED6."),
        file("--gtf", help="GTF file with the genes of the assembly, in place of --tss."),
    )  # fmt: skip


training_options = together(
    click.option("--epochs", metavar="N", type=click.IntRange(min=1), help="Epochs, in place of the preset's."),
    file("--config", help="TOML file of settings over the preset's."),
    click.option(
        "--set", "settings", multiple=True, metavar="KEY=VALUE",
        help="One setting over preset and file, as train.learning_rate=1e-3; repeatable.",
    ),
)  # fmt: skip


conversion_options = together(
    text("--peaks", help="Of files: BED file of peaks, for fragments."),
    text("--barcodes", help="Of files: list of the cells to label, one barcode a line."),
    click.option(
        "--min-fragments", metavar="N", type=click.IntRange(min=0),
        help="Of files: fragments that make a barcode a cell; default: 1000.",
    ),
    click.option("--layer", metavar="NAME", help="Of files: layer of an h5ad that holds the counts."),
    click.option("--use-raw", is_flag=True, help="Of files: the counts are in raw/X of the h5ad."),
    text("--obs", help="Of files: table of columns for obs."),
    file("--select", help="Of files: BED file that the model's islands were made of, where they were."),
    file("--chrom-sizes", help="Of files: chromosome sizes, where the model's assembly is not built in."),
)  # fmt: skip
