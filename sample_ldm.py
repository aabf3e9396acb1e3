"""Train a small latent diffusion model on LiteVAE's latents, and sample from it (Sec. 5, Tables 7 and 13, App. C).

    python sample_ldm.py train --vae runs/quickstart/checkpoint.pt         built-in images, minutes on a CPU
    python sample_ldm.py train --vae CKPT --data DIR --out runs/my-ldm     your images, on one GPU
    python sample_ldm.py train --resume --out runs/my-ldm                  go on where a run stopped, to the bit
    python sample_ldm.py sample --ldm runs/ldm/checkpoint.pt -n 64         a grid and 64 PNG files
    torchrun --nproc_per_node=2 sample_ldm.py train ...                    either command, shared by processes

Training writes into --out what train.py does: checkpoint.pt, log.csv and samples-STEP.png. The checkpoint
holds the autoencoder too, so sampling needs that one file. From top to bottom:

    1  Diffusion     App. C, EDM     preconditioning, Denoiser, diffusion_loss
    2  Sampling      Eq. 4, EDM      sigma_schedule, heun_sampler, stochastic_sampler, guided
    3  The network   LDM             UNet, PRESETS
    4  Latents       Sec. 1          LatentSpace, and CachedLatents for comparison
    5  Images                        ImageNoise, draw
    6  The step                      DiffusionTask and its checkpoint
    7  Commands                      prepare, for train; sample
    8  Arguments

"EDM" is Karras et al. 2022, Elucidating the Design Space of Diffusion-Based Generative Models, which App. C
follows; "LDM" is Rombach et al. 2022, whose UNet Sec. 5 takes over. The axes: B latents, nz channels,
h x w = H/8 x W/8 positions, C channels inside the network. sigma is the noise's standard deviation, (B,).
"""

import argparse
import functools
import math
import os
import re
import shutil
import sys
import zlib
from pathlib import Path

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
from PIL import Image
from torch.utils.data import DataLoader

from litevae import Config, LiteVAE, group_norm, load_checkpoint, write_checkpoint
from train import (EMA, ImageFolder, Machine, Options, Parser, Progress, Shuffled, UsageError, add_optimiser_options,
                   add_run_options, announce, at_least, batches, check_run, complete, find_images, fit,
                   fits_resolution, ignore_signals, learning_rate, load_optimizer, load_or_say, open_images, open_rgb,
                   optimizer_step, rebuilt, run_script, save_grid, to_pixels, trained_at)

# ------------------------------------------------------------------------------------------------------
# 1  Diffusion (App. C, EDM Sec. 5 and Table 1)
# ------------------------------------------------------------------------------------------------------
# x_t = x + sigma(t) eps with eps ~ N(0, I), and EDM's choice sigma(t) = t: time is the noise level. The
# data x have mean 0 and standard deviation sigma_data = 1 in every channel: see LatentSpace.
# Differs: LDM, which the paper's models follow closely (App. F), trains DDPM's 1000 discrete noise levels.
# App. C describes diffusion in EDM's continuous ones, and so does this file.


def preconditioning(sigma, sigma_data=1.0):
    """c_skip, c_out, c_in, c_noise of EDM's Table 1 (column "Ours"), each of sigma's shape.

    They give the network inputs and targets of unit variance at every noise level. As sigma -> 0 the
    denoiser becomes the identity (c_skip -> 1), as sigma -> inf all of its output is the network's.
    """
    total = sigma**2 + sigma_data**2
    return sigma_data**2 / total, sigma * sigma_data * total**-0.5, total**-0.5, sigma.log() / 4


class Denoiser(nn.Module):
    """D(x; sigma) = c_skip x + c_out F(c_in x; c_noise): x without its noise (EDM Eq. 7).

    `net` is F: (x, c_noise (B,), label) -> x's shape. (B, ...) and sigma (B,) -> (B, ...), in x's dtype.
    """

    def __init__(self, net):
        super().__init__()
        self.net = net

    def forward(self, x, sigma, label=None):
        c_skip, c_out, c_in, c_noise = preconditioning(sigma.view(-1, *[1] * (x.ndim - 1)))
        return c_skip * x + c_out * self.net(c_in * x, c_noise.flatten(), label).to(x.dtype)


def noise_levels(normal, mean, std):
    """Log-normal noise levels, ln sigma ~ N(mean, std^2), from standard normal numbers (EDM Table 1): (B,)."""
    return (mean + std * normal).exp()


def diffusion_loss(denoiser, x, sigma, noise, label=None):
    """E[lambda(sigma) |D(x + sigma noise; sigma) - x|^2] over all elements, (), with EDM's weight (Eq. 2, Table 1).

    lambda = 1 / c_out^2 makes it the mean squared error of the network F itself: before training, where F
    is zero, it is 1 at every noise level.
    """
    s = sigma.view(-1, *[1] * (x.ndim - 1))
    weight = (s**2 + 1) / s**2  # lambda(sigma) at sigma_data = 1
    return (weight * (denoiser(x + s * noise, sigma, label) - x).square()).mean()


# ------------------------------------------------------------------------------------------------------
# 2  Sampling (Eq. 4; EDM Algorithms 1 and 2)
# ------------------------------------------------------------------------------------------------------
# The score is grad log p_t(x) = (D(x; sigma) - x) / sigma^2. With it and sigma(t) = t, Eq. 4 with beta = 0 is
# the probability-flow ODE  dx/dsigma = (x - D(x; sigma)) / sigma,  which leads from noise to data.


def sigma_schedule(steps, sigma_min=0.002, sigma_max=80.0, rho=7.0):
    """`steps` noise levels from sigma_max to sigma_min, evenly spaced in sigma^(1/rho), then 0 (EDM Eq. 5)."""
    top, bottom = sigma_max ** (1 / rho), sigma_min ** (1 / rho)
    return [(top + i / max(1, steps - 1) * (bottom - top)) ** rho for i in range(steps)] + [0.0]


