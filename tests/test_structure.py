"""The house stays one: rooms, the direction of imports, no circles, no look-ups of a model."""

from __future__ import annotations

import structure


def test_imports_go_one_way():
    assert sorted(structure.against_the_direction(structure.graph())) == []


def test_no_import_circle():
    arrows = structure.graph()
    assert len(arrows) > 60
    assert structure.circles(arrows) == []
    assert structure.circles(structure.between_rooms(arrows)) == []


def test_an_arrow_against_the_direction_would_be_seen():
    wrong = {
        "dotresize.ops.sinkhorn": {"dotresize.models.llama"},
        "dotresize.models.llama": {"dotresize.offload.headers"},
        "dotresize.kernels.sinkhorn": {"dotresize.ops.reference", "dotresize.ops.constants"},
        "dotresize.narrow.maps": {"dotresize.ops.sinkhorn", "dotresize.cli.report"},
    }
    assert sorted(structure.against_the_direction(wrong)) == [
        ("dotresize.kernels.sinkhorn", "dotresize.ops.reference"),
        ("dotresize.models.llama", "dotresize.offload.headers"),
        ("dotresize.narrow.maps", "dotresize.cli.report"),
        ("dotresize.ops.sinkhorn", "dotresize.models.llama"),
    ]
    assert structure.circles({"a": {"b"}, "b": {"a"}, "c": {"a"}}) == [["a", "b"]]


def test_who_wants_the_solvers_imports_no_compressor():
    reached = structure.reached(structure.graph(), "dotresize")
    assert {structure.room_of(name) for name in reached} <= {
        "ops",
        "ot",
        "kernels",
        "ops.constants",
    }


def test_rooms_at_the_top():
    assert len(structure.rooms()) <= 17, structure.rooms()


def test_only_the_command_line_parses_arguments():
    assert {structure.room_of(name) for name in structure.importers("argparse")} == {"cli"}


def test_a_model_is_passed_and_not_looked_up():
    assert structure.calls("architecture_of") + structure.calls("shelf_of") <= 20
