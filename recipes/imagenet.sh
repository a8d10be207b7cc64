# The published experiment on ImageNet 256x256, typed in EDM/imagenet: the encoder and the VAE are files that you fetch
# (README there), images lie where the configuration or --config-args says.

config=accelerate_b4_subset1_2img_k_128_large
