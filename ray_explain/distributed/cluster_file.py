"""Checks the YAML file of a cluster before `ray up` spends money."""

import argparse
import re
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jsonschema
import yaml

from ray_explain.errors import BadInput

# What Ray reads of `provider` on AWS; its schema lets any key through.
_AWS_KEYS = {
    "type",
    "region",
    "availability_zone",
    "cache_stopped_nodes",
    "use_internal_ips",
    "security_group",
    "key_pair",
    "cloudwatch",
    "aws_credentials",
}
_REGION = re.compile(r"[a-z]{2}(-[a-z]+)+-\d")
_TOKEN_FILE = "~/.ray/auth_token"
_TOKEN = "RAY_AUTH_MODE=token"


def check_cluster_file(path: str) -> None:
    """Held against Ray's schema, the API of EC2, and what this project asks of a cluster (docs/security.md).

    Raises:
        BadInput: it cannot be used; one line a fault.
    """
    try:
        config = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except (OSError, yaml.YAMLError) as error:
        raise BadInput(f"cannot read the cluster file {path}: {' '.join(str(error).split())}") from error
    if not isinstance(config, dict):
        raise BadInput(f"the cluster file {path} is not a YAML mapping (`cluster_name: ...`)")
    faults = list(_schema_faults(config)) or list(_faults(config))
    if faults:
        raise BadInput("\n".join(f"{path}: {fault}" for fault in faults))


def _schema_faults(config: dict[str, Any]) -> Iterator[str]:
    from ray.autoscaler._private.util import prepare_config, validate_config

    try:
        validate_config(prepare_config(config))
    except jsonschema.ValidationError as error:
        yield f"`{'.'.join(map(str, error.absolute_path))}`: {error.message}"
    except KeyError as error:
        yield f"`{error.args[0]}` is missing"
    except (ValueError, AttributeError, NotImplementedError) as error:
        yield str(error)


def _faults(config: Mapping[str, Any]) -> Iterator[str]:
    yield from _token_faults(config)
    if config["provider"]["type"] == "aws":
        yield from _provider_faults(config["provider"])
        for name, node_type in config["available_node_types"].items():
            yield from (f"`available_node_types.{name}`: {fault}" for fault in _node_faults(node_type["node_config"]))
        yield from _gpu_faults(config)


def _token_faults(config: Mapping[str, Any]) -> Iterator[str]:
    """Without the token, whoever reaches a port can run code."""
    for key in ("head_start_ray_commands", "worker_start_ray_commands"):
        starts = [command for command in config.get(key, []) if "ray start" in command]
        if not all(_TOKEN in command for command in starts) or not starts:
            yield f"`{key}`: `ray start` without {_TOKEN}"
        for command in starts:
            if re.search(r"--dashboard-host[= ](?!127\.0\.0\.1\b|localhost\b)", command):
                yield f"`{key}`: the dashboard is to listen on 127.0.0.1; `ray dashboard` brings it to you"
    if _TOKEN_FILE not in config.get("file_mounts", {}):
        yield f"`file_mounts`: {_TOKEN_FILE} is missing, every node needs the same token"


def _provider_faults(provider: Mapping[str, Any]) -> Iterator[str]:
    for key in sorted(set(provider) - _AWS_KEYS):
        yield f"`provider.{key}`: no such key; there are {', '.join(sorted(_AWS_KEYS))}"
    region = str(provider.get("region", ""))
    if not _REGION.fullmatch(region):
        yield f"`provider.region` = {region!r}: a region is needed, such as us-east-1"
    zones = str(provider.get("availability_zone", "")).split(",")
    for zone in zones if zones != [""] else []:
        if not re.fullmatch(re.escape(region) + "[a-z]", zone.strip()):
            yield f"`provider.availability_zone`: {zone.strip()!r} is not in {region!r}"


def _node_faults(node: Mapping[str, Any]) -> Iterator[str]:
    """What EC2 would refuse, known from its API's own description, and what it would let through."""
    import botocore.session
    from botocore.validate import ParamValidator

    run = botocore.session.get_session().get_service_model("ec2").operation_model("RunInstances").input_shape
    report = ParamValidator().validate({"MinCount": 1, "MaxCount": 1, **node}, run)
    if report.has_errors():
        yield from report.generate_report().splitlines()
    image = str(node.get("ImageId", ""))
    if not re.fullmatch(r"ami-[0-9a-f]{8,17}", image):
        yield (
            "`ImageId`: fill in the id of an Ubuntu 22.04 or 24.04 image with NVIDIA's driver (docs/cluster.md finds "
            f"it), this is {image!r}; without one Ray takes Ubuntu 18.04, which torch and pyarrow cannot run on"
        )
    groups = node.get("SecurityGroupIds") or []
    if not groups:
        yield "`SecurityGroupIds` is missing: Ray would make a group that opens SSH to the world"
    for group in groups:
        if not re.fullmatch(r"sg-[0-9a-f]{8,17}", str(group)):
            yield f"`SecurityGroupIds`: fill in the id of a security group (sg-0123456789abcdef0), this is {group!r}"
    if "IamInstanceProfile" not in node:
        yield "`IamInstanceProfile` is missing: nodes read and write S3 through it"


def _gpu_faults(config: Mapping[str, Any]) -> Iterator[str]:
    head = config["available_node_types"][config["head_node_type"]]
    if head.get("resources", {}).get("GPU", None) != 0:
        yield f"`available_node_types.{config['head_node_type']}.resources`: set GPU: 0, the head runs no GPU work"
    for name, node_type in config["available_node_types"].items():
        if name != config["head_node_type"] and node_type.get("min_workers", 0):
            yield f"`available_node_types.{name}.min_workers`: 0 lets machines go that nobody uses"


def main(argv: Sequence[str] | None = None) -> int:
    """Exit code: 0 if the file is fine, else 2."""
    parser = argparse.ArgumentParser(prog="python -m ray_explain.distributed.cluster_file", description=__doc__)
    parser.add_argument("file", help="such as cluster.yaml")
    try:
        check_cluster_file(parser.parse_args(argv).file)
    except BadInput as error:
        print(f"bad input: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
