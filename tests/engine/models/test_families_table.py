"""``FAMILIES.md`` says what the tests hold of each family."""

from __future__ import annotations

from support.engine.models.families_table import FILE, document, table


def test_the_table_is_up_to_date() -> None:
    command = "cd tests && python -m support.engine.models.families_table"
    assert FILE.read_text(encoding="utf-8") == document(), f"write it anew: {command}"


def test_every_family_is_held_to_transformers_and_split_over_ranks() -> None:
    for family, _, logits, layouts, pages, *_ in table():
        assert logits.endswith("bf16"), family
        assert layouts != "—" and pages != "—", family
