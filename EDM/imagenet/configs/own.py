"""Photographs of one's own, 256x256: a U-ViT of 44 million parameters over the latents of Stable Diffusion's VAE."""
from EDM.imagenet.configs.base import published


def get_config() -> dict:
    """Return the configuration; prepare.py adds images, labels and encoder."""
    return published(
        # Encoder and classifier.
        model_name="msn",
        fname="msn",
        encoder="msn/encoder.pth.tar",

        # Images and labels.
        root_path="images",
        image_folder="",
        image_path="images",
        subset_path="labels.txt",

        # The diffusion model of latents.
        seed=1,
        autoencoder=dict(pretrained_path="stabilityai/sd-vae-ft-ema"),
        train=dict(n_steps=100000, batch_size=256),
        lr_scheduler=dict(warmup_steps=2500),
        nnet=dict(embed_dim=512, depth=12, num_heads=8, num_classes=11, use_checkpoint=False),
        dataset=dict(name="own_features"),
        sample=dict(n_samples=10000),
    )
