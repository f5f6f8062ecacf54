"""The page's sections of the protocol: each an experiment's rows as a table."""

import statistics
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

from plans import HEAD, LR, MODEL, SVD_LR, TASKS
from scipy import stats
from table import Row, shown

from annatac_scale.model.novelty import SCORES, SHIFTING

SETS = {
    ("cerebellum", "cell_type"): "cerebellum, 4 types",
    ("bm0828", "cell_type"): "BM0828, 7 types",
    ("granja", "coarse_label"): "granja, 8 types",
    ("granja", "cell_type"): "granja, 16 types",
    ("snareseq", "cell_type"): "snareseq, 15 types",
    ("snareseq", "orig_label"): "snareseq, 23 types",
}
STARTS = "as pretraining starts"
UNSEEN_GROUPS = ("granja", "snareseq")
"""Sets that test a donor or libraries that nothing was trained on; of the others folds test."""
ISLANDS = {"all": "islands of all bins", "tss": "islands with a TSS"}

Task = tuple[str, str]
Lines = Iterable[Sequence[str]]


def table(head: Sequence[str], body: Lines) -> str:
    """A Markdown table."""
    lines = [head, ["---"] * len(head), *body]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def sections(rows: Sequence[Row]) -> list[str]:
    """Every experiment that has rows."""
    made: list[tuple[str, str, Callable[[Sequence[Row]], Iterator[str]]]] = [
        ("sets", "Against other methods", _against),
        ("sets", "By donor and by library", _by_group),
        ("subtypes", "Close types", _subtypes),
        ("noise", "Wrong labels", _noise),
        ("shares", "Fewer labels", _shares),
        ("epochs", "With and without pretraining, epoch by epoch", _epochs),
        ("novelty", "Types that were left out", _novelty),
        ("few", "A few labels a type", _few),
        ("calibration", "Calibration", _calibration),
    ]
    parts = []
    for name, title, section in made:
        if any(row["config"]["table"] == name for row in rows):
            parts += [f"## {title}", *section(rows)]
    return parts


def rows_of(rows: Iterable[Row], *tables: str, **asked: Any) -> list[Row]:
    """Rows of some tables that gave figures, with these values in their configuration."""
    return [
        row
        for row in rows
        if row["config"]["table"] in tables
        and "failed" not in row
        and all(row["config"].get(key) == value for key, value in asked.items())
    ]


def _task(row: Row) -> Task:
    return row["config"]["set"], row["config"]["labels"]


def _against(rows: Sequence[Row]) -> Iterator[str]:
    """Tables of all methods, by set and islands, then of the paired differences of the models."""
    yield (
        "One model of seed 0 where there are several seeds; the bar is the linear method with the best macro F1 on "
        "these test cells. Differences in macro F1: 95% intervals of a paired bootstrap over cells."
    )
    for (name, labels), title in SETS.items():
        for select, islands in ISLANDS.items():
            asked = {"set": name, "select": select, "labels": labels}
            of_task = [row for row in rows_of(rows, "sets", "peers", **asked) if "held" not in row["config"]]
            if not of_task:
                continue
            yield f"### {title}, {islands}"
            yield _methods(of_task, rows_of(rows, "derived", **asked))
            failed = [
                f"{row['config']['model']}: {row['failed']}"
                for row in rows
                if "failed" in row and row["config"]["table"] == "peers" and _task(row) == (name, labels)
            ]
            if failed and select == "all":
                yield "Could not run: " + "; ".join(failed) + "."
    if any(row["config"]["kind"] == "paired" for row in rows):
        yield "### The models less the bars, macro F1"
        yield _verdict(rows)


def _methods(rows: Sequence[Row], more: Sequence[Row]) -> str:
    pooled: dict[str, list[Row]] = {}
    for row in rows:
        pooled.setdefault(row["config"]["model"], []).append(row)
    paired = {
        row["config"]["model"]: row["figures"]
        for row in more
        if row["config"]["kind"] == "paired" and row["figures"]["is_bar"]
    }
    body = []
    for name, seeds in pooled.items():
        first = min(seeds, key=lambda row: row["config"]["seed"])["figures"]["pooled"]
        spread = [row["figures"]["pooled"]["macro_f1"] for row in seeds]
        body.append(_method_line(name, first, paired.get(name), shown(spread) if len(spread) > 1 else "-"))
    for row in more:
        if row["config"]["kind"] == "ensemble":
            name = row["config"]["model"]
            body.append(_method_line(name, row["figures"]["pooled"], paired.get(name), "-"))
    body.sort(key=lambda line: -float(line[2]))
    return table(
        ("method", "accuracy", "macro F1", "kappa", "macro F1 less the bar's", "macro F1 over seeds"), body
    )


