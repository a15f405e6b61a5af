"""Quantize a model, score it, record the run: ``python run.py --help`` explains every key (``ptq161 run``)."""

import sys

from ptq161.__main__ import main

if __name__ == "__main__":
    sys.exit(main(["run", *sys.argv[1:]]))