def heun_sampler(denoise, x, sigmas):
    """Algorithm 1 of EDM: the probability-flow ODE by Heun's method, 2 * steps - 1 evaluations.

    denoise(x, sigma) is D. x, (B, ...), is noise of standard deviation sigmas[0]; `sigmas` falls to 0.
    """
    for sigma, sigma_next in zip(sigmas, sigmas[1:]):
        x = _heun_step(denoise, x, sigma, sigma_next)
    return x


def stochastic_sampler(denoise, x, sigmas, randn, churn=40.0, churn_min=0.0, churn_max=math.inf, churn_noise=1.0):
    """Algorithm 2 of EDM: the SDE of Eq. 4. Before each Heun step new noise is added, and sigma raised to match.

    The Langevin term of Eq. 4, its beta, is what `churn` (S_churn) stands for: new noise replaces old, so
    errors of earlier steps fade. It acts where churn_min <= sigma <= churn_max (S_tmin, S_tmax);
    churn_noise (S_noise), a little above 1, makes up for detail that denoisers lose. randn() gives noise of
    x's shape. With churn 0 it is heun_sampler.
    """
    for sigma, sigma_next in zip(sigmas, sigmas[1:]):
        # At most sqrt(2) - 1: never more new noise than there is already.
        gamma = min(churn / (len(sigmas) - 1), 2**0.5 - 1) if churn_min <= sigma <= churn_max else 0.0
        if gamma > 0:
            sigma_hat = sigma * (1 + gamma)
            x = x + (sigma_hat**2 - sigma**2) ** 0.5 * churn_noise * randn()
            sigma = sigma_hat
        x = _heun_step(denoise, x, sigma, sigma_next)
    return x


def _heun_step(denoise, x, sigma, sigma_next):
    """From sigma to sigma_next: an Euler step, then again with the mean of both ends' slopes."""
    slope = lambda x, sigma: (x - denoise(x, x.new_full((len(x),), sigma))) / sigma  # noqa: E731  dx/dsigma
    d = slope(x, sigma)
    euler = x + (sigma_next - sigma) * d
    if sigma_next == 0:
        return euler  # the slope at 0 is not defined
    return x + (sigma_next - sigma) * (d + slope(euler, sigma_next)) / 2


def guided(denoiser, label=None, guidance=1.0):
    """denoise(x, sigma) for the samplers: for `label`, (B,), with classifier-free guidance (Ho & Salimans 2022).

    D_none + guidance (D_label - D_none): 1 is the plain conditional model, more overstates what the label
    changes. D_none is the model as trained on examples whose label was dropped.
    """
    if label is None or guidance == 1.0:
        return lambda x, sigma: denoiser(x, sigma, label)
    none = torch.full_like(label, denoiser.net.config.classes)

    def denoise(x, sigma):
        with_label, without = denoiser(x.repeat(2, 1, 1, 1), sigma.repeat(2), torch.cat([label, none])).chunk(2)
        return without + guidance * (with_label - without)
    return denoise


# ------------------------------------------------------------------------------------------------------
# 3  The network (Sec. 5: "a UNet identical to the original model from Rombach et al.")
# ------------------------------------------------------------------------------------------------------

# Unspecified: the sizes, but for "ldm". Parameters are counted without classes.
PRESETS = {
    # 1,826,508 parameters at nz=12: minutes on a CPU. Width at the full size pays there, depth below it does not.
    "quick": {"channels": 64, "ch_mult": (1, 1), "num_res_blocks": 2, "attention": (1,), "scale_shift": True},
    # 45,214,980 at nz=4: an hour on one GPU
    "small": {"channels": 128, "ch_mult": (1, 2, 3), "num_res_blocks": 2, "attention": (1, 2), "scale_shift": True},
    # 274,060,196 at nz=4. Paper: LDM's model of FFHQ and CelebA-HQ, 274,056,163 on its 3-channel latents
    "ldm": {"channels": 224, "ch_mult": (1, 2, 3, 4), "num_res_blocks": 2, "attention": (1, 2, 3),
            "scale_shift": False},
}


