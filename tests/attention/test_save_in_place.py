"""A variant is never saved over the base that it needs."""

from collections.abc import Callable
from pathlib import Path

import pytest

import attention
from attention import CheckpointError
from attention.files import write_manifest

from .checkpoints import make_variant, save_base


def as_given(variant: object, folder: Path) -> None:
    attention.save(variant, folder)


def with_its_base(variant: object, folder: Path) -> None:
    attention.save(variant, folder, base=folder)


def with_all_weights(variant: object, folder: Path) -> None:
    attention.save(variant, folder, self_contained=True)


def as_transformers_does(variant: object, folder: Path) -> None:
    variant.save_pretrained(folder)


@pytest.mark.parametrize("through", ["path", "link"])
@pytest.mark.parametrize("save", [as_given, with_its_base, with_all_weights, as_transformers_does])
def test_a_variant_is_not_saved_over_its_own_base(save: Callable, through: str, tmp_path: Path):
    """A base that pretraining wrote has a manifest, as variants do, so it is not taken for something foreign."""
    base = save_base(tmp_path / "base")
    write_manifest(base)
    variant, before = make_variant(base), {path.name: path.read_bytes() for path in base.iterdir()}
    (tmp_path / "link").symlink_to(base, target_is_directory=True)
    with pytest.raises(CheckpointError, match="base"):
        save(variant, base if through == "path" else tmp_path / "link")
    assert {path.name: path.read_bytes() for path in base.iterdir()} == before
