"""One function a command: what the command line calls, and what ``import annatac_scale as ats`` offers.

Heavy libraries are imported inside the functions: asking for help must not wait for torch, ray or dask.
"""

from collections.abc import Sequence
from dataclasses import fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, overload

from annatac_scale.errors import ConfigError, InputError
from annatac_scale.progress import Progress, Silent

if TYPE_CHECKING:
    from annatac_scale.annotate.evaluation_report import EvaluationReport
    from annatac_scale.annotate.predict import PredictReport
    from annatac_scale.genome.islands import IslandSpace
    from annatac_scale.ingest.convert import ConvertReport
    from annatac_scale.ingest.dry_run import ConversionPlan
    from annatac_scale.report.labels import LabelsReport
    from annatac_scale.report.quality import QualityTable
    from annatac_scale.store.csr import ExportReport
    from annatac_scale.store.findings import VerifyReport
    from annatac_scale.store.info import StoreInfo
    from annatac_scale.store.place import Location
    from annatac_scale.train.cost import CostReport
    from annatac_scale.train.finetune import FinetuneReport
    from annatac_scale.train.pretrain import PretrainReport

AnyPath = Path | str
"""A path; what is called a Location may be a URL of object storage as well."""


def islands(
    assembly: str,
    *,
    select: str = "tss",
    out: AnyPath | None = None,
    chrom_sizes: AnyPath | None = None,
    tss: AnyPath | None = None,
    gtf: AnyPath | None = None,
    progress: Progress | None = None,
) -> "IslandSpace":
    """The islands of an assembly: "tss", "all", or the windows of a BED file; written to ``out`` (tsv.gz) if given.

    chrom_sizes, tss, gtf: files that describe an assembly which is not built in, or other TSS for one that is
    """
    from annatac_scale.genome.annotation import read_gtf, read_tss
    from annatac_scale.genome.assembly import Assembly
    from annatac_scale.genome.islands import select_islands
    from annatac_scale.store.place import on_disk

    out = None if out is None else on_disk(out, "--out")
    if tss is not None and gtf is not None:
        raise InputError("found both a TSS table and a GTF file; expected one; leave out --tss or --gtf")
    genome = (
        Assembly.builtin(assembly)
        if chrom_sizes is None
        else Assembly.from_chrom_sizes(chrom_sizes, assembly)
    )
    table = read_tss(tss) if tss else read_gtf(gtf) if gtf else None
    space = select_islands(genome, select, table, progress)
    if out is not None:
        space.write(out)
    return space


def convert(
    inputs: AnyPath | Sequence[AnyPath] = (),
    *,
    out: AnyPath,
    assembly: str | None = None,
    obs: AnyPath | None = None,
    sheet: AnyPath | None = None,
    dry_run: bool = False,
    progress: Progress | None = None,
    **options: Any,
) -> "ConvertReport | ConversionPlan":
    """Convert inputs, or those of a ``sheet``, into the island store ``out``; without any, join ``obs`` to its cells.

    assembly: needed with inputs; obs: table of labels; dry_run: only tell what would be done, and what is wrong
    options: as in ``ingest.convert.ConvertOptions``, for inputs only
    """
    from annatac_scale.ingest.convert import convert as run
    from annatac_scale.ingest.convert import dry_run as plan

    inputs = [inputs] if isinstance(inputs, str | Path) else list(inputs)
    if obs is not None and not inputs and sheet is None:
        return _join(obs, out, assembly, options, progress)
    if assembly is None:
        raise InputError(
            "--assembly: found none; expected hg38, hg19, mm10, mm9, or a name together with --chrom-sizes; "
            "name the assembly that the inputs were aligned to"
        )
    return (plan if dry_run else run)(
        inputs, assembly=assembly, out=out, obs=obs, sheet=sheet, progress=progress, **options
    )


