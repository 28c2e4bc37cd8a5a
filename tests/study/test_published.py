"""Results of studies that the repository holds: pages follow from them, and they are of today's studies."""

import json
import re

import pytest

from tests.helpers.paths import ROOT
from vapi_jax.study import page
from vapi_jax.study.spec import read_study
from vapi_jax.study.work import PROTOCOL, RESULTS, protocol, read_results

FOLDERS = sorted(path.parent for path in (ROOT / "docs" / "studies").glob("*/study.md"))


@pytest.mark.parametrize("folder", FOLDERS, ids=lambda folder: folder.name)
def test_a_page_follows_from_its_results(folder, tmp_path):
    study = read_study(folder.name)
    results = read_results(study, folder / RESULTS)
    text = (folder / "study.md").read_text(encoding="utf-8")
    command = re.search(r"^    (python -m vapi_jax\.study --study=\S+ .*)$", text, re.MULTILINE)
    assert command is not None
    path, _ = page.write(study, results, tmp_path, command[1])
    assert path.read_text(encoding="utf-8") == text
    for picture in re.findall(r"!\[.*?\]\((.+?)\)", text):
        assert (folder / picture).stat().st_size > 0


@pytest.mark.parametrize("folder", FOLDERS, ids=lambda folder: folder.name)
def test_results_are_of_the_study_as_it_is(folder):
    """The protocol, and what each arm has changed; one that has gone or was renamed has no results here."""
    study = read_study(folder.name)
    assert json.loads((folder / PROTOCOL).read_bytes()) == protocol(study)
    arms = {arm.slug: arm for arm in study.trained}
    for path in (folder / RESULTS).glob("*.json"):
        slug, _, seed = path.stem.rpartition("_")
        found = json.loads(path.read_bytes())
        assert found["seed"] == int(seed) < study.seeds
        if slug != "base":
            assert found["arm"] == arms[slug].name
            assert found["changes"] == json.loads(json.dumps(dict(arms[slug].changes), default=str))
