"""Train a small latent diffusion model on LiteVAE's latents, and sample from it (Sec. 5, Tables 7 and 13, App. C).

    python sample_ldm.py train                                             built-in shapes, minutes on a CPU
    python sample_ldm.py sample --class star                               a grid and 64 PNG files
    python sample_ldm.py train --vae CKPT --data DIR --out runs/my-ldm     your images, on one GPU
    python sample_ldm.py train --resume --out runs/my-ldm                  resume a run, bit-exactly on a CPU
    torchrun --nproc_per_node=2 sample_ldm.py train ...                    train or sample on several GPUs

Training writes into --out checkpoint.pt, log.csv and samples-STEP.png. The checkpoint holds the autoencoder too, so
sampling needs that one file. From top to bottom:

    1  Diffusion     App. C, EDM     preconditioning, Denoiser, diffusion_loss
    2  Sampling      Eq. 4, EDM      sigma_schedule, heun_sampler, stochastic_sampler, guided
    3  The network   LDM             UNet, PRESETS
    4  The step                      DiffusionTask
    5  Latents       Sec. 1          encode, decode, CachedLatents
    6  Checkpoints                   save_ldm, build
    7  Sampling images               sample, draw
    8  Options                       the two recipes, build_parser, main

"EDM" is Karras et al. 2022, Elucidating the Design Space of Diffusion-Based Generative Models; "LDM" is Rombach
et al. 2022, whose UNet and training the paper takes (Sec. 5, App. F). The axes: B latents, nz channels,
h x w = H/8 x W/8 positions, C channels inside the network. sigma is the noise's standard deviation, (B,).
"""

import argparse
import functools
import math
import sys
from pathlib import Path

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
from PIL import Image
from torch.utils.data import DataLoader
from tqdm import tqdm

import train
from litevae import Config, LiteVAE, group_norm, load_checkpoint, load_weights, upsample, write_checkpoint

# --- 1  Diffusion (App. C, EDM Sec. 5 and Table 1) ----------------------------------------------------
# x_t = x + sigma(t) eps with eps ~ N(0, I), and EDM's choice sigma(t) = t: time is the noise level. The
# data x are latents times one number, config.scaling_factor, which gives them the standard deviation
# sigma_data = 1 over all channels: see encode and decode.
# Differs: the paper's diffusion models are trained as LDM's (App. F): on DDPM's 1000 discrete noise levels, to
# predict the noise. Here objective, noise levels and samplers are EDM's, in whose notation App. C introduces diffusion.


def preconditioning(sigma, sigma_data=1.0):
    """c_skip, c_out, c_in, c_noise of EDM's Table 1 (column "Ours"), each of sigma's shape.

    They give the network inputs and targets of unit variance at every noise level. As sigma -> 0 the
    denoiser becomes the identity (c_skip -> 1), as sigma -> inf it becomes c_out F.
    """
    total = sigma**2 + sigma_data**2
    return sigma_data**2 / total, sigma * sigma_data * total**-0.5, total**-0.5, sigma.log() / 4