def _join(
    obs: AnyPath, out: AnyPath, assembly: str | None, options: dict[str, Any], progress: Progress | None
) -> "ConvertReport":
    """Join labels to the cells of a store. Raises InputError for options that only inputs can have."""
    from annatac_scale.ingest.convert import ConvertOptions, ConvertReport
    from annatac_scale.ingest.labels import join_obs, read_labels
    from annatac_scale.ingest.local_copy import local_copy
    from annatac_scale.ingest.sheet import located
    from annatac_scale.store.place import place_of
    from annatac_scale.store.store import IslandStore

    store = located(out)
    if place_of(store).size("zarr.json") is None:
        raise InputError(
            f"{store}: found no store to join {obs} to, and no inputs; expected one of both; give the inputs"
        )
    there = IslandStore.open(store)
    default, given = ConvertOptions(), ConvertOptions(**options)
    idle = [f.name for f in fields(default) if getattr(given, f.name) != getattr(default, f.name)]
    if assembly is not None and assembly != there.attributes["assembly"]:
        idle.append("assembly")
    if idle:
        raise InputError(
            f"--{idle[0].replace('_', '-')}: found without inputs; expected --out and --obs alone, which join labels "
            f"to {store}; leave it out, or give the inputs"
        )
    with local_copy(located(obs)) as file:
        join_obs(store, file, progress)
        labels = read_labels(file)
    return ConvertReport(store, relabelled=[name for name in there.samples if len(labels.of(name))])


@overload
def info(store: "Location") -> "StoreInfo": ...
@overload
def info(store: "Location", *, qc: Literal[True], plot: AnyPath | None = None) -> "QualityTable": ...
@overload
def info(store: "Location", *, digest: Literal[True]) -> str: ...
@overload
def info(
    store: "Location", *, verify: Literal[True], workers: int | None = None, progress: Progress | None = None
) -> "VerifyReport": ...
@overload
def info(store: "Location", *, cost: Literal[True], progress: Progress | None = None) -> "CostReport": ...
def info(
    store: "Location",
    *,
    qc: bool = False,
    plot: AnyPath | None = None,
    digest: bool = False,
    verify: bool = False,
    cost: bool = False,
    workers: int | None = None,
    progress: Progress | None = None,
) -> "StoreInfo | QualityTable | str | VerifyReport | CostReport":
    """What a store holds and where it came from.

    qc: the quality of its cells instead, a line a sample; plot: drawn into this PNG, SVG or PDF file as well
    digest: the digest of the store alone, equal for stores of the same samples
    verify: read all of the store and report whatever is not as the store says; workers: threads for that
    cost: what pretraining and predicting its cells cost by preset, measured on this machine
    """
    from annatac_scale.store.place import on_disk
    from annatac_scale.store.store import IslandStore

    plot = None if plot is None else on_disk(plot, "--plot")
    views = {"digest": digest, "qc": qc, "verify": verify, "cost": cost}
    asked = [name for name, given in views.items() if given]
    if plot is not None and not qc:
        raise InputError(f"--plot {plot}: found without --qc, whose picture it is; expected both; add --qc")
    if workers is not None and not verify:
        raise InputError(f"--workers {workers}: found without --verify, whose threads they are; add --verify")
    if len(asked) > 1:
        raise InputError(f"found both --{asked[0]} and --{asked[1]}; expected one of both; leave one out")
    if verify:
        from annatac_scale.store.verify import verify as run

        return run(store, workers, progress)
    if cost:
        from annatac_scale.train.cost import cost as measure

        return measure(IslandStore.open(store), progress)
    if digest:
        return IslandStore.open(store).digest
    if qc:
        return _quality(store, plot)
    from annatac_scale.store.info import describe

    return describe(IslandStore.open(store))


def _quality(store: "Location", plot: AnyPath | None) -> "QualityTable":
    from annatac_scale.report.quality import QualityTable, read_quality
    from annatac_scale.store.store import IslandStore

    if plot is not None:
        from annatac_scale.report.pictures import check_ending, write_picture

        check_ending(plot)
    samples = read_quality(IslandStore.open(store))
    if plot is not None:
        write_picture(samples, plot)
    return QualityTable(str(store), samples)


