"""GenEval's verdicts are the published evaluator's."""

import json

import pytest

from vapi_jax.evaluation.geneval_files import parse_objects
from vapi_jax.rewards.geneval import judge, parse_prompt


def test_every_verdict(golden):
    path = golden.directory / "geneval_cases.json"
    if not path.exists():
        pytest.skip(f"this golden set has no {path.name}")
    cases = json.loads(path.read_text(encoding="utf-8"))
    wrong = []
    for number, case in enumerate(cases):
        prompt = parse_prompt(case["metadata"], f"case {number}")
        verdict = judge(prompt, parse_objects(case["detections"]))
        assert verdict.correct == (not verdict.reason)
        if verdict.correct != case["correct"]:
            wrong.append((number, verdict.reason))
    assert len(cases) > 50
    assert not wrong
