"""The parts of latent diffusion: published files of VAEs and latents, precision of attention, configurations."""
from __future__ import annotations

import os
import pickle
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from EDM.imagenet.experiment.config import override, read_config
from EDM.latent.dpm_solver import dpm_solver, orders
from EDM.latent.latents import LatentBatches, read_latents
from EDM.latent.schedules import ContinuousSchedule
from EDM.latent.uvit import UViT
from EDM.latent.vae import Coder, SpaceToDepth, autoencoder, load_coder, load_vae, sample
from shared.cli import UserError
from shared.distributed import World
from tests.edm.latent_runs import CONFIGS, compvis_name, write_latents

SMALL = dict(img_size=8, patch_size=2, in_chans=4, embed_dim=32, depth=2, num_heads=2, num_classes=4)
OLD = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}


# ---------------------------------------------------------------- VAEs

@pytest.fixture(scope="module")
def vae_files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same VAE in every form."""
    folder = tmp_path_factory.mktemp("vae")
    torch.manual_seed(0)
    vae = autoencoder()(block_out_channels=(32, 64), down_block_types=("DownEncoderBlock2D",) * 2, latent_channels=4,
                        up_block_types=("UpDecoderBlock2D",) * 2, layers_per_block=1)
    vae.save_pretrained(folder / "folder")
    state = vae.state_dict()
    compvis = {compvis_name(name, 2): value[..., None, None] if ".attentions." in name and value.ndim == 2 else value
               for name, value in state.items()}
    torch.save(compvis, folder / "compvis.pth")
    torch.save({"state_dict": {**{f"first_stage_model.{name}": value for name, value in compvis.items()},
                               "model.diffusion_model.out.bias": torch.zeros(3)}}, folder / "whole.ckpt")
    save_file(state, folder / "diffusers.safetensors")
    old = state
    for new, former in OLD.items():
        old = {name.replace(f".attentions.0.{new}.", f".attentions.0.{former}."): value for name, value in old.items()}
    torch.save(old, folder / "old.bin")
    torch.save({name: value for name, value in compvis.items() if "norm_out" not in name}, folder / "lacking.pth")
    torch.save({"net": torch.zeros(3)}, folder / "other.pth")
    torch.save({**compvis, "quant_conv.bias": torch.full([8], torch.nan)}, folder / "nan.pth")
    return folder


@pytest.mark.parametrize("name", ["compvis.pth", "whole.ckpt", "diffusers.safetensors", "old.bin"])
def test_published_files_hold_the_same_vae(name, vae_files):
    images = torch.rand(2, 3, 16, 16, generator=torch.Generator().manual_seed(1)) * 2 - 1
    ours, theirs = (Coder(load_vae(str(vae_files / file))) for file in (name, "folder"))
    assert torch.equal(ours.moments(images), theirs.moments(images)) and ours.fingerprint == theirs.fingerprint
    latents = sample(ours.moments(images), torch.zeros(2, 4, 8, 8))
    assert torch.equal(ours.decode(latents), theirs.decode(latents)) and ours.decode(latents).shape == images.shape


@pytest.mark.parametrize("name, message", [
    ("lacking.pth", "lacking.pth: snapshot of another network, it lacks encoder.conv_norm_out"),
    ("other.pth", "other.pth holds no VAE of Stable Diffusion: expected tensors such as"),
    ("nan.pth", "nan.pth: quant_conv.bias holds numbers that are not finite"),
    ("absent.pth", "there is no file .*absent.pth; put the VAE's weights there"),
    ("compvis.pth", r"have latents \(4, 16, 16\), .*z_shape \(4, 8, 8\); give --config.z_shape=4,16,16"),
])
def test_other_files_are_refused(name, message, vae_files):
    with pytest.raises(UserError, match=message):
        load_coder(str(vae_files / name), (4, 8, 8), 32, "--vae")


def test_rearranged_pixels_come_back():
    coder, images = SpaceToDepth(4), torch.rand(2, 3, 16, 16)
    latents = sample(coder.moments(2 * images - 1), torch.randn(2, 48, 4, 4), coder.scale)
    torch.testing.assert_close(coder.decode(latents), images, atol=1e-5, rtol=0)


# ---------------------------------------------------------------- latents

def test_published_folder_is_read_without_running_it(tmp_path):
    write_latents(tmp_path / "ours")
    ours = read_latents(tmp_path / "ours", (12, 16, 16))
    moments, labels = ours.rows.take(np.arange(len(ours)))
    (tmp_path / "theirs").mkdir()
    for row, (values, label) in enumerate(zip(moments, labels.tolist(), strict=True)):
        pair = np.empty(2, object)
        pair[:] = [values, label]
        np.save(tmp_path / "theirs" / f"{row}.npy", pair)
    theirs = read_latents(tmp_path / "theirs", (12, 16, 16))
    assert len(theirs) == len(ours)
    both = [LatentBatches(latents, 4, 0, 0.5, 3, World(), 9) for latents in (ours, theirs)]
    for step in (0, 1, 7):  # of the first and of a later epoch
        for mine, other in zip(*(batches(step)[:2] for batches in both), strict=True):
            assert torch.equal(mine, other)

    class Harmful:
        def __reduce__(self):
            return os.system, (f"touch {tmp_path}/harm",)

    pair[0] = Harmful()
    np.save(tmp_path / "theirs/0.npy", pair)
    with pytest.raises(UserError, match="refused, it asks for posix.system"):
        read_latents(tmp_path / "theirs", (12, 16, 16))
    (tmp_path / "theirs/0.npy").write_bytes(pickle.dumps(1))
    with pytest.raises(UserError, match="0.npy: cut short or not a file of this kind"):
        read_latents(tmp_path / "theirs", (12, 16, 16))
    assert not (tmp_path / "harm").exists()


def test_an_epoch_visits_every_row_once_and_ranks_share_it(tmp_path):
    write_latents(tmp_path)
    latents = read_latents(tmp_path, (12, 16, 16))
    whole = LatentBatches(latents, 4, 0, 0.0, 3, World(), 9)
    assert sorted(row for step in range(3) for row in whole._rows(step)) == list(range(12))
    halves = [LatentBatches(latents, 4, 0, 0.5, 3, World(rank, 2), 9) for rank in range(2)]
    shared = LatentBatches(latents, 4, 0, 0.5, 3, World(), 9)
    for step in range(4):
        for part, everything in zip(zip(*(half(step)[:2] for half in halves), strict=True), shared(step)[:2],
                                    strict=True):
            assert torch.equal(torch.cat(part), everything)


# ---------------------------------------------------------------- networks and samplers

def test_recomputed_blocks_and_full_precision_attention():
    torch.manual_seed(0)
    nets = [UViT(**SMALL, use_checkpoint=again) for again in (False, True)]
    nets[1].load_state_dict(nets[0].state_dict())
    x, t, y = torch.randn(2, 4, 8, 8), torch.tensor([3.0, 700.0]), torch.tensor([0, 3])
    for net in nets:
        net(x, t, y).square().sum().backward()
    for ours, theirs in zip(nets[0].parameters(), nets[1].parameters(), strict=True):
        assert torch.equal(ours.grad, theirs.grad)

    seen = []
    attention = torch.nn.functional.scaled_dot_product_attention

    def watched(query, *rest, **how):
        seen.append(query.dtype)
        return attention(query, *rest, **how)

    with pytest.MonkeyPatch.context() as patch, torch.autocast("cpu", torch.bfloat16):
        patch.setattr(torch.nn.functional, "scaled_dot_product_attention", watched)
        nets[0](x, t, y)
        nets[0].set_full_precision_attention(True)
        nets[0](x, t, y)
    assert seen == [torch.bfloat16] * 3 + [torch.float32] * 3


def test_labels_have_to_fit_the_network():
    x, t = torch.randn(2, 4, 8, 8), torch.tensor([3.0, 700.0])
    with pytest.raises(ValueError, match="a network with classes needs labels"):
        UViT(**SMALL)(x, t)
    with pytest.raises(ValueError, match="one without takes none"):
        UViT(**{**SMALL, "num_classes": -1})(x, t, torch.tensor([0, 1]))
    with pytest.raises(UserError, match="at least 1 network call"):
        orders(0)


def test_solver_samples_a_normal_distribution():
    # Of data N(0, 0.5^2) the noise in x is known exactly, and so is the way from noise to data: x scaled by 0.5.
    schedule = ContinuousSchedule()

    def noise_in(x, time):
        alpha = schedule.alpha_bar((time / 999).double()).view(-1, 1, 1, 1)
        return (1 - alpha).sqrt() * x / (0.25 * alpha + 1 - alpha)

    x = torch.randn(4, 1, 2, 2, dtype=torch.float64)
    torch.testing.assert_close(dpm_solver(noise_in, x, 50), 0.5 * x, rtol=2e-3, atol=0)


# ---------------------------------------------------------------- configurations

@pytest.mark.parametrize("word, value", [
    ("--config.z_shape=12,16,16", (12, 16, 16)), ("--config.z_shape=(12, 16, 16)", (12, 16, 16)),
    ("--config.optimizer.betas=0.9,1", (0.9, 1.0)), ("--config.nnet.conv=no", False), ("--config.seed=3", 3),
    ("--config.sample.scale=1", 1.0), ("--config.sample.path=a=b", "a=b"), ("--config.train.mode=", ""),
])
def test_overrides_have_the_type_of_the_default(word, value):
    config = read_config(CONFIGS / "accelerate_b4_subset1_2img_k_128_large.py")
    override(config, word)
    *sections, last = word.partition("=")[0].removeprefix("--config.").split(".")
    for section in sections:
        config = config[section]
    assert config[last] == value and type(config[last]) is type(value)


@pytest.mark.parametrize("content, message", [
    ("def get_config():\n    return 3", "get_config\\(\\) of .* returns int, expected a dict"),
    ("import nothing_of_this_name", "ModuleNotFoundError: No module named 'nothing_of_this_name'"),
    ("x = 1", "AttributeError: .*get_config"), ("def get_config(:", "SyntaxError"),
])
def test_bad_configuration_is_one_line(content, message, tmp_path):
    (tmp_path / "config.py").write_text(content)
    with pytest.raises(UserError, match=message) as found:
        read_config(tmp_path / "config.py")
    assert "\n" not in str(found.value)
    with pytest.raises(UserError, match="--config: there is no file"):
        read_config(tmp_path / "absent.py")
