"""The manifests of deploy/kubernetes are what Kubernetes takes."""

import json
from copy import deepcopy

import jsonschema
import kubernetes_validate
import pytest
import yaml

from lorry_server import REPOSITORY

KUBERNETES = REPOSITORY / "deploy" / "kubernetes"
# Of each kind that is not Kubernetes' own, what its definition says of the fields that are used here; any other is refused.
CUSTOM_RESOURCES = json.loads((REPOSITORY / "tests" / "clients" / "custom_resources.json").read_text())
MANIFESTS = {
    str(path.relative_to(KUBERNETES)): yaml.safe_load(path.read_text())
    for path in sorted(KUBERNETES.rglob("*.yaml"))
    if path.name != "kustomization.yaml"
}


@pytest.mark.parametrize("manifest", MANIFESTS)
def test_the_manifests_are_what_kubernetes_takes(manifest):
    resource = MANIFESTS[manifest]
    # Either fails where a field is missing, wrong or unknown.
    if schema := CUSTOM_RESOURCES.get(resource["kind"]):
        jsonschema.validate(resource, schema)
    else:
        kubernetes_validate.validate(resource, kubernetes_validate.latest_version(), strict=True)


def places(value):
    """Each field of it and of what it holds: what it is in, and by what."""
    for key, held in value.items() if isinstance(value, dict) else enumerate(value):
        yield value, key
        if isinstance(held, (dict, list)):
            yield from places(held)


@pytest.mark.parametrize("kind", CUSTOM_RESOURCES)
def test_a_field_of_a_custom_resource_that_is_unknown_or_of_the_wrong_type_is_refused(kind):
    [resource] = [deepcopy(resource) for resource in MANIFESTS.values() if resource["kind"] == kind]

    def refuses():
        return not jsonschema.Draft202012Validator(CUSTOM_RESOURCES[kind]).is_valid(resource)

    for holder, key in list(places(resource)):
        right = holder[key]
        holder[key] = 5 if isinstance(right, str) else "5"
        assert refuses(), (key, holder)
        holder[key] = right
        # Labels are whatever their owner calls them.
        if isinstance(right, dict) and key != "matchLabels":
            right["unknown"] = "5"
            assert refuses(), key
            del right["unknown"]
    resource["unknown"] = "5"
    assert refuses()
    del resource["unknown"]
    assert not refuses()


def test_the_kustomizations_name_what_there_is():
    found = list(KUBERNETES.glob("*/kustomization.yaml"))
    for path in found:
        kustomization = yaml.safe_load(path.read_text())
        resources = [path.parent / resource for resource in kustomization["resources"]]
        assert all((one / "kustomization.yaml").is_file() if one.is_dir() else one.is_file() for one in resources), path
        # Every other file of the folder is one of them.
        assert {one.name for one in resources if one.is_file()} == {one.name for one in path.parent.iterdir()} - {path.name}
        patched = {(patch["target"]["kind"], patch["target"]["name"]) for patch in kustomization.get("patches", [])}
        assert patched <= {("Deployment", "lorry")}, path
    assert len(found) == 5
