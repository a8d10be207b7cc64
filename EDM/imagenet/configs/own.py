"""Photographs of one's own, 256x256: a U-ViT of 44 million parameters over the latents of Stable Diffusion's VAE."""


def get_config() -> dict:
    """Return the configuration; prepare.py adds images, labels and encoder."""
    return dict(
        # Encoder and classifier.
        model_name="msn",
        fname="msn",
        encoder="msn/encoder.pth.tar",
        pretrained="pretrained/",
        mask=0.0,
        blocks=1,
        preload=True,
        normalize=True,
        penalty="l2",
        lambd=0.0025,

        # Images and labels.
        root_path="images",
        image_folder="",
        image_path="images",
        subset_path="labels.txt",
        resolution=256,

        # The diffusion model of latents.
        seed=1,
        pred="noise_pred",
        ema_rate=0.9999,
        z_shape=(4, 32, 32),
        dpm_path="assets/DPM",
        autoencoder=dict(pretrained_path="stabilityai/sd-vae-ft-ema"),
        train=dict(n_steps=100000, batch_size=256, mode="cond", log_interval=10, eval_interval=5000,
                   save_interval=50000),
        optimizer=dict(name="adamw", lr=0.0002, weight_decay=0.03, betas=(0.99, 0.99)),
        lr_scheduler=dict(name="customized", warmup_steps=2500),
        nnet=dict(name="uvit", img_size=32, patch_size=2, in_chans=4, embed_dim=512, depth=12, num_heads=8, mlp_ratio=4,
                  qkv_bias=False, mlp_time_embed=False, num_classes=11, use_checkpoint=False),
        dataset=dict(name="own_features", path="", cfg=True, p_uncond=0.15),

        # Generated images, and the classifier that they join.
        sample=dict(sample_steps=50, n_samples=10000, mini_batch_size=20, algorithm="dpm_solver", cfg=True, scale=0.4,
                    path=""),
        augmentation_K=128,
        using_true_label=True,
        output_path="",
    )
