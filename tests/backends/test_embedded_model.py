"""Where the embedded model lives. Its conversion is tested end to end, where a replica serves it."""

from pathlib import Path

import pytest

from headrace.backends import embedded_model
from headrace.errors import FatalStartError


def test_the_cache_follows_xdg_when_it_is_absolute() -> None:
    assert embedded_model.cache_root({"XDG_CACHE_HOME": "/x"}) == Path("/x/headrace")
    assert embedded_model.cache_root({"XDG_CACHE_HOME": "x"}) == Path.home() / ".cache" / "headrace"
    assert embedded_model.cache_root({}) == Path.home() / ".cache" / "headrace"


def test_a_model_that_is_there_is_not_converted_again(tmp_path: Path) -> None:
    embedded_model.folder(tmp_path).mkdir(parents=True)
    phases: list[str] = []
    assert embedded_model.ensure(phases.append, tmp_path) == embedded_model.folder(tmp_path)
    assert phases == []


def test_a_cache_that_cannot_be_made_says_what_to_set(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(FatalStartError, match="set XDG_CACHE_HOME"):
        embedded_model.ensure(print, tmp_path / "file")
