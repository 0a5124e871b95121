"""What `make submit` sends: the files of `ray job submit --working-dir .`, compressed, which Ray does not do itself."""

import argparse
import tempfile
from collections.abc import Sequence
from pathlib import Path
from zipfile import ZIP_DEFLATED, ZipFile

from ray._private.runtime_env.packaging import create_package


def pack(folder: str | Path, archive: str | Path) -> None:
    """All files of `folder` that neither .gitignore nor .rayignore leaves out, in an archive that Ray unpacks as a
    job's working directory."""
    with tempfile.TemporaryDirectory() as scratch:
        plain = Path(scratch, "plain.zip")
        create_package(str(folder), plain, include_gitignore=True, include_parent_dir=False, excludes=[])
        with ZipFile(plain) as given, ZipFile(archive, "w", ZIP_DEFLATED) as made:
            for entry in given.infolist():
                made.writestr(entry, given.read(entry), ZIP_DEFLATED)


def main(argv: Sequence[str] | None = None) -> None:
    """Pack the folder that it is called from."""
    parser = argparse.ArgumentParser(prog="python -m ray_explain.distributed.upload", description=__doc__)
    parser.add_argument("archive", help="zip file to write")
    pack(".", parser.parse_args(argv).archive)


if __name__ == "__main__":
    main()