class UNet(nn.Module):
    """LDM's denoising UNet: (B, nz, h, w), c_noise (B,), label (B,) or None -> (B, nz, h, w), any h and w.

    Level l has channels * ch_mult[l] channels at 1 / 2^l of the size, num_res_blocks blocks on the way down
    and one more on the way up, and attention where l is in `attention`. With `scale_shift` the noise level
    scales and shifts normalised features, as in ADM; without, it is added to them, as in LDM. `classes` counts
    labels; the label `classes` itself means none. Residual branches and the output start at zero. To copy it,
    take what follows down to _zero along, and group_norm and Config of litevae.py: torch is all they need.
    """

    def __init__(self, latent_dim, channels=128, ch_mult=(1, 2, 3), num_res_blocks=2, attention=(1, 2),
                 scale_shift=True, classes=0):
        super().__init__()
        self.config = Config(latent_dim=latent_dim, channels=channels, ch_mult=tuple(ch_mult), classes=classes,
                             num_res_blocks=num_res_blocks, attention=tuple(attention), scale_shift=scale_shift)
        E = 4 * channels
        block = functools.partial(Block, embedding=E, scale_shift=scale_shift)
        self.embed = nn.Sequential(nn.Linear(channels, E), nn.SiLU(), nn.Linear(E, E))
        self.label_embed = nn.Embedding(classes + 1, E) if classes else None
        self.conv_in = nn.Conv2d(latent_dim, channels, 3, padding=1)

        width, skips = channels, [channels]
        self.down = nn.ModuleList()
        for level, mult in enumerate(ch_mult):
            for _ in range(num_res_blocks):
                self.down.append(block(width, channels * mult, attention=level in attention))
                width = channels * mult
                skips.append(width)
            if level < len(ch_mult) - 1:
                self.down.append(Downsample(width))
                skips.append(width)

        self.mid = nn.ModuleList([block(width, width, attention=True), block(width, width)])

        self.up = nn.ModuleList()
        for level, mult in reversed(list(enumerate(ch_mult))):
            for _ in range(num_res_blocks + 1):
                self.up.append(block(width + skips.pop(), channels * mult, attention=level in attention))
                width = channels * mult
            if level > 0:
                self.up.append(Upsample(width))

        self.norm_out = group_norm(width)
        self.conv_out = _zero(nn.Conv2d(width, latent_dim, 3, padding=1))

    def forward(self, x, c_noise, label=None):
        e = self.embed(noise_embedding(c_noise, self.config.channels))  # (B, E)
        if self.label_embed is not None:
            none = torch.full_like(c_noise, self.config.classes, dtype=torch.long)
            e = e + self.label_embed(none if label is None else label)
        e = F.silu(e)
        x = self.conv_in(x)  # (B, C, h, w)
        skips = [x]
        for layer in self.down:
            x = layer(x, e)  # (B, C * ch_mult[level], h / 2^level, w / 2^level)
            skips.append(x)
        for block in self.mid:
            x = block(x, e)
        for layer in self.up:
            x = layer(x, skips[-1].shape[-2:]) if isinstance(layer, Upsample) else \
                layer(torch.cat([x, skips.pop()], dim=1), e)
        return self.conv_out(F.silu(self.norm_out(x)))  # (B, nz, h, w)


def noise_embedding(c_noise, channels):
    """Cosines and sines of c_noise at `channels / 2` frequencies: (B,) -> (B, channels)."""
    # Differs: LDM embeds DDPM's step, 0 to 999, with frequencies from 1 down to 1e-4. c_noise = ln(sigma) / 4
    # spans 2.7 from sigma_min to sigma_max; times 100, what the network does changes smoothly with it.
    half = channels // 2
    frequencies = torch.exp(-math.log(10_000) / half * torch.arange(half, device=c_noise.device))  # (channels / 2,)
    angle = 100 * c_noise.float()[:, None] * frequencies  # (B, channels / 2)
    return torch.cat([angle.cos(), angle.sin()], dim=1).to(c_noise.dtype)


class Block(nn.Module):
    """Residual block that hears the noise level, then perhaps attention: (B, in, h, w), (B, E) -> (B, out, h, w)."""

    def __init__(self, in_channels, out_channels, embedding, scale_shift=True, attention=False):
        super().__init__()
        self.norm_in = group_norm(in_channels)
        self.conv_in = nn.Conv2d(in_channels, out_channels, 3, padding=1)
        self.scale_shift = scale_shift
        self.embed = nn.Linear(embedding, 2 * out_channels if scale_shift else out_channels)
        self.norm_out = group_norm(out_channels)
        self.conv_out = _zero(nn.Conv2d(out_channels, out_channels, 3, padding=1))
        self.skip_connection = nn.Identity() if in_channels == out_channels else nn.Conv2d(in_channels, out_channels, 1)
        self.attention = Attention(out_channels) if attention else nn.Identity()

    def forward(self, x, e):
        h = self.conv_in(F.silu(self.norm_in(x)))  # (B, out, h, w)
        e = self.embed(e)[:, :, None, None]  # (B, out or 2 out, 1, 1)
        if self.scale_shift:
            scale, shift = e.chunk(2, dim=1)
            h = self.norm_out(h) * (1 + scale) + shift
        else:
            h = self.norm_out(h + e)
        h = self.conv_out(F.silu(h))
        return self.attention(self.skip_connection(x) + h)


