"""Where the configuration files are: ``conf/`` at the top of a checkout, and the copy of it in an installed package."""

from __future__ import annotations

from ptq161.files.hashing import PACKAGE

CONF = next(folder for folder in (PACKAGE / "conf", PACKAGE.parent / "conf") if (folder / "config.yaml").is_file())
