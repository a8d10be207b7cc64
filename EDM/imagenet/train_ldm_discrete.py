"""Train the huge U-ViT, with Stable Diffusion's discrete noise schedule, on latents with pseudo-labels.

    python train_ldm_discrete.py --config=configs/accelerate_b4_subset1_2img_k_128_huge.py
    torchrun --standalone --nproc_per_node=8 train_ldm_discrete.py --config=...

Otherwise as train_ldm.py.
"""
from __future__ import annotations

from EDM.imagenet.train_ldm import main
from EDM.latent.schedules import DiscreteSchedule
from shared.cli import run_main

if __name__ == "__main__":
    run_main(lambda: main(__doc__, lambda config: DiscreteSchedule()))