class Attention(nn.Module):
    """Residual self-attention over all positions, 32 channels a head: (B, C, h, w) -> (B, C, h, w)."""

    def __init__(self, channels):
        super().__init__()
        self.heads = max(1, channels // 32)
        self.norm = group_norm(channels)
        self.qkv = nn.Conv2d(channels, 3 * channels, 1)
        self.proj_out = _zero(nn.Conv2d(channels, channels, 1))

    def forward(self, x):
        B, C, h, w = x.shape
        qkv = self.qkv(self.norm(x)).reshape(B, 3, self.heads, C // self.heads, h * w)
        q, k, v = qkv.transpose(-1, -2).unbind(1)  # (B, heads, hw, C / heads) each
        y = F.scaled_dot_product_attention(q, k, v)
        return x + self.proj_out(y.transpose(-1, -2).reshape(B, C, h, w))


class Downsample(nn.Conv2d):
    """Stride-2 convolution: (B, C, h, w) -> (B, C, ceil(h / 2), ceil(w / 2))."""

    def __init__(self, channels):
        super().__init__(channels, channels, 3, stride=2, padding=1)

    def forward(self, x, e):
        return super().forward(x)


class Upsample(nn.Conv2d):
    """To the nearest neighbours at `size`, which may be odd, then a convolution: (B, C, h, w) -> (B, C, *size)."""

    def __init__(self, channels):
        super().__init__(channels, channels, 3, padding=1)

    def forward(self, x, size):
        return super().forward(F.interpolate(x, size=tuple(size), mode="nearest"))


def _zero(conv):
    nn.init.zeros_(conv.weight)
    nn.init.zeros_(conv.bias)
    return conv


# ------------------------------------------------------------------------------------------------------
# 4  Latents
# ------------------------------------------------------------------------------------------------------


class LatentSpace(nn.Module):
    """A frozen autoencoder, and the scale that gives its latents mean 0 and standard deviation 1 per channel.

    `vae` is anything with encode(image).latent_dist, decode(latent).sample and config.latent_dim.
    """

    # Differs: Stable Diffusion multiplies by one number, `config.scaling_factor`. Channels of a latent differ
    # in scale and mean, and EDM's preconditioning wants sigma_data = 1 in each.

    def __init__(self, vae, mean, std):
        super().__init__()
        self.vae = vae.eval().requires_grad_(False)
        self.register_buffer("mean", mean.view(-1, 1, 1))  # (nz, 1, 1)
        self.register_buffer("std", std.view(-1, 1, 1))

    @torch.no_grad()
    def posterior(self, image):
        """(B, 3, H, W) in [-1, 1] -> the posterior's mean and standard deviation, not yet normalised: (B, nz, h, w)."""
        posterior = self.vae.encode(image).latent_dist
        return posterior.mean, posterior.std

    def normalise(self, z):
        """The autoencoder's latents -> what diffusion sees."""
        return (z - self.mean) / self.std

    @torch.no_grad()
    def decode(self, x):
        """What diffusion makes, (B, nz, h, w) -> images, (B, 3, 8h, 8w), about [-1, 1]."""
        return self.vae.decode(x * self.std + self.mean).sample.float()


STATISTICS_IMAGES = 1024  # from which mean and standard deviation are measured


def measure_latents(vae, stream, count, machine):
    """Mean and standard deviation of each channel of drawn latents, (nz,) each, over `count` batches of `stream`.

    Drawn latents vary by the spread of the means and by the posteriors' own variance; both are added up
    without drawing.
    """
    space = LatentSpace(vae, *torch.zeros(2, vae.config.latent_dim, device=machine.device))
    first, second = 0.0, 0.0
    for _ in range(count):
        images, _ = _with_label(next(stream))
        with machine.autocast():
            mean, std = (a.cpu().double() for a in space.posterior(machine.images(images)))  # (B, nz, h, w)
        first = first + mean.mean(dim=(0, 2, 3)) / count
        second = second + (mean**2 + std**2).mean(dim=(0, 2, 3)) / count
    first, second = machine.average(torch.stack([first, second])).cpu()
    return first.float(), (second - first**2).clamp_min(1e-12).sqrt().float()  # a dead channel stays 0


def _with_label(batch):
    """What the loader gives as (items, labels), labels None where there are none."""
    return batch if isinstance(batch, (list, tuple)) else (batch, None)


BUILT_IN_CACHE = 8192  # how many of the endless built-in images --cache-latents takes


class CachedLatents:
    """Posteriors of a fixed set of images, encoded once: position -> (2, nz, h, w) float16, mean and deviation.

    The usual way around a heavy encoder (Sec. 1), for comparison: crops are lost and disk space is needed.
    Flips are kept, by encoding each image twice: no encoder promises that a flipped image's latent is the
    flipped latent. The set is shuffled anew each epoch; with labels, items are ((2, nz, h, w), label).
    """

    def __init__(self, folder, seed, labelled):
        self.moments = np.load(folder / "moments.npy", mmap_mode="r")  # (N, 2 flips, 2, nz, h, w)
        self.labels = np.load(folder / "labels.npy") if labelled else None
        self.seed, self.order = seed, Shuffled(len(self.moments), seed)

    def __getitem__(self, position):
        index = self.order[position]
        flip = np.random.default_rng((self.seed, 1, position)).integers(2)
        moments = torch.from_numpy(self.moments[index, flip].copy())
        return moments if self.labels is None else (moments, int(self.labels[index]))


def cache_latents(folder, images, count, space, shape, machine, batch_size, workers):
    """Encode `count` images and their mirror images into `folder`, shared by the processes.

    `shape` is a latent's, (nz, h, w). The folder appears when it is complete. UsageError if there is one already
    that was made from something else.
    """
    # The folder knows what it was made from: a resumed run takes it up, another one is refused.
    checksum = 0
    for tensor in space.vae.state_dict().values():
        checksum = zlib.crc32(tensor.cpu().contiguous().view(-1).view(torch.uint8).numpy(), checksum)
    names = "\n".join(images.files) if hasattr(images, "files") else f"built-in {images.seed} {images.clutter}"
    about = f"{count} images ({zlib.crc32(names.encode()):08x}), latents {shape}, autoencoder {checksum:08x}\n"
    if folder.exists():
        if (folder / "about.txt").read_text() != about:
            raise UsageError(f"{folder} holds latents of other images or of another autoencoder: delete that folder, "
                             "or choose another --out")
        return
    partial = Path(f"{folder}.partial")
    if machine.rank == 0:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        np.lib.format.open_memmap(partial / "moments.npy", "w+", np.float16, (count, 2, 2, *shape))
        np.lib.format.open_memmap(partial / "labels.npy", "w+", np.int64, (count,))
        (partial / "about.txt").write_text(about)
    machine.wait()
    moments, labels = (np.lib.format.open_memmap(partial / name, "r+") for name in ("moments.npy", "labels.npy"))
    mine = range(machine.rank, count, machine.world)
    loader = DataLoader(images, batch_size, sampler=mine, num_workers=workers, worker_init_fn=ignore_signals)
    progress = Progress(0, len(mine))
    for first, batch in zip(range(0, len(mine), batch_size), loader):
        image, label = _with_label(batch)
        rows, image = list(mine[first:first + batch_size]), machine.images(image)
        for flip, view in enumerate((image, image.flip(-1))):
            with machine.autocast():
                mean, std = space.posterior(view)
            moments[rows, flip] = torch.stack([mean, std], dim=1).half().cpu().numpy()
        if label is not None:
            labels[rows] = label
        if machine.rank == 0:
            progress.show(first + len(rows), "images encoded for --cache-latents")
            for path in getattr(images, "unreadable", list)():
                progress.say(f"skipped, cannot be read: {path}")
    moments.flush()
    labels.flush()
    machine.wait()
    if machine.rank == 0:
        os.replace(partial, folder)
    machine.wait()


# ------------------------------------------------------------------------------------------------------
# 5  Images
# ------------------------------------------------------------------------------------------------------


class ImageNoise:
    """Standard normal noise for numbered images: what an image gets depends on seed, number and turn alone."""

    def __init__(self, seed, numbers):
        seeds = (int(np.random.SeedSequence((seed, i)).generate_state(1, np.uint64)[0]) for i in numbers)
        self.generators = [torch.Generator().manual_seed(s) for s in seeds]

    def __call__(self, shape, rows=None):
        """(len(rows), *shape), the next noise of the images at `rows`, or of all."""
        generators = self.generators if rows is None else [self.generators[i] for i in rows]
        return torch.stack([torch.randn(tuple(shape), generator=g) for g in generators])


GUIDANCE = 1.5  # Unspecified: the paper has no classes. LDM's value for ImageNet
CHURN_RANGE, CHURN_NOISE = (0.05, 50.0), 1.003  # of --churn. EDM's values for ImageNet, Table 5


@torch.no_grad()
def draw(denoiser, space, machine, noise, h, w, steps=18, label=None, guidance=1.0, **churn):
    """Images, (B, 3, 8h, 8w) in [-1, 1], on the CPU, from an ImageNoise; `churn` goes to stochastic_sampler."""
    shape = (denoiser.net.config.latent_dim, h, w)
    randn = lambda: noise(shape).to(machine.device).contiguous(memory_format=machine.memory_format)  # noqa: E731
    sigmas, denoise = sigma_schedule(steps), guided(denoiser, label, guidance)
    with machine.autocast():
        x = sigmas[0] * randn()  # (B, nz, h, w)
        x = stochastic_sampler(denoise, x, sigmas, randn, **churn) if churn.get("churn") else \
            heun_sampler(denoise, x, sigmas)
        return space.decode(x).clamp(-1, 1).cpu()


def class_labels(numbers, classes, names, machine):
    """Labels of numbered images, which take turns through `names` (all classes if None): (B,), None without classes."""
    if not classes:
        return None
    turn = [classes.index(name) for name in names or classes]
    return torch.tensor([turn[i % len(turn)] for i in numbers], device=machine.device)


# ------------------------------------------------------------------------------------------------------
# 6  The step
# ------------------------------------------------------------------------------------------------------


class DiffusionTask:
    """The denoiser in the latent space of a frozen autoencoder, and one update of it; what `fit` runs."""

    shown = ["loss", "encode_share"]
    fields = ["loss", "grad_norm", "lr", "encode_share", "val_loss"]

    def __init__(self, args, machine, denoiser, space, held_out, classes=()):
        self.args, self.machine, self.held_out, self.classes = args, machine, held_out, list(classes)
        self.space = space.to(machine.device, memory_format=machine.memory_format)
        self.denoiser = denoiser.to(machine.device, memory_format=machine.memory_format).train()
        self.ema = EMA(self.denoiser, args.ema)
        self.optimizer = torch.optim.Adam(self.denoiser.parameters(), args.lr, (args.beta1, args.beta2), fused=True)
        self.skipped = 0
        if args.compile:
            self.denoiser.net.compile()
        self.parallel = machine.parallel(self.denoiser)

    def step(self, batch, step, log):
        args, machine = self.args, self.machine
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate(step, args.lr, args.lr_warmup, args.lr_decay_after)
        items, label = _with_label(batch)
        started = machine.now() if log else None

        # Encoding on the fly is what a light encoder buys: every epoch sees other crops.
        if args.cache_latents:
            mean, std = items.to(machine.device).float().unbind(1)  # (B, nz, h, w) each
        else:
            with machine.autocast():
                mean, std = self.space.posterior(machine.images(items))
        encoded = machine.now() if log else None

        # An encoded image serves for several draws of posterior, noise level and noise, each an example.
        mean, std = (a.repeat_interleave(args.noise_draws, 0) for a in (mean, std))  # (B * draws, nz, h, w)
        x = self.space.normalise(mean + std * machine.randn(mean.shape))
        if label is not None:
            label = label.to(machine.device).repeat_interleave(args.noise_draws, 0)
            quantile = torch.special.ndtri(torch.tensor(args.class_dropout)).item()  # randn is below it that often
            none = torch.full_like(label, len(self.classes))
            label = torch.where(machine.randn(label.shape) < quantile, none, label)  # for classifier-free guidance
        sigma = noise_levels(machine.randn((len(x),)), args.noise_mean, args.noise_std)
        with machine.autocast():
            loss = diffusion_loss(self.parallel, x, sigma, machine.randn(x.shape), label)
        norm = optimizer_step(loss, self.denoiser.parameters(), self.optimizer, args.clip)
        finite = bool(torch.isfinite(norm))
        if finite:
            self.ema.update(self.denoiser)
        values = {"loss": loss.detach(), "grad_norm": norm, "lr": self.optimizer.param_groups[0]["lr"]}
        if log:
            values["encode_share"] = (encoded - started) / (machine.now() - started)
        return {**values, "finite": finite}

    @torch.no_grad()
    def report(self, step):
        """The averaged weights' loss on held-out images, at noise levels and noise that never change, and samples."""
        losses, count, size = [], len(self.held_out), self.args.batch_size
        # One level for each image, at evenly spaced quantiles of the levels that are trained.
        sigmas = noise_levels(torch.special.ndtri((torch.arange(count) + 0.5) / count), self.args.noise_mean,
                              self.args.noise_std)
        noise = ImageNoise(0, range(count))
        for first in range(0, count, size):
            rows = range(first, min(first + size, count))
            images, labels = zip(*(_with_label(self.held_out[i]) for i in rows))
            label = torch.tensor(labels, device=self.machine.device) if self.classes else None
            with self.machine.autocast():
                mean, _ = self.space.posterior(self.machine.images(torch.stack(images)))
                x = self.space.normalise(mean)  # (B, nz, h, w)
                eps = noise(x.shape[1:], rows).to(x)
                losses += [len(rows) * diffusion_loss(self.ema.model, x, sigmas[first:first + size].to(x), eps, label)]
        n = 16
        images = draw(self.ema.model, self.space, self.machine, ImageNoise(0, range(n)), self.args.resolution // 8,
                      self.args.resolution // 8, label=class_labels(range(n), self.classes, None, self.machine),
                      guidance=GUIDANCE)
        save_grid(Path(self.args.out) / f"samples-{step:06}.png", [images[i:i + 8] for i in range(0, n, 8)])
        return {"val_loss": (sum(losses) / count).item()}

    def save(self, step):
        vae = self.space.vae
        write_checkpoint(Path(self.args.out) / "checkpoint.pt", {
            "format": LDM_FORMAT, "config": dict(self.denoiser.net.config), "model": dict(self.denoiser.state_dict()),
            "ema": dict(self.ema.model.state_dict()), "classes": self.classes, "resolution": self.args.resolution,
            "latent_mean": self.space.mean.flatten(), "latent_std": self.space.std.flatten(),
            "vae": {"config": dict(vae.config), "model": dict(vae.state_dict())}, "step": step,
            "training": {"optimizer": self.optimizer.state_dict()["state"], "ema_updates": self.ema.updates,
                         "skipped": self.skipped},
            "args": {k: v for k, v in vars(self.args).items() if v is not None}})

    def resume(self, checkpoint):
        """Take up everything `save` wrote."""
        training = checkpoint["training"]
        self.denoiser.load_state_dict(checkpoint["model"])
        self.ema.model.load_state_dict(checkpoint["ema"])
        self.ema.updates, self.skipped = training["ema_updates"], training["skipped"]
        load_optimizer(self.optimizer, training["optimizer"])


# The autoencoder travels in the diffusion checkpoint, rather than its path and a checksum: latents mean
# something to that very autoencoder alone, and files get moved, trained on and deleted. It adds 0.2 GB with
# Stable Diffusion's decoder, where the state of the "ldm" network and its optimiser is 4.4 GB.
LDM_FORMAT = "litevae-ldm-1"


def load_ldm(path):
    """The dict that DiffusionTask.save wrote. FileNotFoundError or ValueError, in one sentence."""
    checkpoint = load_checkpoint(path, LDM_FORMAT)
    needed = {"config", "model", "ema", "vae", "latent_mean", "latent_std", "resolution", "classes"}
    missing = needed - checkpoint.keys()
    if missing:  # above all: latents of an unknown scale cannot be decoded
        raise ValueError(f"{path} holds no {' and no '.join(sorted(missing))}: it is no whole diffusion checkpoint")
    return checkpoint


def build(checkpoint, ema=True):
    """The denoiser, with averaged or with raw weights, and the latent space of a checkpoint."""
    denoiser = Denoiser(UNet(**checkpoint["config"]))
    denoiser.load_state_dict(checkpoint["ema" if ema else "model"])
    return denoiser, LatentSpace(LiteVAE.from_state(checkpoint["vae"]), checkpoint["latent_mean"],
                                 checkpoint["latent_std"])


# ------------------------------------------------------------------------------------------------------
# 7  Commands
# ------------------------------------------------------------------------------------------------------


def class_of(file, root):
    """The class of an image: the first folder on the way from `root` to it, "" where there is none."""
    parts = Path(file).relative_to(root).parts
    return parts[0] if len(parts) > 1 else ""


def prepare(args, machine, checkpoint):
    """The task, its data set and the step to start from."""
    classes, label = [], None
    if args.class_cond:
        classes = checkpoint["classes"] if args.resume else \
            sorted({class_of(file, args.data) for file in find_images(args.data)})
        if "" in classes or len(classes) < 2:
            raise UsageError("--class-cond takes the sub-folders of --data for classes: there must be two or more, and "
                             f"every image of {args.data} in one of them")

        def label(file, root):
            if class_of(file, root) not in classes:
                raise UsageError(f"{file} is in no folder that is named like one of the {len(classes)} classes")
            return classes.index(class_of(file, root))

    torch.manual_seed(args.seed)
    dataset, held_out, about = open_images(args, label, args.clutter)
    workers = machine.workers(args.workers)
    if args.resume:
        denoiser, space = rebuilt(lambda: build(checkpoint, ema=False), "--resume")
    else:
        vae = rebuilt(lambda: LiteVAE.from_state(checkpoint), "--vae").eval().requires_grad_(False)
        vae.to(machine.device, memory_format=machine.memory_format)
        denoiser = Denoiser(UNet(vae.config.latent_dim, **PRESETS[args.model], classes=len(classes)))
        count = -(-STATISTICS_IMAGES // args.batch_size)
        if machine.rank == 0:
            print(f"measuring the latents of {count * args.batch_size} training images", flush=True)
        stream = batches(dataset, args.batch_size, 0, machine, workers)
        space = LatentSpace(vae, *measure_latents(vae, stream, count, machine))
    task = DiffusionTask(args, machine, denoiser, space, held_out, classes)
    start = 0
    if args.resume:
        task.resume(checkpoint)
        start = checkpoint["step"]
    side, nz = args.resolution // 8, space.vae.config.latent_dim
    about = f"latent {side}x{side}x{nz}; {f'{len(classes)} classes; ' if classes else ''}{about}"
    announce(f"the {args.model} denoiser", denoiser, about, args, machine, start)
    if args.cache_latents:
        folder = Path(args.out) / "latents"
        images, count = (dataset, BUILT_IN_CACHE) if not args.data else \
            (ImageFolder(dataset.files, args.resolution, augment=False, labels=dataset.labels), len(dataset))
        cache_latents(folder, images, count, task.space, (nz, side, side), machine, args.batch_size, workers)
        dataset = CachedLatents(folder, args.seed, labelled=bool(classes))
    return task, dataset, start


def sample(args):
    """Write images in batches, each from noise of its own, so that the batch size changes nothing."""
    checkpoint = load_or_say(load_ldm, args.ldm, "--ldm")
    classes = checkpoint["classes"]
    for name in args.classes or []:
        if name not in classes:
            raise UsageError(f"--class {name} is unknown: " + (f"the classes are {', '.join(classes)}" if classes else
                                                               "this model was trained without classes"))
    if args.guidance is not None and not classes:
        raise UsageError("--guidance is towards a class, and this model was trained without: leave the option out")
    churn = {"churn": args.churn or 0.0}
    if args.churn:
        churn_min, churn_max = args.churn_range or CHURN_RANGE
        churn |= {"churn_min": churn_min, "churn_max": churn_max,
                  "churn_noise": CHURN_NOISE if args.churn_noise is None else args.churn_noise}
    denoiser, space = rebuilt(lambda: build(checkpoint, ema=not args.raw_weights), "--ldm")
    height, width = args.size or (checkpoint["resolution"],) * 2
    machine = Machine(args.device, args.precision)
    size = args.batch_size or (16 if machine.device.type == "cpu" else 64)
    for module in (denoiser, space):
        module.to(machine.device, memory_format=machine.memory_format).eval().requires_grad_(False)

    out = args.out or fresh_folder(Path(args.ldm).parent / "samples")
    folder = out / "images"
    if folder.exists() and any(folder.iterdir()):
        raise UsageError(f"{folder} already holds images: choose another --out")
    machine.wait()  # before the first of them makes the folder
    folder.mkdir(parents=True, exist_ok=True)
    mine = range(machine.rank, args.n, machine.world)
    progress, done = Progress(0, len(mine)), 0
    status = 0
    try:
        for first in range(0, len(mine), size):
            numbers = mine[first:first + size]
            label = class_labels(numbers, classes, args.classes, machine)
            images = draw(denoiser, space, machine, ImageNoise(args.seed, numbers), height // 8, width // 8, args.steps,
                          label, GUIDANCE if args.guidance is None else args.guidance, **churn)
            if not images.isfinite().all():
                raise UsageError("the samples are not finite: try --precision fp32, or an earlier checkpoint")
            for number, image in zip(numbers, images):
                pixels = (to_pixels(image) * 255).round().byte().permute(1, 2, 0)
                Image.fromarray(pixels.numpy()).save(folder / f"{number:06}.png")
            done += len(numbers)
            if machine.rank == 0:
                progress.show(done, "images")
    except KeyboardInterrupt:
        status = 130
    machine.wait()
    if machine.rank == 0:
        shown = sorted(folder.glob("*.png"))[:64]
        if shown:
            grid = [torch.from_numpy(np.array(open_rgb(path))).permute(2, 0, 1) / 127.5 - 1 for path in shown]
            save_grid(out / "grid.png", [grid[i:i + 8] for i in range(0, len(grid), 8)])
            count = len(list(folder.glob("*.png")))
            progress.say(f"{'stopped; ' if status else ''}{count} images of {height}x{width}: {folder}, the first of "
                         f"them: {out / 'grid.png'}")
    return status


def fresh_folder(path):
    """`path`, or path-2, path-3, ...: the first that does not exist."""
    number, fresh = 1, path
    while fresh.exists():
        number += 1
        fresh = path.with_name(f"{path.name}-{number}")
    return fresh


# ------------------------------------------------------------------------------------------------------
# 8  Arguments
# ------------------------------------------------------------------------------------------------------

# What `sample_ldm.py train --vae CKPT` runs: under ten minutes on two CPU cores, which make and encode the images
# too. Noise levels are EDM's: its ln sigma has mean -1.2 at sigma_data = 0.5, that is -0.5 at 1.
QUICK_START = dict(
    model="quick", steps=2000, batch_size=8, noise_draws=16, noise_mean=-0.5, noise_std=1.2,
    lr=3e-3, beta1=0.9, beta2=0.99, lr_warmup=100, lr_decay_after=1000, ema=0.998, save_every=500, log_every=20)

# What --data runs. Unspecified: all of it ("we closely follow Rombach et al.", App. F). Noise levels are EDM2's for
# latents (Karras et al. 2024), ln sigma of mean -0.4 at sigma_data = 0.5.
DATA = dict(
    model="small", steps=30_000, batch_size=128, noise_draws=1, noise_mean=0.3, noise_std=1.0,
    lr=2e-4, beta1=0.9, beta2=0.99, lr_warmup=1000, lr_decay_after=0, ema=0.9999, save_every=2_000, log_every=50)


def build_parser():
    """The parser of both commands, and the Options of train."""
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    about = "Train a denoiser on the latents of an autoencoder, which the checkpoint then holds too."
    options = Options(commands.add_parser("train", help=about, description=about), QUICK_START, DATA)
    add_run_options(options, "runs/ldm", "updates of the denoiser", " (default: that of the autoencoder's training)")
    options.add("--compile", "torch.compile the denoiser: a slow start, then faster steps", action="store_true")

    options.group("latents")
    options.add("--vae", "the autoencoder: a checkpoint of train.py, whose averaged weights are taken, or a released "
                "Stable Diffusion autoencoder", metavar="CKPT")
    options.add("--cache-latents", "encode every image and its mirror image once, before training, into --out; without "
                "it images are encoded on the fly, with crops and flips", action="store_true")

    options.add("--clutter", "of the built-in images: 0 are a few large, smooth boxes and ellipses, 1 is what train.py "
                "learns from", type=float, default=0.0)

    options.group("diffusion")
    options.add("--model", "the denoiser: quick on a CPU, small for an hour on one GPU, ldm is the paper's",
                choices=list(PRESETS))
    options.add("--noise-draws", "examples made of each encoded image, each with noise of its own", type=int)
    options.add("--noise-mean", "mean of ln sigma in training, P_mean of EDM", type=float)
    options.add("--noise-std", "standard deviation of ln sigma in training, P_std of EDM", type=float)
    options.add("--class-cond", "learn the classes that the sub-folders of --data name", action="store_true")
    options.add("--class-dropout", "share of examples trained without their class, for guidance", type=float,
                default=0.1)
    add_optimiser_options(options)

    about = "Write images of a trained diffusion model: DIR/grid.png, and one PNG file an image into DIR/images, a " \
            "folder that `eval.py fid` reads."
    add = commands.add_parser("sample", help=about, description=about).add_argument
    add("--ldm", metavar="CKPT", required=True, help="checkpoint of sample_ldm.py train")
    add("-n", type=int, default=64, help="how many (default: 64)")
    add("--steps", type=int, default=18, help="noise levels; all but the last cost two evaluations (default: 18)")
    add("--seed", type=int, default=0, help="image i depends on it and on i, not on how many there are (default: 0)")
    add("--batch-size", type=int, metavar="B",
        help="images at a time: speed and memory, not results, rounding aside (default: 64, on a CPU 16)")
    add("--size", metavar="S|HxW", help="pixels, multiples of 8, for example 64x96 (default: that of training)")
    add("--out", metavar="DIR", type=Path, help="(default: samples beside the checkpoint, or samples-2, -3, ...)")
    add("--class", dest="classes", metavar="NAME", nargs="+", help="classes, in turn (default: all of them)")
    add("--guidance", type=float,
        help=f"classifier-free guidance, for a model with classes; 1 is none (default: {GUIDANCE})")
    add("--churn", type=float,
        help="S_churn of EDM's stochastic sampler, Algorithm 2, for example 40; 0 is Heun's, Algorithm 1 (default: 0)")
    add("--churn-range", type=float, nargs=2, metavar=("MIN", "MAX"),
        help="noise levels at which it acts, S_tmin and S_tmax (default: {} {})".format(*CHURN_RANGE))
    add("--churn-noise", type=float, help=f"S_noise (default: {CHURN_NOISE})")
    add("--raw-weights", action="store_true", help="the raw weights instead of the averaged ones")
    add("--device", help="cuda, cuda:1, mps, cpu (default: the best there is)")
    add("--precision", choices=["auto", "fp32", "bf16"], default="auto",
        help="bf16 runs the networks in bfloat16; auto does where the GPU is built for it (default: auto)")
    return parser, options


def complete_train(args, options):
    """Fill `args` up from the recipe or the checkpoint, and check them; returns the checkpoint to start from."""
    given, recipe, checkpoint = complete(args, options, "runs/ldm", load_ldm)
    if not args.resume:
        if not args.vae:
            raise UsageError("--vae is missing: give a checkpoint of train.py, for one runs/quickstart/checkpoint.pt")
        checkpoint = load_or_say(load_checkpoint, args.vae, "--vae")
        recipe["resolution"] = trained_at(checkpoint) or 256
    for key, value in {**recipe, **given}.items():
        setattr(args, key, value)
    check_run(args, checkpoint)
    if not args.resume:
        fits_resolution(checkpoint["config"], args.resolution, "--vae")
    at_least(1, args, "noise_draws")
    if not args.noise_std > 0:
        raise UsageError(f"--noise-std must be above 0, got {args.noise_std}")
    if not 0 <= args.class_dropout <= 1:
        raise UsageError(f"--class-dropout must be between 0 and 1, got {args.class_dropout}")
    at_least(0, args, "clutter")
    if args.class_cond and not args.data:
        raise UsageError("--class-cond takes its classes from the sub-folders of --data: give that too")
    if "class_dropout" in given and not args.class_cond:
        raise UsageError("--class-dropout is part of --class-cond: give that too, or neither")
    if "clutter" in given and args.data:
        raise UsageError("--clutter is for the built-in images, not for --data: leave one of them out")
    return checkpoint


def check_sample(args):
    for key, smallest in (("n", 1), ("steps", 1), ("seed", 0), ("batch_size", 1)):
        at_least(smallest, args, key)
    for key in ("churn", "churn_noise"):
        at_least(0, args, key)
    if not args.churn and (args.churn_range or args.churn_noise is not None):
        raise UsageError("--churn-range and --churn-noise shape --churn: give that too")
    if args.size:
        match = re.fullmatch(r"(\d+)(?:x(\d+))?", args.size)
        args.size = match and (int(match[1]), int(match[2] or match[1]))
        if not args.size or any(side < 8 or side % 8 for side in args.size):
            raise UsageError("--size must be a multiple of 8, or two like 64x96, height and width")


def main(argv=None):
    def work():
        parser, options = build_parser()
        args = parser.parse_args(argv)
        if args.command == "sample":
            check_sample(args)
            return sample(args)
        checkpoint = complete_train(args, options)
        machine = Machine(args.device, args.precision)
        task, dataset, start = prepare(args, machine, checkpoint)
        return fit(task, args, machine, dataset, start)
    return run_script("sample_ldm.py", work)


if __name__ == "__main__":
    sys.exit(main())
