"""Quantize a model, score it, record the run: ``python run.py --help`` explains every key."""

import hydra
from omegaconf import DictConfig

from ptq161.tracking.interrupts import ending_with_a_sentence


@hydra.main(version_base="1.3", config_path="conf", config_name="config")
def main(cfg: DictConfig) -> None:
    """Hand the composed config over."""
    from ptq161.sweep.job import run_job

    run_job(cfg)


if __name__ == "__main__":
    with ending_with_a_sentence():
        main()
