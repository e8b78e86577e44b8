"""The two kinds of tables."""

from hf_dynsparse.reports.tables import markdown_table, plain_table


def test_plain_table_by_hand() -> None:
    rows = [["name", "n", "why"], ["a", "1,000", "b"], ["longer", "", "reason"]]
    assert plain_table(rows, left=(0, 2)).splitlines() == [
        "name        n  why",
        "a       1,000  b",
        "longer         reason",
    ]
    assert plain_table(rows[:1], least=(6, 3)) == "name      n  why"


def test_markdown_table_by_hand() -> None:
    assert markdown_table(["a", "b"], [[1, "x"], [2.5, "y"]], right=[0]).splitlines() == [
        "| a | b |",
        "|---:|---|",
        "| 1 | x |",
        "| 2.5 | y |",
    ]
    assert markdown_table({"a": 1}, []) == "| a |\n|---|"