def pretrain(
    store: "Location",
    *,
    out: "Location",
    preset: str = "tiny",
    attend: str | None = None,
    epochs: int | None = None,
    config: AnyPath | None = None,
    settings: Sequence[str] | str = (),
    workers: int | str = 0,
    ray: str | None = None,
    gpus: bool = False,
    progress: Progress | None = None,
    **options: Any,
) -> "PretrainReport":
    """Pretrain an encoder on the cells of a store; the model folder is ``out``/model.

    preset: "tiny", "small" or "paper"
    attend: "open" or "all", which trains the Linformer also where the preset does not; None for the preset's own
    config: a TOML file over the preset; settings: ``key=value`` over both, as ``train.learning_rate=1e-3``
    workers: 0 trains in this process, or as one of those that torchrun started; N or "MIN:MAX" on Ray Train
    ray: the cluster to train on, "auto" or HOST:PORT; None: RAY_ADDRESS's, else one that is started here for the run
    options: as in ``train.run_options.RunOptions``, as checkpoint_minutes=5
    """
    from annatac_scale.config import override, read_toml
    from annatac_scale.store.store import IslandStore
    from annatac_scale.train.presets import PretrainConfig, pretrain_preset
    from annatac_scale.train.run_options import RunOptions

    chosen = pretrain_preset(preset)
    if attend is not None and not chosen.runs_encoder:
        chosen = replace(chosen, reads="gate")
    if config is not None:
        chosen = read_toml(PretrainConfig, config, chosen)
    chosen = override(chosen, _listed(settings))
    if attend is not None:
        if not chosen.runs_encoder:
            raise ConfigError(
                f"--attend {attend}: --config or --set says reads = none, which leaves the Linformer out, so that "
                "nothing attends; leave out one of them"
            )
        chosen = replace(chosen, encoder=replace(chosen.encoder, attend=attend))
    if epochs is not None:
        chosen = replace(chosen, train=replace(chosen.train, epochs=epochs, min_steps=0))
    how = RunOptions(**options)
    if workers or gpus or ray is not None:
        from annatac_scale.train.cluster import Cluster, pretrain_on_ray

        cluster = Cluster.of(workers or 1, gpus, ray)
        return pretrain_on_ray(store, out, chosen, cluster, progress, how)
    from annatac_scale.train.pretrain import pretrain as run

    return run(IslandStore.open(store), out, chosen, progress, how)


def finetune(
    store: "Location",
    *,
    model: "Location",
    labels: str,
    out: AnyPath,
    head: str | None = None,
    holdout: float | str = 0.2,
    group: str | None = None,
    freeze_encoder: bool = False,
    label_map: AnyPath | None = None,
    hierarchy: AnyPath | None = None,
    epochs: int | None = None,
    config: AnyPath | None = None,
    settings: Sequence[str] | str = (),
    progress: Progress | None = None,
) -> "FinetuneReport":
    """Fine-tune a pretrained model on the labelled cells of a store; the model folder is ``out``/model.

    ``out``/report.md says what the held-out cells tell, in figures, pictures and sentences.

    store, model: on a disk or in object storage; out: on a disk
    labels: obs column with the cell types
    head: "pooled", "linear", "cnn" or "subtype"; None for "linear" up to 12,000 training cells where nothing is set
        that only training looks at, as ``epochs``; "pooled" above; "cnn" after preset paper
    holdout: share of each type's cells that test, or "column=value": all cells with that value test
    group: obs column, or "sample", whose cells of one value (a donor, a batch) keep together: whole groups test
    label_map: table of from and to, which renames, merges and drops labels before anything else
    hierarchy: table of child and parent, or an OBO or OWL file, with what lies above the labels
    config, settings: as for ``pretrain``
    """
    from annatac_scale.config import override, read_toml
    from annatac_scale.model.folder import read_model
    from annatac_scale.store.place import on_disk
    from annatac_scale.store.store import IslandStore
    from annatac_scale.train.finetune import finetune as run
    from annatac_scale.train.presets import FinetuneConfig, finetune_preset

    pretrained = read_model(model)
    info = pretrained.info
    chosen = finetune_preset(info.preset, head, info.pooled_layer)
    if config is not None:
        chosen = read_toml(FinetuneConfig, config, chosen)
    chosen = override(chosen, _listed(settings))
    if head is not None and chosen.head.kind != head:
        raise ConfigError(f"--head {head}: --config or --set says {chosen.head.kind!r}; give one of them")
    if freeze_encoder:
        chosen = replace(chosen, freeze_encoder=True)
    if epochs is not None:
        chosen = replace(chosen, train=replace(chosen.train, epochs=epochs, min_steps=0))
    report = run(
        IslandStore.open(store),
        pretrained,
        labels,
        out,
        chosen,
        holdout,
        progress,
        group=group,
        label_map=label_map,
        hierarchy=hierarchy,
    )
    _report_finetuning(on_disk(out, "--out"), progress or Silent())
    return report


