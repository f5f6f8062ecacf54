"""The manifests of jobs/ against the types of those who take them. Each check raises ValueError, and says where."""

import gzip
import json
from pathlib import Path
from typing import Any

import jsonschema
import yaml
from botocore.loaders import Loader
from botocore.model import ServiceModel, Shape
from botocore.validate import ParamValidator
from google.cloud import batch_v1
from google.protobuf import json_format

ROOT = Path(__file__).parents[2]
JOBS = ROOT / "jobs"
AWS_DEFINITION = JOBS / "aws-batch" / "job-definition.json"
AWS_SUBMISSION = JOBS / "aws-batch" / "submit-job.json"
GOOGLE = JOBS / "google-batch" / "pretrain.json"
RAYJOB = JOBS / "kuberay" / "pretrain.yaml"
_RAYJOB_SCHEMA = Path(__file__).parent / "data" / "rayjob_v1.schema.json.gz"
# Of what Kubernetes lets metadata hold, which the schema leaves to Kubernetes.
_METADATA = {"name", "namespace", "labels", "annotations"}


def check_aws(request: dict[str, Any], operation: str) -> None:
    """Against botocore's own model of AWS Batch, and its enumerations, which botocore leaves to the service."""
    model = ServiceModel(Loader().load_service_model("batch", "service-2"), "batch")
    shape = model.operation_model(operation).input_shape
    found = ParamValidator().validate(request, shape)
    errors = (
        [found.generate_report()] if found.has_errors() else _not_in_enumeration(request, shape, operation)
    )
    if errors:
        raise ValueError("; ".join(errors))


def _not_in_enumeration(value: Any, shape: Shape, place: str) -> list[str]:
    if shape.type_name == "structure":
        parts = [(value[name], shape.members[name], f"{place}.{name}") for name in value]
    elif shape.type_name == "list":
        parts = [(each, shape.member, f"{place}[{number}]") for number, each in enumerate(value)]
    else:
        allowed = getattr(shape, "enum", [])
        return [f"{place}: {value}, expected one of {allowed}"] if allowed and value not in allowed else []
    return [error for part in parts for error in _not_in_enumeration(*part)]


def check_google(job: dict[str, Any]) -> None:
    """Against the protobuf types of Google Batch; unknown fields and values of enumerations are refused."""
    try:
        json_format.ParseDict(job, batch_v1.Job.pb()())
    except json_format.ParseError as error:
        raise ValueError(str(error)) from error


def check_rayjob(job: dict[str, Any]) -> None:
    """Against KubeRay's schema of a RayJob. Kubernetes drops unknown fields in silence: here they are refused."""
    with gzip.open(_RAYJOB_SCHEMA, "rt") as file:
        schema = _closed(json.load(file))
    schema["properties"]["metadata"]["properties"] = {name: {} for name in _METADATA}
    schema["properties"]["metadata"]["additionalProperties"] = False
    errors = [
        f"{error.json_path}: {error.message}" for error in jsonschema.Draft7Validator(schema).iter_errors(job)
    ]
    if errors:
        raise ValueError("; ".join(errors))


def _closed(schema: Any) -> Any:
    """The schema with no other properties than those that it names, at any depth."""
    if isinstance(schema, list):
        return [_closed(each) for each in schema]
    if not isinstance(schema, dict):
        return schema
    closed = {name: _closed(each) for name, each in schema.items()}
    # A property may itself be called "properties": a schema has a type, a table of properties has none of text.
    if isinstance(closed.get("properties"), dict) and closed.get("type") == "object":
        closed.setdefault("additionalProperties", False)
    return closed


def read_json(path: Path) -> Any:
    """The values of a JSON file."""
    return json.loads(path.read_text())


def read_yaml(path: Path) -> Any:
    """The values of a YAML file with one document."""
    return yaml.safe_load(path.read_text())
