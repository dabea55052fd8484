"""Names of the release before: they are there, say what to use, and are the new ones."""

import pytest

from adasam_hf import buffers, parameters, running_stats, selection
from adasam_hf.rows import choose_rows


@pytest.mark.parametrize(
    ("module", "name", "instead", "found"),
    [
        (running_stats, "kept", "adasam_hf.buffers.unchanged", buffers.unchanged),
        (selection, "choose_parameters", "adasam_hf.parameters.choose_parameters", parameters.choose_parameters),
        (selection, "gradients_only_for", "adasam_hf.parameters.gradients_only_for", parameters.gradients_only_for),
    ],
)
def test_modules_that_have_moved(module, name, instead, found):
    with pytest.warns(
        DeprecationWarning, match=f"{module.__name__}.{name} will be removed in 0.2; use {instead}"
    ) as warned:
        assert getattr(module, name) is found
    assert warned[0].filename == __file__
    with pytest.raises(AttributeError, match="no attribute 'nonsense'"):
        _ = module.nonsense


def test_rows_of_one_batch():
    batch = {"labels": [0, 1, 2, 3]}
    with pytest.warns(DeprecationWarning, match=r"use adasam_hf.rows.choose_rows"):
        take_rows = selection.take_rows
    assert take_rows(batch, 0.5) == choose_rows([batch], 0.5, 1).batches[0] != batch
