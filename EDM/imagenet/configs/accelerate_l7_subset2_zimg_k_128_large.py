"""DPT with one label a class: MSN ViT-L/7, U-ViT-L/2 with the continuous schedule. 128 images a class."""
from EDM.imagenet.configs.base import published


def get_config() -> dict:
    """Return the published configuration."""
    return published(
        model_name="deit_large_p7",
        fname="vitl7_200ep.pth.tar",
        subset_path="imagenet_subsets2/1imgs_class.txt",
    )