class Denoiser(nn.Module):
    """D(x; sigma) = c_skip x + c_out F(c_in x; c_noise): the denoised x (EDM Eq. 7).

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
    """The mean of lambda(sigma) (D(x + sigma noise; sigma) - x)^2 over all elements, (): EDM's Eq. 2 and Table 1.

    lambda = 1 / c_out^2 makes it the mean squared error of the network F itself: before training, where F
    is zero, it is 1 at every noise level.
    """
    s = sigma.view(-1, *[1] * (x.ndim - 1))
    weight = (s**2 + 1) / s**2  # lambda(sigma) at sigma_data = 1
    return (weight * (denoiser(x + s * noise, sigma, label) - x).square()).mean()


# --- 2  Sampling (Eq. 4; EDM Algorithms 1 and 2) ------------------------------------------------------
# The score is grad log p_t(x) = (D(x; sigma) - x) / sigma^2. With it and sigma(t) = t, Eq. 4 with beta = 0 is
# the probability-flow ODE  dx/dsigma = (x - D(x; sigma)) / sigma,  which leads from noise to data.


def sigma_schedule(steps, sigma_min=0.004, sigma_max=160.0, rho=7.0):
    """`steps` noise levels from sigma_max to sigma_min, evenly spaced in sigma^(1/rho), then 0 (EDM Eq. 5)."""
    # EDM's 0.002 and 80 are for data of std 0.5. Relative to data of std 1, these are the same.
    top, bottom = sigma_max ** (1 / rho), sigma_min ** (1 / rho)
    return [(top + i / max(1, steps - 1) * (bottom - top)) ** rho for i in range(steps)] + [0.0]


def heun_sampler(denoise, x, sigmas):
    """Algorithm 1 of EDM: the probability-flow ODE by Heun's method, 2 * steps - 1 evaluations.

    denoise(x, sigma) is D. x, (B, ...), is noise of standard deviation sigmas[0]; `sigmas` falls to 0.
    """
    for sigma, sigma_next in zip(sigmas, sigmas[1:]):
        x = _heun_step(denoise, x, sigma, sigma_next)
    return x


def stochastic_sampler(denoise, x, sigmas, randn, churn=40.0, churn_min=0.1, churn_max=100.0, churn_noise=1.003):
    """Algorithm 2 of EDM: the SDE of Eq. 4. Before each Heun step new noise is added, and sigma raised to match.

    `churn` (S_churn) controls the Langevin term (beta in Eq. 4): new noise replaces old, which corrects
    errors of earlier steps. It acts where churn_min <= sigma <= churn_max (S_tmin, S_tmax);
    churn_noise (S_noise), slightly above 1, offsets the detail that denoisers remove. The defaults are EDM's for
    ImageNet (Table 5), at std 1 instead of 0.5. randn() gives noise of x's shape. With churn 0 it is heun_sampler.
    """
    for sigma, sigma_next in zip(sigmas, sigmas[1:]):
        # At most sqrt(2) - 1: no more new noise than is present.
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

    D_none + guidance (D_label - D_none): 1 is the conditional model, above 1 amplifies the
    label's effect. D_none is the model with the label of no class.
    """
    if label is None or guidance == 1.0:
        return lambda x, sigma: denoiser(x, sigma, label)
    none = torch.full_like(label, denoiser.net.config.classes)

    def denoise(x, sigma):
        with_label, without = denoiser(x.repeat(2, 1, 1, 1), sigma.repeat(2), torch.cat([label, none])).chunk(2)
        return without + guidance * (with_label - without)
    return denoise


# --- 3  The network (Sec. 5: "a UNet identical to the original model from Rombach et al.") ------------