def _method_line(
    name: str, figures: Mapping[str, float], paired: Mapping[str, float] | None, spread: str
) -> list[str]:
    values = [f"{figures[key]:.3f}" for key in ("accuracy", "macro_f1", "kappa")]
    return [name, *values, "the bar" if paired is None else _interval(paired), spread]


def _interval(found: Mapping[str, float]) -> str:
    return f"{found['difference']:+.3f} [{found['low']:+.3f}, {found['high']:+.3f}]"


def _verdict(rows: Sequence[Row]) -> str:
    """The fine-tuned models less the best linear method, the MLP and the CNN."""
    found: dict[tuple[str, str, str], dict[str, str]] = {}
    for row in rows:
        config, figures = row["config"], row["figures"]
        if config["kind"] == "paired" and config["model"].startswith(MODEL):
            key = (*_task(row), config["select"])
            other = f"the bar: {figures['against']}" if figures["is_bar"] else figures["against"]
            where = f"{SETS[_task(row)]}, {config['select']}"
            found.setdefault((*key[:2], f"{where}|{config['model']}"), {})[other] = _interval(figures)
    body = []
    for (_, _, named), against in found.items():
        where, model = named.split("|")
        bar = next(
            (f"{text} ({name[9:]})" for name, text in against.items() if name.startswith("the bar")), "-"
        )
        body.append([where, model, bar, against.get("MLP", "-"), against.get("CNN head, no encoder", "-")])
    return table(("set", "model", "less the best linear method", "less the MLP", "less the CNN"), body)


def _by_group(rows: Sequence[Row]) -> Iterator[str]:
    """snareseq by library, then granja from D5 to D6."""
    models = (LR, SVD_LR, HEAD, MODEL)
    for labels in ("cell_type",):
        of_task = rows_of(rows, "sets", set="snareseq", labels=labels, select="all", seed=0)
        of_task = [row for row in of_task if row["config"]["model"] in models]
        groups = sorted({group for row in of_task for group in row["figures"]["groups"]})
        if groups:
            yield "snareseq, 15 types, accuracy and macro F1 of each library that tests:"
            body = [
                [row["config"]["model"], *(_both(row["figures"]["groups"][group]) for group in groups)]
                for row in of_task
            ]
            yield table(("method", *groups), body)
    back = [row for row in rows_of(rows, "sets", set="granja") if row["config"].get("held") == ["D6"]]
    if back:
        yield "granja from donor D5 to donor D6, the other way round:"
        body = [[SETS[_task(row)], row["config"]["model"], _both(row["figures"]["pooled"])] for row in back]
        yield table(("set", "method", "accuracy, macro F1"), body)


def _both(figures: Mapping[str, float]) -> str:
    return f"{figures['accuracy']:.3f}, {figures['macro_f1']:.3f}"


def _subtypes(rows: Sequence[Row]) -> Iterator[str]:
    """BM0828's progenitors, from "sets" as well, and the 23 types of snareseq."""
    body = [
        [SETS[_task(row)], row["config"]["model"], _both(row["figures"]["pooled"])]
        for row in [*rows_of(rows, "sets", set="bm0828", select="all", seed=0), *rows_of(rows, "subtypes")]
    ]
    yield table(("set", "method", "accuracy, macro F1"), body)


def _noise(rows: Sequence[Row]) -> Iterator[str]:
    """Macro F1 by share of wrong labels; 0 from "sets"."""
    yield "Macro F1 where a share of the training labels is another type, drawn at random; mean of the draws."
    yield _by_share(rows, "noise", (0.05, 0.1, 0.15, 0.2))


def _shares(rows: Sequence[Row]) -> Iterator[str]:
    """Macro F1 by share of labels; 1 from "sets"; paired t-tests over the repeats."""
    yield "Macro F1 with a share of the training labels; mean of three repeats."
    yield _by_share(rows, "share", (0.4, 0.6, 0.8))
    yield "The fine-tuned model less another method, macro F1, paired t-test over the repeats:"
    body = []
    for task in TASKS:
        for other in (LR, SVD_LR, HEAD):
            line = [SETS[task], other]
            for share in (0.4, 0.6, 0.8):
                ours, theirs = (
                    draws_of(rows, "shares", task, name, "share", share) for name in (MODEL, other)
                )
                line.append(_t_test(ours, theirs))
            if any(cell != "-" for cell in line[2:]):
                body.append(line)
    yield table(("set", "less", "40%", "60%", "80%"), body)


