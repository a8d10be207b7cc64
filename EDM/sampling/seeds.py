"""From seeds to images: a network, a sampler and an arithmetic, put together, also from the flags of generate.py."""
from __future__ import annotations

import math
import warnings
from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

import torch

from EDM.sampling import samplers
from EDM.sampling.conditions import Conditions, read_conditions
from EDM.sampling.samplers import Model, Noise, affine, denoiser, guided
from EDM.training.layers import store_bf16_weights
from EDM.training.networks import use_channels_last
from EDM.training.snapshots import digest, load_network
from shared.cli import UserError
from shared.cpu.allocator import keep_freed_memory
from shared.distributed import World, on_main
from shared.option_types import parse_int_list
from shared.training.precision import default_precision
from shared.training.randomness import SeedGenerators

# On a CPU, results differ in the last bit between batches of a few images (other matrix kernels) but not from here on,
# so smaller batches are filled up. Then an image is the same bytes for any batch and any number of processes.
SMALLEST_CPU_BATCH = 16
SAMPLERS = ("edm", "ablation", "dpmpp-2m", "deis-2", "deis-3")
STOCHASTIC = ("edm", "ablation")
# Flags of generate.py -> arguments of the samplers.
ABLATION_FLAGS = {"solver": "solver", "disc": "discretization", "schedule": "schedule", "scaling": "scaling"}
CHURN_FLAGS = ("S_churn", "S_min", "S_max", "S_noise")


