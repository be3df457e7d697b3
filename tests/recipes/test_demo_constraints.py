"""The forms to which the demo's answers can be confined: every right answer has its form."""

from __future__ import annotations

import json
import re

import jsonschema

from lockstep.recipes.demo.cases.mixture import TAUGHT
from lockstep.recipes.demo.cases.sums import unasked_objects
from lockstep.recipes.demo.constraints import constraint
from lockstep.recipes.demo.training.batches import held_out_cases


def test_right_answers_have_the_form_that_they_are_confined_to() -> None:
    forms: dict[str, int] = {}
    for family, cases in held_out_cases(30, 1, 500, families=TAUGHT).items():
        for case in cases:
            form = constraint(case)
            if not form:
                continue
            forms[family] = forms.get(family, 0) + 1
            if "response_format" in form:
                schema = form["response_format"]["json_schema"]["schema"]
                jsonschema.validate(json.loads(case.answer["content"]), schema)
            elif "extra_body" in form:
                pattern = form["extra_body"]["structured_outputs"]["regex"]
                assert re.fullmatch(pattern, case.answer["content"])
            else:
                assert form == {"tool_choice": "required"}
                assert case.tools
    assert forms == {"arithmetic": 30, "extraction": 30, "tool call": 30, "sums as JSON": 30}


def test_plain_sums_are_confined_to_objects_whose_keys_differ() -> None:
    plain = held_out_cases(30, 1, 500)["arithmetic"]
    cases = unasked_objects(plain)
    assert [case.messages for case in cases] == [case.messages for case in plain]
    keys = set()
    for case, other in zip(cases, plain, strict=True):
        [(key, result)] = case.check.value.items()
        keys.add(key)
        schema = constraint(case)["response_format"]["json_schema"]["schema"]
        right = json.dumps({key: other.check.value})
        jsonschema.validate(json.loads(right), schema)
        assert case.check.passes(right, [])
        assert not case.check.passes(json.dumps({key: result + 1}), [])
        assert not case.check.passes(case.answer["content"], [])
    assert len(keys) > 8
