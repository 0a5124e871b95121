"""The archive of a job."""

from pathlib import Path

import pytest

from ray_explain.distributed.upload import main


def test_asked_for_help_it_writes_no_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as ended:
        main(["--help"])
    assert ended.value.code == 0
    assert not list(tmp_path.iterdir())
