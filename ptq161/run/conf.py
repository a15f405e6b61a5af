"""The folder of the configuration files: ``conf/`` of a checkout, or its copy in an installed package."""

from __future__ import annotations

from ptq161.files.hashing import PACKAGE

CONF = next(folder for folder in (PACKAGE / "conf", PACKAGE.parent / "conf") if (folder / "config.yaml").is_file())
