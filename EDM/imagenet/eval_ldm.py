"""Score a latent diffusion model by the FID of images with guidance, labels drawn uniformly.

    python eval_ldm.py --config=configs/accelerate_b4_subset1_2img_k_128_large.py --output_path=log/eval_log
    python eval_ldm.py --config=configs/accelerate_b4_subset1_2img_k_128_huge.py --discrete --output_path=log/eval_log
    python eval_ldm.py --config=... --config.sample.cfg=False             # without guidance, as during training

--config.sample.n_samples images are made and not kept. By default the averaged network of step --config.train.n_steps
is scored, with guidance --config.sample.scale.
"""
from __future__ import annotations

from pathlib import Path

from EDM.imagenet.experiment.config import parse
from EDM.imagenet.experiment.layout import Layout
from EDM.imagenet.sample_ldm_all import NETWORK, load_sampler, network_file, note
from EDM.imagenet.train_ldm import MACHINE, SCORES
from EDM.latent.generation import fid
from EDM.latent.schedules import ContinuousSchedule, DiscreteSchedule
from EDM.metrics.detectors import load_detector
from shared import distributed
from shared.cli import Flag, Option, UserError, run_main

FLAGS = (
    *NETWORK,
    Option("--discrete", Flag, False, "the network was trained by train_ldm_discrete.py"),
    *SCORES,
    *MACHINE,
)


def main() -> None:
    options, config = parse(__doc__, FLAGS)
    world = distributed.start(options.device)
    statistics = Path(options.fid_stats or Layout(config).fid_statistics)
    if not statistics.is_file():
        raise UserError(f"there is no {statistics}; make it from real images with fid.py ref, or name it by "
                        "--fid_stats")
    schedule = DiscreteSchedule() if options.discrete else ContinuousSchedule(config.pred)
    sampler = load_sampler(options, config, schedule, world)
    detector = load_detector(options.detector, world.device, world=world)
    scale, count = config.sample.scale if config.sample.cfg else 0.0, config.sample.n_samples
    value = fid(sampler, count, config.seed, config.sample.sample_steps, scale, config.sample.mini_batch_size, detector,
                statistics, world)
    note(options.output_path, f"nnet_path={network_file(options, config)} scale={scale} fid{count}={value:.6g}", world)
    distributed.stop()


if __name__ == "__main__":
    run_main(main)
