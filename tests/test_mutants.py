"""The faults of `make mutate` are real code, keep their names and places, and what is excused still exists."""

import ast

import mutants
import pytest
import yaml

ALL = {area: [mutant for path in mutants.files(area) for mutant in mutants.mutants(path)] for area in mutants.AREAS}


@pytest.mark.parametrize("area", mutants.AREAS)
def test_each_fault_has_a_name_of_its_own_and_moves_no_line(area):
    found = ALL[area]
    assert len({mutant.name for mutant in found}) == len(found) >= 40
    for mutant in mutants.drawn(area, 20, 0):
        source = (mutants.ROOT / mutant.path).read_bytes()
        planted = mutant.apply(source)
        assert planted != source and planted.count(b"\n") == source.count(b"\n")
        assert ast.dump(ast.parse(planted)) != ast.dump(ast.parse(source)), mutant.name


def test_the_draw_is_the_same_for_a_seed():
    first = mutants.drawn("plan", 30, 1)
    assert first == mutants.drawn("plan", 30, 1) != mutants.drawn("plan", 30, 2)
    assert sum(len(mutants.drawn(area, 36, 26)) for area in mutants.AREAS) >= 300


def test_what_is_excused_still_exists():
    names = {mutant.name for found in ALL.values() for mutant in found}
    excused = yaml.safe_load((mutants.ROOT / "tests/mutants.yaml").read_text()) or {}
    assert set(excused) <= {"equivalent", "accepted"}
    gone = [name for part in excused.values() for name in part if name not in names]
    assert not gone, "take them out of tests/mutants.yaml, or write down what became of them"
