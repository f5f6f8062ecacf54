"""What is handed to AWS, Google and Kubernetes is what they take, and says the same in all its places."""

import copy
import re
from typing import Any

import pytest
from manifests import (
    AWS_DEFINITION,
    AWS_SUBMISSION,
    GOOGLE,
    RAYJOB,
    check_aws,
    check_google,
    check_rayjob,
    read_json,
    read_yaml,
)


def changed(values: Any, path: tuple[Any, ...], value: Any) -> Any:
    """A copy in which one value is another."""
    result = copy.deepcopy(values)
    inner = result
    for key in path[:-1]:
        inner = inner[key]
    inner[path[-1]] = value
    return result


def test_aws_takes_the_job_definition_and_the_request() -> None:
    check_aws(read_json(AWS_DEFINITION), "RegisterJobDefinition")
    check_aws(read_json(AWS_SUBMISSION), "SubmitJob")


@pytest.mark.parametrize(
    ("path", "value"),
    [
        (("containerProperties", "gpus"), 8),
        (("containerProperties", "command"), "annatac pretrain"),
        (("containerProperties", "resourceRequirements", 0, "type"), "GPUS"),
        (("retryStrategy", "evaluateOnExit", 0, "action"), "AGAIN"),
        (("type",), "array"),
    ],
)
def test_aws_would_refuse_other_definitions(path: tuple[Any, ...], value: Any) -> None:
    with pytest.raises(ValueError, match=re.escape(str(path[-1]))):
        check_aws(changed(read_json(AWS_DEFINITION), path, value), "RegisterJobDefinition")


def test_the_request_to_aws_names_the_definition_and_all_its_parameters() -> None:
    definition, submission = read_json(AWS_DEFINITION), read_json(AWS_SUBMISSION)
    assert submission["jobDefinition"] == definition["jobDefinitionName"]
    command = definition["containerProperties"]["command"]
    asked = {word.removeprefix("Ref::") for word in command if word.startswith("Ref::")}
    assert asked == definition["parameters"].keys() | submission["parameters"].keys()
    gpus = [
        r["value"] for r in definition["containerProperties"]["resourceRequirements"] if r["type"] == "GPU"
    ]
    assert gpus == [definition["parameters"]["workers"]]


def test_google_takes_the_job() -> None:
    check_google(read_json(GOOGLE))


@pytest.mark.parametrize(
    ("path", "value"),
    [
        (("taskGroups", 0, "taskSpec", "retries"), 3),
        (("taskGroups", 0, "taskSpec", "maxRunDuration"), "14 days"),
        (("allocationPolicy", "instances", 0, "policy", "provisioningModel"), "PREEMPTABLE"),
        (("taskGroups", 0, "taskSpec", "lifecyclePolicies", 0, "action"), "RETRY"),
    ],
)
def test_google_would_refuse_other_jobs(path: tuple[Any, ...], value: Any) -> None:
    with pytest.raises(ValueError, match=str(path[-1])):
        check_google(changed(read_json(GOOGLE), path, value))


def test_kubernetes_takes_the_rayjob() -> None:
    check_rayjob(read_yaml(RAYJOB))


HEAD = ("spec", "rayClusterSpec", "headGroupSpec", "template", "spec")


@pytest.mark.parametrize(
    ("path", "value"),
    [
        (("spec", "entryPoint"), "annatac"),
        (("spec", "backoffLimit"), "3"),
        (("spec", "rayClusterSpec", "workerGroupSpecs", 0, "rayStartParams", "num-cpus"), 4),
        (("spec", "rayClusterSpec", "authOptions", "mode"), "on"),
        ((*HEAD, "containers", 0, "resources", "limit"), {"cpu": "4"}),
        ((*HEAD, "containers", 0, "resources", "limits", "memory"), "16 GB"),
        ((*HEAD, "terminationGracePeriod"), 120),
        (("metadata", "names"), "annatac"),
    ],
)
def test_kubernetes_would_drop_or_refuse_other_rayjobs(path: tuple[Any, ...], value: Any) -> None:
    with pytest.raises(ValueError, match=re.escape(str(path[-1]))):
        check_rayjob(changed(read_yaml(RAYJOB), path, value))


def test_the_rayjob_has_a_gpu_for_each_worker_and_one_grace_for_its_head() -> None:
    job = read_yaml(RAYJOB)
    cluster = job["spec"]["rayClusterSpec"]
    (group,) = cluster["workerGroupSpecs"]
    (worker,) = group["template"]["spec"]["containers"]
    most = re.search(r"--workers \d+:(\d+) --gpus", job["spec"]["entrypoint"])
    assert most is not None
    assert int(most[1]) == group["replicas"] * int(worker["resources"]["limits"]["nvidia.com/gpu"])
    head = cluster["headGroupSpec"]["template"]["spec"]
    environment = {each["name"]: each["value"] for each in head["containers"][0]["env"]}
    assert int(environment["RAY_JOB_STOP_WAIT_TIME_S"]) < head["terminationGracePeriodSeconds"]


def test_the_rayjob_names_a_version_of_ray_that_knows_tokens() -> None:
    # KubeRay v1.7.0 refuses authOptions.mode token for older ones.
    version = read_yaml(RAYJOB)["spec"]["rayClusterSpec"]["rayVersion"]
    assert tuple(map(int, version.split("."))) >= (2, 52, 0)