def _by_share(rows: Sequence[Row], key: str, shares: Sequence[float]) -> str:
    """A line for each set and method: macro F1 of each share, beside the labels as they are."""
    name = {"noise": "noise", "share": "shares"}[key]
    whole = "0%" if key == "noise" else "100%"
    body = []
    for task in TASKS:
        for model in (LR, SVD_LR, HEAD, MODEL):
            untouched = [
                row["figures"]["pooled"]["macro_f1"]
                for row in rows_of(
                    rows, "sets", set=task[0], labels=task[1], select="all", model=model, seed=0
                )
                if "held" not in row["config"]
            ]
            cells = [shown(draws_of(rows, name, task, model, key, share).values()) for share in shares]
            if any(cell != "-" for cell in cells):
                body.append([SETS[task], model, shown(untouched), *cells])
    return table(("set", "method", whole, *(f"{share:.0%}" for share in shares)), body)


def draws_of(
    rows: Sequence[Row], name: str, task: Task, model: str, key: str, value: float
) -> dict[int, float]:
    """Macro F1 by draw."""
    return {
        row["config"]["change"]["draw"]: row["figures"]["pooled"]["macro_f1"]
        for row in rows_of(rows, name, set=task[0], labels=task[1], model=model)
        if row["config"]["change"].get(key) == value
    }


def _t_test(ours: Mapping[int, float], theirs: Mapping[int, float]) -> str:
    """Mean difference and p of a paired t-test; a dash with fewer than two pairs."""
    differences = [ours[draw] - theirs[draw] for draw in sorted(ours) if draw in theirs]
    if len(differences) < 2:
        return "-"
    mean = statistics.fmean(differences)
    if len(set(differences)) == 1:
        return f"{mean:+.3f}"
    return f"{mean:+.3f} (p {stats.ttest_1samp(differences, 0).pvalue:.2g})"


def _epochs(rows: Sequence[Row]) -> Iterator[str]:
    """Accuracy on the cells that choose the epoch after the first, the third and the best epoch."""
    yield "Accuracy on the tenth of the training cells that chooses the epoch, mean over folds."
    body = []
    for row in newest(rows_of(rows, "epochs")):
        curves = [curve["accuracy"] for curve in row["figures"]["curves"].values()]
        cells = [f"{statistics.fmean(curve[at] for curve in curves):.3f}" for at in (0, 2, 14)]
        config = row["config"]
        started = "pretrained" if config["trained"] else "not pretrained"
        best = f"{statistics.fmean(max(curve) for curve in curves):.3f}"
        body.append([SETS[_task(row)], config["model"], started, *cells, best])
    yield table(("set", "model", "start", "epoch 1", "epoch 3", "epoch 15", "best"), body)


def newest(rows: Iterable[Row]) -> list[Row]:
    """Rows of all folds in the place of those of the first alone, where both are there."""
    found: dict[str, Row] = {}
    for row in rows:
        config = row["config"]
        key = repr({k: v for k, v in config.items() if k != "first"})
        if key not in found or "first" not in config:
            found[key] = row
    return list(found.values())


def _novelty(rows: Sequence[Row]) -> Iterator[str]:
    """Means over the types that were left out, then each type's AUROC."""
    yield (
        "Each type is left out of training in turn. AUROC of its cells against those of the known types; FPR: known "
        "cells called novel where 95% of the novel are; false: known test cells above the threshold that 5% of the "
        "training cells that were kept aside are above; within: the same share of other cells "
        "that were kept aside, of the same donors; adapted: false, where `--novel-adapt` takes the median of the "
        "unseen donor's or libraries' cells for usual (scores that shift as a whole). Means over the types."
    )
    of_model: dict[tuple[Task, str], list[Row]] = {}
    for row in newest(rows_of(rows, "novelty")):
        if not row["figures"]["n_novel"]:
            continue
        of_model.setdefault((_task(row), row["config"]["model"]), []).append(row)
    body = []
    for (task, model), lefts in of_model.items():
        for score in lefts[0]["figures"]["scores"]:
            figures = [row["figures"]["scores"][score] for row in lefts]
            keys = ["auroc", "fpr95", "false_within", "false_share"]
            if score in SHIFTING and task[0] in UNSEEN_GROUPS:
                keys.append("false_adapted")
            means = [f"{statistics.fmean(one[key] for one in figures):.3f}" for key in keys]
            body.append([SETS[task], model, score, str(len(lefts)), *means, *[""] * (5 - len(means))])
    head = ("set", "model", "score", "types", "AUROC", "FPR", "within, of 0.05", "false, of 0.05", "adapted")
    yield table(head, body)
    body = [
        [
            SETS[task],
            row["figures"]["left"],
            str(row["figures"]["n_novel"]),
            *(f"{row['figures']['scores'][score]['auroc']:.3f}" for score in SCORES),
        ]
        for (task, model), lefts in of_model.items()
        if model == MODEL
        for row in lefts
    ]
    yield "AUROC of each type, fine-tuned model:"
    yield table(("set", "left out", "cells", *SCORES), body)


