"""Quantize a model, score it, record the run: ``python run.py --help`` explains every key."""

import sys

import hydra
from omegaconf import DictConfig


@hydra.main(version_base="1.3", config_path="conf", config_name="config")
def main(cfg: DictConfig) -> None:
    """Hand the composed config over."""
    from ptq161.sweep import run_job

    run_job(cfg)


if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt as interrupt:
        print(f"\nInterrupted ({str(interrupt) or 'SIGINT'}).", file=sys.stderr)
        sys.exit(getattr(interrupt, "exit_code", 130))
