"""The manifests of deploy/kubernetes are what Kubernetes takes."""

import kubernetes_validate
import pytest
import yaml

from lorry_server import REPOSITORY

KUBERNETES = REPOSITORY / "deploy" / "kubernetes"


@pytest.mark.parametrize("manifest", ["base/deployment.yaml", "base/poddisruptionbudget.yaml", "base/service.yaml", "adapters/volume.yaml"])
def test_the_manifests_are_what_kubernetes_takes(manifest):
    resource = yaml.safe_load((KUBERNETES / manifest).read_text())
    # Fails where a field is missing, wrong or unknown.
    kubernetes_validate.validate(resource, kubernetes_validate.latest_version(), strict=True)


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
