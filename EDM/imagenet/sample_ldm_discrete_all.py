"""Generate images of every class with the huge U-ViT, for the classifier of stage 3.

    python sample_ldm_discrete_all.py --config=configs/accelerate_b4_subset1_2img_k_128_huge.py \\
        --output_path=log/sample_log

Otherwise as sample_ldm_all.py.
"""
from __future__ import annotations

from EDM.imagenet.sample_ldm_all import main
from EDM.latent.schedules import DiscreteSchedule
from shared.cli import run_main

if __name__ == "__main__":
    run_main(lambda: main(__doc__, lambda config: DiscreteSchedule()))
