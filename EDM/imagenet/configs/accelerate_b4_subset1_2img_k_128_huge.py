"""DPT with two labels a class: MSN ViT-B/4, U-ViT-H/2 with the discrete schedule. 128 images a class."""
from EDM.imagenet.configs.base import published


def get_config() -> dict:
    """Return the published configuration."""
    return published(
        autoencoder=dict(pretrained_path="assets/stable-diffusion/autoencoder_kl_ema.pth"),
        train=dict(n_steps=500000),
        nnet=dict(embed_dim=1152, depth=28, conv=False),
        dataset=dict(p_uncond=0.1),
    )