class SeedSampler:
    """Makes the images of seeds, as the published generate.py does.

    net, guide: preconditioned networks (EDM/training/preconditioning.py) in eval mode on the device to sample on.
    sampler: one of SAMPLERS; `arguments` go to it (see EDM/sampling/samplers.py).
    guidance: scale of `guided`; the guide is `guide`, or `net` without its class labels.
    second, affine_weight: network and weight of `affine`, in place of guidance.
    precision: fp32, bf16 or fp16; None: what the network was made for, else bf16 on a GPU that has it, else fp32.
    fast: the memory layout and the allocator's settings that are faster here; False is the published way.
    compile: compile the network first.
    """

    def __init__(self, net: torch.nn.Module, *, sampler: str = "edm", guide: torch.nn.Module | None = None,
                 guidance: float = 1.0, second: torch.nn.Module | None = None, affine_weight: float = 0.0,
                 precision: str | None = None, fast: bool = True, compile: bool = False, **arguments: Any) -> None:
        if guidance != 1 and guide is None and not net.label_dim:
            raise UserError("guidance without a guide needs a class-conditional network")
        if guide is not None and ((guide.img_channels, guide.img_resolution) != (net.img_channels, net.img_resolution)
                                  or guide.label_dim not in (0, net.label_dim)):
            raise UserError("the guide does not fit the network: other image size, channels or number of classes")
        if second is not None and ((second.img_channels, second.img_resolution, second.label_dim)
                                   != (net.img_channels, net.img_resolution, net.label_dim)):
            raise UserError("the second network does not fit the first: other image size, channels or classes")
        self.loss_kwargs = getattr(net, "loss_kwargs", {})
        self.trained = read_conditions(getattr(net, "dataset_kwargs", {}), net.label_dim)
        self.device = next(net.parameters()).device
        if fast and self.device.type == "cpu":
            keep_freed_memory()
        self.precision = precision or _own_precision(net, self.device)
        self.sampler, self.arguments, self.guidance = sampler, arguments, guidance
        self.net = self._prepared(net, fast, compile)
        self.guide = self.net if guide is None else self._prepared(guide, fast, compile)
        self.second = None if second is None else self._prepared(second, fast, compile)
        self.affine_weight = affine_weight
        self.shape = (net.img_channels, net.img_resolution, net.img_resolution)
        self.state_dtype = torch.float64
        # Tried on a single number: impossible settings are reported before the work.
        self._run(lambda x, sigma: x, torch.zeros(1, 1, 1, 1, device=self.device), lambda step: torch.zeros(()))

    @torch.inference_mode()
    def images(self, seeds: Sequence[int], classes: Sequence[int | None] | None = None,
               rows: int | None = None) -> torch.Tensor:
        """Return one image per seed: uint8 [len(seeds), C, R, R] on the device.

        classes: class of each image (of a network for lists of numbers, the place of one in `trained.vectors`); None
        there or for all: drawn from the seed, as often as it occurred in training. rows: batch size that the network
        sees; more than len(seeds) is filled up. Raises UserError when an image is not finite.
        """
        rows = rows or len(seeds)
        generators = SeedGenerators(seeds, self.device)

        def filled(tensor: torch.Tensor) -> torch.Tensor:
            return torch.cat([tensor, tensor.new_zeros(rows - len(tensor), *tensor.shape[1:])])

        latents = filled(generators.normal(self.shape))
        labels = None
        if self.net.label_dim:
            drawn = self._drawn(generators)  # even where a class is given, as published
            chosen = [own if given is None else given
                      for own, given in zip(drawn, classes or [None] * len(seeds), strict=True)]
            labels = filled(self.trained.inputs(chosen, self.device))

        images = self._run(self._model(labels), latents,
                           lambda step: filled(generators.normal(self.shape, self.state_dtype)))[:len(seeds)]
        finite = torch.isfinite(images).flatten(1).all(1)
        if not finite.all():
            raise UserError(f"the image of seed {seeds[finite.long().argmin().item()]} is not finite; try fp32, other "
                            "sampler settings or another snapshot")
        return (images * 127.5 + 128).clip(0, 255).to(torch.uint8)  # truncated, as published

    def classes(self, seeds: Sequence[int]) -> list[int]:
        """Return the class that each seed draws; -1 for an unconditional network."""
        if not self.net.label_dim:
            return [-1] * len(seeds)
        classes = []
        for seed in seeds:
            generators = SeedGenerators([seed], self.device)
            generators.normal(self.shape)
            classes += self._drawn(generators)
        return classes

    def _drawn(self, generators: SeedGenerators) -> list[int]:
        return self.trained.chosen(generators.integers(self.trained.draws_from)).tolist()

    def batch_rows(self, batches: Sequence[Sequence[Any]]) -> int:
        """Return the `rows` under which the images of `batches` depend on neither batch nor process."""
        largest, total = max(map(len, batches)), sum(map(len, batches))
        return max(largest, SMALLEST_CPU_BATCH) if self.device.type == "cpu" and total > 1 else largest

    def _run(self, model: Model, latents: torch.Tensor, noise: Noise) -> torch.Tensor:
        shared = dict(limits=(self.net.sigma_min, self.net.sigma_max), round_sigma=self._round_sigma,
                      dtype=self.state_dtype, **self.arguments)
        match self.sampler:
            case "edm":
                return samplers.edm_sampler(model, latents, noise=noise, **shared)
            case "ablation":
                return samplers.ablation_sampler(model, latents, noise=noise, **shared)
            case "dpmpp-2m":
                return samplers.dpm_solver_pp_2m(model, latents, **shared)
            case "deis-2" | "deis-3":
                return samplers.deis_sampler(model, latents, order=int(self.sampler[-1]), **shared)
            case _:
                raise ValueError(f"sampler: expected one of {', '.join(SAMPLERS)}, got {self.sampler!r}")

    def _model(self, labels: torch.Tensor | None) -> Model:
        model = denoiser(self.net, labels)
        if self.guidance != 1:
            guide_labels = labels if self.guide is not self.net and self.guide.label_dim else None
            model = guided(model, denoiser(self.guide, guide_labels), self.guidance)
        if self.second is not None:
            model = affine(model, denoiser(self.second, labels), self.affine_weight)
        if self.precision == "fp32" or self.net.use_fp16:
            return model
        dtype = torch.bfloat16 if self.precision == "bf16" else torch.float16

        def autocast(x: torch.Tensor, sigma: torch.Tensor) -> torch.Tensor:
            with torch.autocast(self.device.type, dtype):
                return model(x, sigma)

        return autocast

    def _prepared(self, net: torch.nn.Module, fast: bool, compile: bool) -> torch.nn.Module:
        net.use_fp16 = self.precision == "fp16" and self.device.type == "cuda"
        if self.precision == "fp32":
            torch.backends.cudnn.allow_tf32 = False  # 10 bits of mantissa are not what the name says
        if fast:
            use_channels_last(net)
            if self.precision == "bf16":
                store_bf16_weights(net)
        return torch.compile(net) if compile else net

    def _round_sigma(self, sigmas: torch.Tensor) -> torch.Tensor:
        return self.net.round_sigma(sigmas.to(self.device, self.state_dtype)).cpu().double()


