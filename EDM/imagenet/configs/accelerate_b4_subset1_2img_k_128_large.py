"""DPT with two labels a class: MSN ViT-B/4, U-ViT-L/2 with the continuous schedule. 128 images a class."""
from EDM.imagenet.configs.base import published


def get_config() -> dict:
    """Return the published configuration."""
    return published()