def _few(rows: Sequence[Row]) -> Iterator[str]:
    """Macro F1 of five draws by labels a type, and the difference from the control."""
    yield (
        "Macro F1, five draws, ± half the 95% interval over them; in brackets the difference, paired by draw, from "
        f"the control, {SVD_LR}, whose SVD saw the same unlabelled cells."
    )
    body = []
    for task in TASKS:
        models = {row["config"]["model"]: None for row in rows_of(rows, "few", set=task[0], labels=task[1])}
        for model in models:
            line = [SETS[task], model]
            for labels in (5, 10, 50):
                ours, control = (_few_draws(rows, task, name, labels) for name in (model, SVD_LR))
                both = [ours[draw] - control[draw] for draw in sorted(ours) if draw in control]
                less = f" ({shown(both, signed=True)})" if both and model != SVD_LR else ""
                line.append(shown(ours.values()) + less)
            body.append(line)
    yield table(("set", "method", "5 labels", "10 labels", "50 labels"), body)
    starts, pretrained = (f"{name}, frozen, then logistic regression" for name in (STARTS, "pretrained"))
    body = []
    for task in TASKS:
        less = []
        for labels in (5, 10, 50):
            first, second = (_few_draws(rows, task, name, labels) for name in (pretrained, starts))
            less.append(shown([first[draw] - second[draw] for draw in first if draw in second], signed=True))
        if any(one != "-" for one in less):
            body.append([SETS[task], *less])
    yield f"What pretraining adds, paired by draw: {pretrained}, less {starts}."
    yield table(("set", "5 labels", "10 labels", "50 labels"), body)


def _few_draws(rows: Sequence[Row], task: Task, model: str, labels: int) -> dict[str, float]:
    return {
        draw: figures["macro_f1"]
        for row in rows_of(rows, "few", set=task[0], labels=task[1], model=model)
        if row["config"]["change"]["few"] == labels
        for draw, figures in row["figures"]["splits"].items()
    }


VECTOR_KEYS = ("accuracy", "macro_f1", "ece")
"""Figures that are given by temperature and by vector scaling."""


def _calibration(rows: Sequence[Row]) -> Iterator[str]:
    """ECE and coverage, of out-of-fold predictions and of unseen donors or libraries."""
    yield (
        "Temperature and thresholds from half of the pooled out-of-fold predictions of the training cells, judged on "
        "the other half, then from all of them on the unseen donor or libraries. By vector: vector scaling in the "
        "temperature's place, for types with 20 cells and more; it may change the best type. As it comes: by the "
        "temperature that fine-tuning itself fitted. Band: the upper end of what holds 95% of perfectly calibrated "
        "models of as many cells."
    )
    body = []
    for row in rows_of(rows, "calibration"):
        for where, found in row["figures"].items():
            numbers = [str(int(found[key])) for key in ("n_calib", "n_test")]
            keys = ("ece", "ece_band", "ece_raw", "coverage_90", "sets_90", "coverage_95", "sets_95")
            cells = [f"{found[key]:.3f}" for key in keys]
            body.append([SETS[_task(row)], row["config"]["model"], where, *numbers, *cells])
    head = ("set", "method", "cells", "calibrate", "test", "ECE", "its band", "ECE as it comes")
    yield table((*head, "coverage of 90%", "types a set", "coverage of 95%", "types a set"), body)
    body = []
    for row in rows_of(rows, "calibration"):
        for where, found in row["figures"].items():
            cells = [f"{found[f'{key}{end}']:.3f}" for key in VECTOR_KEYS for end in ("", "_vector")]
            body.append([SETS[_task(row)], where, *cells, f"{found['ece_vector_band']:.3f}"])
    head = ("set", "cells", "accuracy", "by vector", "macro F1", "by vector", "ECE", "by vector", "its band")
    yield table(head, body)