def _own_precision(net: torch.nn.Module, device: torch.device) -> str:
    return "fp16" if net.use_fp16 and device.type == "cuda" else default_precision(device)


def load_sampler(flags: SimpleNamespace, world: World) -> tuple[SeedSampler, dict[str, Any]]:
    """Load the networks of generate.py's flags; return the sampler, and the settings to record beside its images."""
    def network(path: str) -> torch.nn.Module:
        if world.main:
            print(f"Loading network from \"{path}\"...")
        own = []  # the main process goes first: it fetches a URL, and it alone reports a file that is no snapshot
        on_main(lambda: own.append(load_network(path, world.device)), world)
        return own[0] if own else load_network(path, world.device)

    net = network(flags.network)
    guide = network(flags.guide_network) if flags.guide_network else None
    second = network(flags.network_2) if flags.affine_weight else None  # without weight it would change nothing
    if net.img_channels not in (1, 3):
        raise UserError(f"{flags.network} makes images of {net.img_channels} channels; a PNG holds 1 or 3")

    arguments: dict[str, Any] = dict(num_steps=flags.steps, rho=flags.rho)
    if flags.sampler in STOCHASTIC:
        arguments.update({name: getattr(flags, name) for name in CHURN_FLAGS})
    varying = {"sigma_min": "sigma_min", "sigma_max": "sigma_max", **ABLATION_FLAGS}
    arguments.update({argument: value for name, argument in varying.items()
                      if (value := getattr(flags, name)) is not None})
    guidance = 1.0 if flags.guidance is None else flags.guidance
    if guidance != 1 and guide is None and net.label_dim and not net.init_kwargs.get("label_dropout") and world.main:
        warnings.warn(f"--guidance: {flags.network} was trained without label dropout (train.py --label-dropout), so "
                      "it does not know images without a class; name another one with --guide-network", stacklevel=2)
    sampler = SeedSampler(net, sampler=flags.sampler, guide=guide, guidance=guidance, second=second,
                          affine_weight=flags.affine_weight, precision=flags.precision, fast=not flags.strict,
                          compile=flags.compile, **arguments)
    settings = dict(network=digest(flags.network), guide_network=digest(flags.guide_network) if guide else None,
                    guidance=guidance, sampler=flags.sampler,
                    **{name: "inf" if value == math.inf else value for name, value in arguments.items()},
                    precision=sampler.precision, device=world.device.type)
    if second is not None:
        settings.update(network_2=digest(flags.network_2), affine_weight=flags.affine_weight)
    return sampler, settings


def chosen_classes(flags: SimpleNamespace, label_dim: int, trained: Conditions) -> list[int | None]:
    """Return the classes to generate; [None] if each seed draws its own. Raises UserError for classes that the network
    lacks or never saw; `all` leaves out the latter with a warning."""
    name = "class" if flags.classes is None else "classes"
    if flags.class_index is None and flags.classes is None:
        return [None]
    if not label_dim:
        raise UserError(f"--{name} was given, but {flags.network} is not class-conditional")
    if trained.vectors is not None:
        raise UserError(f"--{name}: {flags.network} was trained on lists of numbers in place of classes; leave it out, "
                        "and each seed draws one that occurred")
    try:
        classes = list(range(label_dim)) if flags.classes == "all" else \
            [flags.class_index] if flags.classes is None else list(dict.fromkeys(parse_int_list(flags.classes)))
    except ValueError:
        raise UserError(f"--classes: {flags.classes!r} is neither all nor a list like 0,2,5-9") from None
    wrong = [index for index in classes if not 0 <= index < label_dim]
    if wrong or not classes:
        raise UserError(f"--{name}={wrong[0] if wrong else flags.classes}: {flags.network} has the classes 0 to "
                        f"{label_dim - 1}")
    absent = sorted(set(classes) - set(trained.present))
    said = ", ".join(trained.names[index] if trained.names else str(index) for index in absent[:10])
    if absent and flags.classes != "all":
        raise UserError(f"--{name}: {flags.network} was trained without an image of class {said}; it knows "
                        f"{', '.join(map(str, trained.present[:20]))}")
    if absent:
        warnings.warn(f"{flags.network} was trained without images of class {said}: left out",
                      stacklevel=2)
    return [index for index in classes if index not in absent]
