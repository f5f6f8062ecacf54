"""Prediction of whatever a user gives: an island store, or files, which go through a temporary one."""

from collections.abc import Mapping, Sequence
from typing import Any

from annatac_scale.annotate.predict import PredictReport, Workers, predict
from annatac_scale.annotate.predictor import device
from annatac_scale.annotate.temporary_store import store_given, temporary_store
from annatac_scale.errors import ConfigError
from annatac_scale.model.folder import Model, read_model
from annatac_scale.progress import Progress, Silent
from annatac_scale.store.place import Location, location_of


def predict_inputs(
    inputs: Sequence[Location],
    model: Model | Location,
    out: Location,
    conversion: Mapping[str, Any],
    **options: Any,
) -> PredictReport:
    """As ``predict``, of an island store, or of h5ad, 10x and fragment files.

    conversion: of files, fields of ingest.convert.ConvertOptions; options: as of ``predict``

    Raises as ``predict`` and ``convert``; ConfigError for options of a conversion of a store, and for what needs a
    store that stays.
    """
    store = store_given([location_of(one) for one in inputs])
    if store is None:
        return _predict_files(inputs, model, out, conversion, **options)
    if conversion:
        said = ", ".join(f"--{name.replace('_', '-')}" for name in conversion)
        raise ConfigError(
            f"{store}: an island store, and {said} of a conversion were given too; expected them with h5ad, 10x or "
            "fragment files alone; leave them out"
        )
    return predict(store, model, out, **options)


def _predict_files(
    inputs: Sequence[Location],
    model: Model | Location,
    out: Location,
    conversion: Mapping[str, Any],
    **options: Any,
) -> PredictReport:
    workers: Workers = options.get("workers") or Workers()
    if workers.share.of > 1 or options.get("write_obs"):
        found = "--write-obs" if options.get("write_obs") else f"--part {workers.share}"
        raise ConfigError(
            f"{found}: found files to convert, expected an island store; make one with `annatac convert`"
        )
    if not isinstance(model, Model):
        model = read_model(model, "cpu" if workers.n else device())
    progress: Progress = options.get("progress") or Silent()
    with temporary_store(inputs, model.info, out, conversion, progress) as store:
        return predict(store, model, out, **options)