def _report_finetuning(run: Path, progress: Progress) -> None:
    """Write the report of a complete run; one without held-out cells on record, of an older version, gets none."""
    from annatac_scale.report.finetuning import REPORT_MD, write_finetuning_report

    try:
        report = write_finetuning_report(run)
    except InputError as error:
        progress.say(f"no report: {error}")
        return
    for sentence in report.confusions.sentences:
        progress.say(sentence)
    progress.say(f"report: {run / REPORT_MD}")


def predict(
    inputs: "Location | Sequence[Location]",
    *,
    model: "Location",
    out: "Location",
    hierarchy_threshold: float | None = None,
    probabilities: bool = False,
    embeddings: bool = False,
    project: bool = False,
    part: str | None = None,
    workers: int = 0,
    ray: str | None = None,
    gpus: bool = False,
    consensus: str | None = None,
    consensus_resolution: float = 1.0,
    write_h5ad: AnyPath | None = None,
    write_obs: bool = False,
    peaks: AnyPath | None = None,
    barcodes: AnyPath | None = None,
    min_fragments: int | None = None,
    layer: str | None = None,
    use_raw: bool = False,
    obs: AnyPath | None = None,
    select: AnyPath | None = None,
    chrom_sizes: AnyPath | None = None,
    progress: Progress | None = None,
    **options: Any,
) -> "PredictReport":
    """Label every cell of a store, or of h5ad, 10x and fragment files; ``out`` becomes a folder of Parquet tables.

    inputs: an island store, or files, which go through a temporary one; model, out: on a disk or in object storage
    hierarchy_threshold: probability that a lineage needs, for a model with a hierarchy; None: 0.8
    probabilities: also write those of all classes; embeddings: also write those, as a Zarr group in ``out``
    project: map a store of other islands of the same assembly onto the model's
    part: "K/N", to do the K-th of N shares of the work, as one of N processes that know nothing of each other
    workers: 0: this process alone; N: as many processes of this machine, or with ``ray`` of a cluster ("auto",
        HOST:PORT, "local" to start Ray here); gpus: one GPU a worker, on Ray
    consensus: also vote in clusters, of "leiden" on the embeddings or of the obs column of that name
    consensus_resolution: of Leiden, the higher, the more clusters
    write_h5ad, write_obs: also write the labels into a copy of the one h5ad, or into the obs of the store's samples
    peaks, barcodes, min_fragments, layer, use_raw, obs, chrom_sizes: of files, as of ``convert``; select: a BED file
    options: as in ``annotate.confidence.ConfidenceOptions``, as novel_threshold=0.5, novel_rate=0.05 or coverage=0.9
    """
    from annatac_scale.annotate.labels_writer import Share
    from annatac_scale.annotate.predict import Workers
    from annatac_scale.annotate.predict_files import predict_inputs

    share = Share() if part is None else Share.parsed(part)
    of_files: dict[str, Any] = {
        "peaks": peaks, "barcodes": barcodes, "obs": obs, "chrom_sizes": chrom_sizes, "layer": layer,
        "select": select and str(select), "min_fragments": min_fragments, "use_raw": use_raw or None,
    }  # fmt: skip
    return predict_inputs(
        [inputs] if isinstance(inputs, str | Path) else list(inputs),
        model,
        out,
        {name: value for name, value in of_files.items() if value is not None},
        hierarchy_threshold=hierarchy_threshold,
        probabilities=probabilities,
        embeddings=embeddings,
        project=project,
        workers=Workers(workers or int(ray is not None), ray, gpus, share),
        consensus=consensus,
        consensus_resolution=consensus_resolution,
        write_h5ad=write_h5ad,
        write_obs=write_obs,
        progress=progress,
        **options,
    )


