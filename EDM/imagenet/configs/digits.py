"""scikit-learn's handwritten digits, enlarged to 32x32: a tiny U-ViT over rearranged pixels, minutes on a CPU."""
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
        resolution=32,

        # The diffusion model of rearranged pixels: 16 tokens of 8x8 pixels each. It predicts the image: the 192 numbers
        # of a token's noise would not fit into its width, those of a digit do.
        seed=1,
        pred="x0_pred",
        ema_rate=0.995,
        z_shape=(48, 8, 8),
        autoencoder=dict(pretrained_path="space-to-depth"),
        train=dict(n_steps=1500, batch_size=64, log_interval=50, eval_interval=750, save_interval=1500),
        optimizer=dict(lr=0.002, betas=(0.9, 0.99)),
        lr_scheduler=dict(warmup_steps=100),
        nnet=dict(img_size=8, patch_size=2, in_chans=48, embed_dim=128, depth=4, num_heads=4, num_classes=11,
                  use_checkpoint=False, conv=False),
        dataset=dict(name="digits_features", p_uncond=0.1, mirror=False),

        # Generated images, and the classifier that they join.
        sample=dict(sample_steps=15, n_samples=1000, mini_batch_size=50),
        augmentation_K=50,
    )
