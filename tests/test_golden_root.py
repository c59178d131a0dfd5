"""The golden root as a whole: owned folders are there, the others are listed once."""

import warnings

import pytest
from golden_files import OWNED, folder_files, unowned_folders


@pytest.mark.parametrize("folder", OWNED)
def test_owned_golden_folder_has_files(folder):
    assert folder_files(folder)


def test_unowned_golden_folders_are_listed_once():
    folders = unowned_folders()
    if folders:
        warnings.warn(f"golden folders no test reads: {', '.join(folders)}", stacklevel=1)
    assert not set(folders) & set(OWNED)