def evaluate(
    labels: "Location",
    *,
    truth: str,
    store: "Location | None" = None,
    truth_file: "Location | None" = None,
    labels_column: str | None = None,
    against: "Location | None" = None,
    against_column: str | None = None,
    cells: str | None = None,
    label_map: AnyPath | None = None,
    group: str | None = None,
) -> "EvaluationReport":
    """Compare labels with the truth: an obs column of the store, or a column of a CSV, TSV, Parquet or h5ad file.

    labels: what ``predict`` wrote, or the column ``labels_column`` of such a file or of a store
    against: other labels of the same cells, for a paired test
    cells: held-out cells ("test") or "all"; None for "test" where ``predict`` wrote any of the labels
    label_map: table of from and to that the true labels go through first, as in ``finetune``
    group: a column beside ``truth``, as of the donor: figures of each group, and intervals over groups
    """
    from annatac_scale.annotate.evaluate import evaluate as run

    return run(
        labels,
        store,
        truth,
        cells=cells,
        labels_column=labels_column,
        truth_file=truth_file,
        against=against,
        against_column=against_column,
        label_map=label_map,
        group=group,
    )


def report(
    labels: "Location", *, out: AnyPath | None = None, progress: Progress | None = None
) -> "LabelsReport":
    """Sum up what ``predict`` wrote, all of it or the parts that are there: labels by sample, confidence, sets.

    labels: on a disk or in object storage; out: an HTML file on a disk that is written besides
    """
    from annatac_scale.annotate.labels_summary import summarize
    from annatac_scale.report.labels import LabelsReport
    from annatac_scale.store.place import on_disk

    page = None if out is None else on_disk(out, "--out")
    report = LabelsReport(summarize(labels, progress))
    if page is not None:
        from annatac_scale.report.labels_html import write_page

        write_page(report, page)
    return report


def export(
    store: "Location",
    *,
    out: AnyPath,
    samples: Sequence[str] | str = (),
    overwrite: bool = False,
    progress: Progress | None = None,
) -> "ExportReport":
    """Write the cells of a store as AnnData with CSR levels: ``out`` is an .h5ad file or a .zarr folder.

    samples: names of those to write, one or several (commas may stand between them); all if there are none
    overwrite: replace an AnnData that is there
    """
    from annatac_scale.store.csr import export as run
    from annatac_scale.store.store import IslandStore

    names = [name for some in _listed(samples) for name in some.split(",")]
    return run(IslandStore.open(store), out, names, overwrite, progress)


def demo(
    out: AnyPath = "demo", *, full: bool = False, progress: Progress | None = None
) -> list[dict[str, Any]]:
    """The whole road on the data that the package ships; returns the figures, a dict a data set."""
    from annatac_scale.demonstration import run_demo
    from annatac_scale.store.place import on_disk

    return run_demo(on_disk(out, "--out"), full, progress or Silent())


def _listed(texts: Sequence[str] | str) -> Sequence[str]:
    """One text may come alone."""
    return [texts] if isinstance(texts, str) else texts
