"""The list of deliberate faults can be put in; `python tests/faults.py` shows that each is noticed."""

import ast

import pytest
from faults import FAULTS, ROOT, Fault, spoiled


def test_there_are_at_least_thirty_faults_with_different_names():
    assert len({fault.name for fault in FAULTS}) == len(FAULTS) >= 30
    assert {"rlp.py", "thoughts.py", "generate.py", "evals.py", "elastic.py", "routers.py", "nested.py"} <= {
        fault.file for fault in FAULTS
    }


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.name)
def test_a_faults_text_occurs_once_and_what_it_makes_is_another_program(fault):
    assert ast.dump(ast.parse(spoiled(fault))) != ast.dump(ast.parse((ROOT / fault.file).read_text()))
    assert all((ROOT / "tests" / f"test_{name}.py").is_file() for name in fault.tests.split())


@pytest.mark.parametrize("text", ["import torch\nimport tor", "\n"])
def test_a_text_that_does_not_occur_once_is_refused(text):
    with pytest.raises(ValueError, match=r"some: rlp.py has .* times; it must be there once"):
        spoiled(Fault("some", "rlp.py", text, "", "rlp"))
