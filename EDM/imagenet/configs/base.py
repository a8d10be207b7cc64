"""The published configuration of the large model with two labels a class, and how the others differ from it."""
from __future__ import annotations

from collections.abc import Mapping
from typing import Any


def published(**changes: Any) -> dict[str, Any]:
    """Return the configuration with other values, of single keys or, as dicts, in its sections.

    Paths are relative to the folder where the commands are typed.
    """
    config = dict(
        # Encoder and classifier.
        model_name="deit_base_p4",
        fname="vitb4_300ep.pth.tar",
        pretrained="pretrained/",
        mask=0.0,
        blocks=1,
        preload=True,
        normalize=True,
        penalty="l2",
        lambd=0.0025,

        # Images and labels.
        root_path="/cache/datasets/ILSVRC/Data/",
        image_folder="CLS-LOC/",
        image_path="/cache/datasets/ILSVRC/Data/CLS-LOC",
        subset_path="imagenet_subsets1/2imgs_class.txt",
        resolution=256,

        # The diffusion model of latents.
        seed=1234,
        pred="noise_pred",
        ema_rate=0.9999,
        z_shape=(4, 32, 32),
        dpm_path="assets/DPM",
        autoencoder=dict(pretrained_path="assets/stable-diffusion/autoencoder_kl.pth"),
        train=dict(n_steps=300000, batch_size=1024, mode="cond", log_interval=10, eval_interval=5000,
                   save_interval=50000),
        optimizer=dict(name="adamw", lr=0.0002, weight_decay=0.03, betas=(0.99, 0.99)),
        lr_scheduler=dict(name="customized", warmup_steps=5000),
        nnet=dict(name="uvit", img_size=32, patch_size=2, in_chans=4, embed_dim=1024, depth=20, num_heads=16,
                  mlp_ratio=4, qkv_bias=False, mlp_time_embed=False, num_classes=1001, use_checkpoint=True),
        dataset=dict(name="imagenet256_features", path="", cfg=True, p_uncond=0.15),

        # Generated images, and the classifier that they join.
        sample=dict(sample_steps=50, n_samples=50000, mini_batch_size=20, algorithm="dpm_solver", cfg=True, scale=0.4,
                    path=""),
        augmentation_K=128,
        using_true_label=True,
        output_path="",
    )
    for key, value in changes.items():
        config[key] = {**config[key], **value} if isinstance(value, Mapping) else value
    return config