# Unspecified: the sizes, but for "ldm". Parameters are counted without classes.
PRESETS = {
    # 720,828 parameters at nz=12: minutes on a CPU. Larger is no better in the same time: fewer examples seen.
    "quick": {"channels": 48, "ch_mult": (1, 1), "num_res_blocks": 1, "attention": (1,), "scale_shift": True},
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
    labels; the label `classes` means none. Residual branches and the output start at zero. To reuse it,
    copy this section and group_norm, GroupNorm, upsample, autocast_off and Config of litevae.py.
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
            if isinstance(layer, Upsample):
                x = layer(x, skips[-1].shape[-2:])
            else:
                x = layer(torch.cat([x, skips.pop()], dim=1), e)  # (B, C * ch_mult[level], h / 2^level, w / 2^level)
        return self.conv_out(F.silu(self.norm_out(x)))  # (B, nz, h, w)


def noise_embedding(c_noise, channels):
    """Cosines and sines of c_noise at `channels / 2` frequencies: (B,) -> (B, channels)."""
    # Differs: LDM embeds DDPM's step, 0 to 999, with frequencies from 1 down to 1e-4. c_noise = ln(sigma) / 4 spans
    # only 2.7 from sigma_min to sigma_max, and EDM embeds it as it is. Times 100, levels are told apart, and close
    # ones stay alike.
    half = channels // 2
    frequencies = torch.exp(-math.log(10_000) / half * torch.arange(half, device=c_noise.device))  # (channels / 2,)
    angle = 100 * c_noise.float()[:, None] * frequencies  # (B, channels / 2)
    return torch.cat([angle.cos(), angle.sin()], dim=1).to(c_noise.dtype)


class Block(nn.Module):
    """Residual block conditioned on the noise level, optionally followed by attention.

    (B, in, h, w), (B, E) -> (B, out, h, w)
    """

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
    """Residual self-attention over all positions: (B, C, h, w) -> (B, C, h, w). One head for each 32 channels."""

    def __init__(self, channels):
        super().__init__()
        self.heads = max(1, channels // 32)
        self.norm = group_norm(channels)
        self.qkv = nn.Conv2d(channels, 3 * channels, 1)
        self.proj_out = _zero(nn.Conv2d(channels, channels, 1))

    def forward(self, x):
        B, C, h, w = x.shape
        qkv = self.qkv(self.norm(x)).reshape(B, 3, self.heads, C // self.heads, h * w)
        # Contiguous: with other strides CUDA takes the kernel that stores the (hw, hw) matrix.
        q, k, v = qkv.transpose(-1, -2).contiguous().unbind(1)  # (B, heads, hw, C / heads) each
        y = F.scaled_dot_product_attention(q, k, v)
        return x + self.proj_out(y.transpose(-1, -2).reshape(B, C, h, w))


class Downsample(nn.Conv2d):
    """Stride-2 convolution: (B, C, h, w) -> (B, C, ceil(h / 2), ceil(w / 2))."""

    def __init__(self, channels):
        super().__init__(channels, channels, 3, stride=2, padding=1)

    def forward(self, x, e):
        return super().forward(x)


class Upsample(nn.Conv2d):
    """Nearest-neighbour upsampling to `size`, which may be odd, and a convolution: (B, C, h, w) -> (B, C, *size)."""

    def __init__(self, channels):
        super().__init__(channels, channels, 3, padding=1)

    def forward(self, x, size):
        return super().forward(upsample(x, size))


def _zero(conv):
    nn.init.zeros_(conv.weight)
    nn.init.zeros_(conv.bias)
    return conv


# --- 4  The step --------------------------------------------------------------------------------------


class DiffusionTask:
    """The denoiser in the latent space of a frozen autoencoder, and one update of it: what `train.fit` runs."""

    shown = ["loss"]

    def __init__(self, args, machine, denoiser, vae, held_out, classes=()):
        self.args, self.machine, self.held_out, self.skipped = args, machine, held_out, 0
        self.title = f"the {args.model} denoiser" + (f" of {len(classes)} classes" if classes else "")
        self.classes = list(classes)
        self.vae = vae.to(machine.device).eval().requires_grad_(False)
        self.denoiser = denoiser.to(machine.device).train()
        self.ema = train.EMA(self.denoiser, args.ema)
        self.optimizer = torch.optim.Adam(self.denoiser.parameters(), args.lr, (args.beta1, args.beta2), fused=True)
        if args.compile:
            self.denoiser.net.compile()
        self.parallel = machine.parallel(self.denoiser)

    def step(self, batch, step, log):
        """One update on a batch of images or cached posteriors. Returns what is logged, and if it was finite."""
        args, machine = self.args, self.machine
        items, label = batch
        lr = train.learning_rate(step, args)

        # Encoding on the fly is what a light encoder buys: every epoch sees other crops.
        if args.cache_latents:
            mean, std = items.to(machine.device, non_blocking=True).float().unbind(1)  # (B, nz, h, w) each
        else:
            with machine.autocast():
                mean, std = encode(self.vae, machine.images(items))

        x = mean + std * machine.randn(mean.shape)
        label = self.drop(label.to(machine.device, non_blocking=True)) if self.classes else None
        sigma = noise_levels(machine.randn((len(x),)), args.noise_mean, args.noise_std)
        with machine.autocast():
            loss = diffusion_loss(self.parallel, x, sigma, machine.randn(x.shape), label)
        grad_norm = train.backward(loss, self.denoiser, self.optimizer, args.clip)
        [finite] = train.update([self.optimizer], [grad_norm], lr)
        if finite:
            self.ema.update(self.denoiser)
        return {"loss": loss, "grad_norm": grad_norm, "lr": lr}, finite

    def drop(self, label):
        """Labels, a share of which (--class-dropout) becomes the label for none, for classifier-free guidance."""
        uniform = torch.special.ndtr(self.machine.randn(label.shape))  # the machine's one noise is normal
        return label.masked_fill(uniform < self.args.class_dropout, len(self.classes))

    @torch.no_grad()
    def report(self, step):
        """The EMA weights' loss on held-out images, at noise levels and noise that never change, and samples."""
        args, losses, count, side = self.args, [], len(self.held_out), self.args.resolution // 8
        # One level for each image, at evenly spaced quantiles of the levels that are trained.
        normal = torch.special.ndtri((torch.arange(count) + 0.5) / count)
        sigmas = noise_levels(normal, args.noise_mean, args.noise_std).split(args.batch_size)
        noise = ImageNoise(0, range(count))((self.vae.config.latent_dim, side, side)).split(args.batch_size)
        for (image, label), sigma, eps in zip(DataLoader(self.held_out, args.batch_size), sigmas, noise):
            label = label.to(self.machine.device) if self.classes else None
            with self.machine.autocast():
                x, _ = encode(self.vae, self.machine.images(image))  # (B, nz, h, w)
                loss = diffusion_loss(self.ema.model, x, sigma.to(x), eps.to(x), label)
            losses.append(len(x) * loss)
        label = class_labels(range(16), self.classes, None, self.machine)
        images = draw(self.ema.model, self.vae, self.machine, ImageNoise(0, range(16)), side, label)
        train.save_grid(Path(args.out, f"samples-{step:06}.png"), [images[:8], images[8:]])
        return {"val_loss": (sum(losses) / count).item()}

    def save(self, step):
        training = {"optimizer": self.optimizer.state_dict()["state"], "ema_updates": self.ema.updates,
                    "skipped": self.skipped}
        save_ldm(Path(self.args.out, "checkpoint.pt"), self.denoiser, self.ema.model, self.vae, self.classes,
                 self.args.resolution, step=step, training=training, args=vars(self.args))

    def resume(self, checkpoint):
        """Restore everything `save` wrote; returns its step."""
        training = checkpoint["training"]
        self.denoiser.load_state_dict(checkpoint["model"])
        self.ema.model.load_state_dict(checkpoint["ema"])
        self.ema.updates, self.skipped = training["ema_updates"], training["skipped"]
        train.load_optimizer(self.optimizer, training["optimizer"])
        return checkpoint["step"]


def prepare(args, machine, checkpoint):
    """The task, its data set and the step to start from."""
    classes, label = [], None
    if args.class_cond:
        classes = checkpoint["classes"] if args.resume else find_classes(args.data)
        label = lambda file, root: classes.index(class_of(file, root, classes))  # noqa: E731
    torch.manual_seed(args.seed)
    dataset, held_out = train.open_images(args, train.Shapes, label)
    if args.resume:
        denoiser, vae = build(checkpoint)
    else:
        vae = LiteVAE.from_checkpoint(checkpoint)
        train.check_resolution(vae, args.resolution)
        denoiser = Denoiser(UNet(vae.config.latent_dim, **PRESETS[args.model], classes=len(classes)))
    task = DiffusionTask(args, machine, denoiser, vae, held_out, classes)
    if args.cache_latents:
        dataset = CachedLatents(dataset, vae, args, machine)
    return task, dataset, task.resume(checkpoint) if args.resume else 0


def find_classes(folder):
    """The classes: the kinds of built-in shapes, or the sub-folders of --data. UsageError if there are not several."""
    if not folder:
        return list(train.SHAPES)
    classes = sorted({class_of(file, folder) for file in train.find_images(folder)})
    if len(classes) < 2:
        raise train.UsageError(f"--class-cond takes the sub-folders of --data for classes: {folder} needs two or more")
    return classes


def class_of(file, root, classes=None):
    """The first folder on the way from `root` to an image. UsageError if there is none, or if it is no class."""
    first, *below = Path(file).relative_to(root).parts
    if not below or (classes and first not in classes):
        raise train.UsageError(f"{file} is in no folder that could be its class: --class-cond takes the sub-folders of "
                               "--data, two or more")
    return first


# --- 5  Latents ---------------------------------------------------------------------------------------
# One number for all channels, as in Stable Diffusion: a channel that varies little means little to the image, and
# with a scale of its own it would mean as much as the others.


@torch.no_grad()
def encode(vae, image):
    """(B, 3, H, W) in [-1, 1] -> mean and std of the posterior as diffusion sees them: (B, nz, h, w) each."""
    latent_dist = vae.encode(image).latent_dist
    return latent_dist.mean * vae.config.scaling_factor, latent_dist.std * vae.config.scaling_factor


@torch.no_grad()
def decode(vae, x):
    """What diffusion makes, (B, nz, h, w) -> images, (B, 3, 8h, 8w), about [-1, 1]."""
    return vae.decode(x / vae.config.scaling_factor).sample.float()


BUILT_IN_CACHE = 2048  # how many of the endless built-in images --cache-latents takes


class CachedLatents:
    """Posteriors of a fixed set of images, encoded once: position -> ((2, nz, h, w) float16, label), mean and std.

    This is the usual way around a heavy encoder (Sec. 1). Random crops are lost. The quick start takes it because its
    denoiser costs less than even a light encoder. Flips are kept: each image is encoded twice, for the latent of a
    flipped image is not the flipped latent. The set is shuffled anew each epoch.
    """

    def __init__(self, images, vae, args, machine):
        count, self.seed = BUILT_IN_CACHE, args.seed
        if args.data:
            images = train.ImageFolder(images.files, args.resolution, augment=False, labels=images.labels)
            count = len(images)
        loader = DataLoader(images, args.batch_size, sampler=range(count), num_workers=machine.workers(args.workers),
                            worker_init_fn=train.ignore_signals)
        moments, labels = [], []
        for image, label in tqdm(loader, "encoding", disable=machine.rank > 0, leave=False):
            image = machine.images(image)
            with machine.autocast():
                views = [torch.stack(encode(vae, view), dim=1) for view in (image, image.flip(-1))]
            moments.append(torch.stack(views, dim=1).half().cpu())
            labels.append(label)
        self.moments, self.labels = torch.cat(moments), torch.cat(labels)  # (N, 2 flips, 2, nz, h, w), (N,)

    def __len__(self):
        return len(self.moments)

    def __getitem__(self, position):
        epoch, index = divmod(position, len(self))
        index = train.permutation(len(self), self.seed, epoch)[index]
        flip = np.random.default_rng((self.seed, 1, position)).integers(2)
        return self.moments[index, flip].clone(), int(self.labels[index])


# --- 6  Checkpoints -----------------------------------------------------------------------------------
# The diffusion checkpoint holds the autoencoder itself, not its path: latents mean something to that autoencoder
# alone, and files get moved, trained on and deleted. It adds 0.2 GB with Stable Diffusion's decoder, where the state of
# the "ldm" network and its optimiser is 4.4 GB.
LDM_FORMAT = "litevae-ldm-3"


def save_ldm(path, denoiser, ema, vae, classes, resolution, **extra):
    """Write a Denoiser, the same with the EMA weights, its autoencoder and `extra` to `path`."""
    write_checkpoint(path, {
        "format": LDM_FORMAT, "config": dict(denoiser.net.config), "model": dict(denoiser.state_dict()),
        "ema": dict(ema.state_dict()), "classes": classes, "resolution": resolution,
        "vae": {"config": dict(vae.config), "model": dict(vae.state_dict())}, **extra})


def build(checkpoint):
    """The Denoiser, with the EMA weights, and the autoencoder of a checkpoint. CheckpointError."""
    denoiser = load_weights(lambda: Denoiser(UNet(**checkpoint["config"])), checkpoint["ema"])
    return denoiser, LiteVAE.from_checkpoint(checkpoint["vae"])


# --- 7  Sampling images -------------------------------------------------------------------------------

# Unspecified. Of 256 samples of the quick start, 98 % show the class that was asked for; 94 % without new noise.
STEPS, GUIDANCE, CHURN = 36, 2.0, 20.0


def sample(args):
    """Write images in batches, each from noise of its own, so that the batch size changes nothing."""
    checkpoint = load_checkpoint(args.ldm, LDM_FORMAT)
    classes = checkpoint["classes"]
    for name in args.classes or []:
        if name not in classes:
            raise train.UsageError(f"--class {name} is unknown: " + (
                f"the classes are {', '.join(classes)}" if classes else "this model was trained without classes"))
    denoiser, vae = build(checkpoint)
    side = checkpoint["resolution"]
    machine = train.Machine(args.device, args.precision)
    for module in (denoiser, vae):
        module.to(machine.device).eval().requires_grad_(False)
    # On a CPU larger batches are slower: the decoder's feature maps do not fit the cache.
    batch_size = args.batch_size or (8 if machine.device.type == "cpu" else 64)

    out = args.out or Path(args.ldm).with_name("samples")
    folder = out / "images"
    if folder.exists() and any(folder.iterdir()):
        raise train.UsageError(f"{folder} already holds images: choose another --out")
    machine.wait()  # before the first of them makes the folder
    folder.mkdir(parents=True, exist_ok=True)
    mine = range(machine.rank, args.n, machine.world)
    with train.progress_bar(len(mine), disable=machine.rank > 0) as bar:
        for first in range(0, len(mine), batch_size):
            numbers = mine[first:first + batch_size]
            label = class_labels(numbers, classes, args.classes, machine)
            images = draw(denoiser, vae, machine, ImageNoise(args.seed, numbers), side // 8, label, args.steps,
                          args.guidance, args.churn)
            if not images.isfinite().all():
                raise train.UsageError("the samples are not finite: try --precision fp32, or an earlier checkpoint")
            for number, image in zip(numbers, images):
                pixels = (train.to_pixels(image) * 255).round().byte().permute(1, 2, 0)  # (H, W, 3)
                Image.fromarray(pixels.numpy()).save(folder / f"{number:06}.png")
            bar.update(len(numbers))
    machine.wait()
    if machine.rank == 0:
        files = sorted(folder.glob("*.png"))[:64]
        shown = [train.as_tensor(np.asarray(train.open_rgb(path))) / 127.5 - 1 for path in files]
        train.save_grid(out / "grid.png", [shown[i:i + 8] for i in range(0, len(shown), 8)])
        print(f"{args.n} images of {side}x{side}: {folder}, the first of them: {out / 'grid.png'}")
    return 0


@torch.no_grad()
def draw(denoiser, vae, machine, noise, side, label=None, steps=STEPS, guidance=GUIDANCE, churn=CHURN):
    """Images, (B, 3, 8 side, 8 side), about [-1, 1], on the CPU, from an ImageNoise."""
    shape = (denoiser.net.config.latent_dim, side, side)
    randn = lambda: noise(shape).to(machine.device)  # noqa: E731
    sigmas, denoise = sigma_schedule(steps), guided(denoiser, label, guidance)
    with machine.autocast():
        x = sigmas[0] * randn()  # (B, nz, side, side)
        x = stochastic_sampler(denoise, x, sigmas, randn, churn) if churn else heun_sampler(denoise, x, sigmas)
        return decode(vae, x).cpu()


class ImageNoise:
    """Standard normal noise for numbered images: what an image gets depends on seed, number and turn alone."""

    def __init__(self, seed, numbers):
        seeds = [int(np.random.SeedSequence((seed, i)).generate_state(1, np.uint64)[0]) for i in numbers]
        self.generators = [torch.Generator().manual_seed(s) for s in seeds]

    def __call__(self, shape):
        """(number of images, *shape): the next noise of each."""
        return torch.stack([torch.randn(shape, generator=g) for g in self.generators])


def class_labels(numbers, classes, names, machine):
    """One label per image, cycling through `names` (all classes if None): (B,), or None without classes."""
    if not classes:
        return None
    turn = [classes.index(name) for name in names or classes]
    return torch.tensor([turn[i % len(turn)] for i in numbers], device=machine.device)


# --- 8  Options ---------------------------------------------------------------------------------------

# What both recipes share.
COMMON = dict(
    data=None, val=None, vae=str(train.TRAINED), resume=False, seed=0, workers=None, device=None, precision="auto",
    compile=False, clip=1.0, resolution=None, class_dropout=0.1)

# What `sample_ldm.py train` runs: minutes on two slow CPU cores, one of which goes into encoding the images. Batches of
# many images matter: several noises for each of a few images teach far less. Noise levels are EDM's: its ln sigma has
# mean -1.2 at sigma_data = 0.5, that is -0.5 at 1.
QUICK_START = dict(
    COMMON, model="quick", class_cond=True, cache_latents=True, steps=2000, batch_size=64, noise_mean=-0.5,
    noise_std=1.2, lr=4e-3, beta1=0.9, beta2=0.99, lr_warmup=100, lr_decay=0.5, ema=0.998, save_every=500, log_every=20)

# What --data runs. Differs: App. F follows LDM (on FFHQ 635,000 steps of 42 images at 8.4e-5), with DDPM's noise
# levels. Noise levels are EDM2's for latents (Karras et al. 2024), ln sigma of mean -0.4 at sigma_data = 0.5.
DATA = dict(
    COMMON, model="small", class_cond=False, cache_latents=False, steps=30_000, batch_size=128, noise_mean=0.3,
    noise_std=1.0, lr=2e-4, beta1=0.9, beta2=0.99, lr_warmup=1000, lr_decay=0.0, ema=0.9999, save_every=2_000,
    log_every=50)


def build_parser():
    parser = train.Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    about = "Train a denoiser on the latents of an autoencoder, which the checkpoint then holds too."
    group = functools.partial(train.option_group, commands.add_parser("train", help=about, description=about),
                              quick=QUICK_START, data=DATA)
    train.add_training_options(group)
    add = group("latents")
    add("--vae", type=train.filename, help="the autoencoder: a checkpoint of train.py, whose EMA weights are "
        "taken, or a released Stable Diffusion autoencoder; it also gives the default of --resolution (default: the "
        "LiteVAE-S of this repository)")
    add("--cache-latents", action=train.SWITCH, help="encode every image and its mirror image once, before training; "
        "else images are encoded on the fly, with random crops and flips")
    add = group("diffusion")
    add("--model", choices=list(PRESETS), help="the denoiser: quick on a CPU, small for an hour on one GPU, ldm is the "
        "paper's")
    add("--noise-mean", type=train.number, help="mean of ln sigma in training, P_mean of EDM")
    add("--noise-std", type=train.positive, help="std of ln sigma in training, P_std of EDM")
    add("--class-cond", action=train.SWITCH, help="learn classes: the kinds of built-in shapes, or the sub-folders of "
        "--data")
    add("--class-dropout", type=train.fraction, help="share of examples trained without their class, for guidance")

    about = "Write images of a trained diffusion model: DIR/grid.png, and one PNG file an image into DIR/images, a " \
            "folder that `eval.py fid` reads."
    add = commands.add_parser("sample", help=about, description=about).add_argument
    add("--ldm", metavar="CKPT", default="runs/ldm/checkpoint.pt", help="checkpoint (default: runs/ldm/checkpoint.pt)")
    add("-n", type=train.positive_int, default=64, help="number of images (default: 64)")
    add("--steps", type=train.positive_int, default=STEPS, help=f"noise levels of the sampler (default: {STEPS})")
    add("--seed", type=train.seed, default=0, help="image i depends on the seed and on i alone (default: 0)")
    add("--batch-size", type=train.positive_int, help="images at a time (default: 64, on a CPU 8)")
    add("--out", metavar="DIR", type=Path, help="folder for the images (default: samples, beside the checkpoint)")
    add("--class", dest="classes", metavar="NAME", nargs="+", help="classes to sample, in turn (default: all)")
    add("--guidance", type=train.number, default=GUIDANCE, help="strength of classifier-free guidance, of models with "
        f"classes; 1 is without (default: {GUIDANCE:g})")
    add("--churn", type=train.non_negative, default=CHURN, help="S_churn of EDM's stochastic sampler, Algorithm 2; "
        f"0 is Heun's method, Algorithm 1 (default: {CHURN:g})")
    add("--device", help="cuda, cuda:1, mps, cpu (default: the best there is)")
    add("--precision", choices=["auto", "fp32", "bf16"], default="auto",
        help="of the networks; auto is bf16 where it is fast (default: auto)")
    return parser


def merge(typed):
    """The options of `train` as a namespace, and the checkpoint of --resume or of --vae."""
    typed.setdefault("out", "runs/ldm")
    options, checkpoint = train.merge(typed, DATA if "data" in typed else QUICK_START, LDM_FORMAT)
    if not checkpoint:
        checkpoint = load_checkpoint(options["vae"])
        options["resolution"] = options["resolution"] or checkpoint.get("args", {}).get("resolution", 256)
    return argparse.Namespace(**options), checkpoint


def main(argv=None):
    args = build_parser().parse_args(argv)
    if args.command == "sample":
        return sample(args)
    args, checkpoint = merge(vars(args))
    machine = train.Machine(args.device, args.precision)
    return train.fit(*prepare(args, machine, checkpoint))


if __name__ == "__main__":
    sys.exit(train.run_script(main))
