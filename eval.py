"""Measure LiteVAE: every number of the paper, each with its definition in code.

    python eval.py recon --vae CKPT [--data DIR]         PSNR, SSIM, LPIPS, rFID and a picture       Table 1
    python eval.py fid A B                               FID between folders or saved statistics     Table 7
    python eval.py scale --vae CKPT [CKPT ...]           all metrics at resolutions 32 to 512        Figs. 5 and 8
    python eval.py mmd --vae CKPT                        latents against a standard Gaussian         Table 6
    python eval.py cost                                  encoders against Stable Diffusion's         Table 3
    python eval.py latents --vae CKPT [IMAGE ...]        latents as pictures                         Figs. 2 and 4
    python eval.py features --vae CKPT [IMAGE ...]       decoder feature maps                        Fig. 3

Each has its own --help. Without images of yours they take the built-in ones of train.py. Ctrl-C stops any of
them. From top to bottom:

    1  Reconstruction          ssim (PSNR: train.py, LPIPS: litevae.py)
    2  FID                     InceptionV3, FeatureStatistics, frechet_distance
    3  MMD                     mmd2
    4  Cost                    count_macs, peak_memory, throughput
    5  Images and weights      what is read, and how
    6  Commands                one function each
    7  Arguments
"""

import argparse
import csv
import hashlib
import json
import os
import statistics
import sys
import time
from pathlib import Path

import numpy as np
import scipy.linalg
import torch
import torch.nn as nn
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageFont
from torch.utils.data import DataLoader
from torch.utils.flop_counter import FlopCounterMode

from litevae import LPIPS, PRESETS, LiteVAE, LiteVAEEncoder, SDVAEEncoder, gaussian_blur, load_checkpoint
from train import (BuiltInImages, Machine, Parser, Progress, UsageError, find_images, fits_resolution, ignore_signals,
                   load_image, load_or_say, open_rgb, psnr, rebuilt, save_grid, to_pixels, trained_at)

# ------------------------------------------------------------------------------------------------------
# 1  Reconstruction (Table 1)
# ------------------------------------------------------------------------------------------------------
# PSNR, SSIM and LPIPS are computed for each image, then averaged over images. All judge what to_pixels
# makes of an output: clamped, not rounded.


def ssim(x_hat, x):
    """Structural similarity of each image (Wang et al. 2004): two (B, 3, H, W) in [-1, 1] -> (B,).

    11x11 Gaussian window of sigma 1.5, over the positions where it fits into the image; averaged over
    positions and over the three colours. H and W at least 11.
    """
    dtype = torch.float32 if x.device.type == "mps" else torch.float64  # variances are small differences
    a, b = to_pixels(x_hat).to(dtype), to_pixels(x).to(dtype)  # (B, 3, H, W) in [0, 1]
    window = lambda t: gaussian_blur(t, 11, 1.5)[..., 5:-5, 5:-5]  # noqa: E731  the local mean
    mean_a, mean_b = window(a), window(b)
    var_a, var_b = window(a * a) - mean_a**2, window(b * b) - mean_b**2
    covariance = window(a * b) - mean_a * mean_b
    c1, c2 = 0.01**2, 0.03**2
    similarity = ((2 * mean_a * mean_b + c1) * (2 * covariance + c2)
                  / ((mean_a**2 + mean_b**2 + c1) * (var_a + var_b + c2)))  # (B, 3, H-10, W-10)
    return similarity.mean(dim=(1, 2, 3)).float()


# ------------------------------------------------------------------------------------------------------
# 2  FID (Heusel et al. 2017)
# ------------------------------------------------------------------------------------------------------
# FID compares the mean and covariance of 2048 features of an Inception network over two sets of images. It
# is only comparable between programs that use the same weights and the same resize: those of the original
# TensorFlow code, which pytorch-fid ported. Names below are torchvision's, so that its file loads strictly.

INCEPTION_FILE = "pt_inception-2015-12-05-6726825d.pth"
INCEPTION_URL = f"https://github.com/mseitzer/pytorch-fid/releases/download/fid_weights/{INCEPTION_FILE}"


class BasicConv2d(nn.Module):
    """Convolution, BatchNorm, ReLU."""

    def __init__(self, in_channels, out_channels, kernel_size, stride=1, padding=0):
        super().__init__()
        self.conv = nn.Conv2d(in_channels, out_channels, kernel_size, stride, padding, bias=False)
        self.bn = nn.BatchNorm2d(out_channels, eps=0.001)

    def forward(self, x):
        return F.relu(self.bn(self.conv(x)), inplace=True)


def average_pool(x):
    # TensorFlow's average leaves the padding out of the count; torchvision's Inception counts it in.
    return F.avg_pool2d(x, 3, stride=1, padding=1, count_include_pad=False)


class InceptionA(nn.Module):
    """(B, C, 35, 35) -> (B, 224 + pool_features, 35, 35)."""

    def __init__(self, C, pool_features):
        super().__init__()
        self.branch1x1 = BasicConv2d(C, 64, 1)
        self.branch5x5_1 = BasicConv2d(C, 48, 1)
        self.branch5x5_2 = BasicConv2d(48, 64, 5, padding=2)
        self.branch3x3dbl_1 = BasicConv2d(C, 64, 1)
        self.branch3x3dbl_2 = BasicConv2d(64, 96, 3, padding=1)
        self.branch3x3dbl_3 = BasicConv2d(96, 96, 3, padding=1)
        self.branch_pool = BasicConv2d(C, pool_features, 1)

    def forward(self, x):
        return torch.cat([self.branch1x1(x),
                          self.branch5x5_2(self.branch5x5_1(x)),
                          self.branch3x3dbl_3(self.branch3x3dbl_2(self.branch3x3dbl_1(x))),
                          self.branch_pool(average_pool(x))], dim=1)


class InceptionB(nn.Module):
    """(B, C, 35, 35) -> (B, C + 480, 17, 17)."""

    def __init__(self, C):
        super().__init__()
        self.branch3x3 = BasicConv2d(C, 384, 3, stride=2)
        self.branch3x3dbl_1 = BasicConv2d(C, 64, 1)
        self.branch3x3dbl_2 = BasicConv2d(64, 96, 3, padding=1)
        self.branch3x3dbl_3 = BasicConv2d(96, 96, 3, stride=2)

    def forward(self, x):
        return torch.cat([self.branch3x3(x),
                          self.branch3x3dbl_3(self.branch3x3dbl_2(self.branch3x3dbl_1(x))),
                          F.max_pool2d(x, 3, stride=2)], dim=1)


class InceptionC(nn.Module):
    """(B, C, 17, 17) -> (B, 768, 17, 17), 7x7 convolutions split into 1x7 and 7x1."""

    def __init__(self, C, width):
        super().__init__()
        row, column = {"kernel_size": (1, 7), "padding": (0, 3)}, {"kernel_size": (7, 1), "padding": (3, 0)}
        self.branch1x1 = BasicConv2d(C, 192, 1)
        self.branch7x7_1 = BasicConv2d(C, width, 1)
        self.branch7x7_2 = BasicConv2d(width, width, **row)
        self.branch7x7_3 = BasicConv2d(width, 192, **column)
        self.branch7x7dbl_1 = BasicConv2d(C, width, 1)
        self.branch7x7dbl_2 = BasicConv2d(width, width, **column)
        self.branch7x7dbl_3 = BasicConv2d(width, width, **row)
        self.branch7x7dbl_4 = BasicConv2d(width, width, **column)
        self.branch7x7dbl_5 = BasicConv2d(width, 192, **row)
        self.branch_pool = BasicConv2d(C, 192, 1)

    def forward(self, x):
        double = self.branch7x7dbl_3(self.branch7x7dbl_2(self.branch7x7dbl_1(x)))
        return torch.cat([self.branch1x1(x),
                          self.branch7x7_3(self.branch7x7_2(self.branch7x7_1(x))),
                          self.branch7x7dbl_5(self.branch7x7dbl_4(double)),
                          self.branch_pool(average_pool(x))], dim=1)


class InceptionD(nn.Module):
    """(B, C, 17, 17) -> (B, C + 512, 8, 8)."""

    def __init__(self, C):
        super().__init__()
        self.branch3x3_1 = BasicConv2d(C, 192, 1)
        self.branch3x3_2 = BasicConv2d(192, 320, 3, stride=2)
        self.branch7x7x3_1 = BasicConv2d(C, 192, 1)
        self.branch7x7x3_2 = BasicConv2d(192, 192, (1, 7), padding=(0, 3))
        self.branch7x7x3_3 = BasicConv2d(192, 192, (7, 1), padding=(3, 0))
        self.branch7x7x3_4 = BasicConv2d(192, 192, 3, stride=2)

    def forward(self, x):
        return torch.cat([self.branch3x3_2(self.branch3x3_1(x)),
                          self.branch7x7x3_4(self.branch7x7x3_3(self.branch7x7x3_2(self.branch7x7x3_1(x)))),
                          F.max_pool2d(x, 3, stride=2)], dim=1)


class InceptionE(nn.Module):
    """(B, C, 8, 8) -> (B, 2048, 8, 8), 3x3 convolutions split into 1x3 beside 3x1."""

    def __init__(self, C, pool):
        super().__init__()
        row, column = {"kernel_size": (1, 3), "padding": (0, 1)}, {"kernel_size": (3, 1), "padding": (1, 0)}
        self.branch1x1 = BasicConv2d(C, 320, 1)
        self.branch3x3_1 = BasicConv2d(C, 384, 1)
        self.branch3x3_2a = BasicConv2d(384, 384, **row)
        self.branch3x3_2b = BasicConv2d(384, 384, **column)
        self.branch3x3dbl_1 = BasicConv2d(C, 448, 1)
        self.branch3x3dbl_2 = BasicConv2d(448, 384, 3, padding=1)
        self.branch3x3dbl_3a = BasicConv2d(384, 384, **row)
        self.branch3x3dbl_3b = BasicConv2d(384, 384, **column)
        self.branch_pool = BasicConv2d(C, 192, 1)
        self.pool = pool

    def forward(self, x):
        single, double = self.branch3x3_1(x), self.branch3x3dbl_2(self.branch3x3dbl_1(x))
        return torch.cat([self.branch1x1(x),
                          self.branch3x3_2a(single), self.branch3x3_2b(single),
                          self.branch3x3dbl_3a(double), self.branch3x3dbl_3b(double),
                          self.branch_pool(self.pool(x))], dim=1)


class InceptionV3(nn.Module):
    """The Inception network of FID: (B, 3, H, W) in [0, 1], any size -> (B, 2048) features."""

    def __init__(self):
        super().__init__()
        self.Conv2d_1a_3x3 = BasicConv2d(3, 32, 3, stride=2)
        self.Conv2d_2a_3x3 = BasicConv2d(32, 32, 3)
        self.Conv2d_2b_3x3 = BasicConv2d(32, 64, 3, padding=1)
        self.Conv2d_3b_1x1 = BasicConv2d(64, 80, 1)
        self.Conv2d_4a_3x3 = BasicConv2d(80, 192, 3)
        self.Mixed_5b = InceptionA(192, 32)
        self.Mixed_5c = InceptionA(256, 64)
        self.Mixed_5d = InceptionA(288, 64)
        self.Mixed_6a = InceptionB(288)
        self.Mixed_6b = InceptionC(768, 128)
        self.Mixed_6c = InceptionC(768, 160)
        self.Mixed_6d = InceptionC(768, 160)
        self.Mixed_6e = InceptionC(768, 192)
        self.Mixed_7a = InceptionD(768)
        self.Mixed_7b = InceptionE(1280, average_pool)
        # The last block of TensorFlow's network pools by maximum, by a slip that its weights have learned.
        self.Mixed_7c = InceptionE(2048, lambda x: F.max_pool2d(x, 3, stride=1, padding=1))
        self.fc = nn.Linear(2048, 1008)  # in the file, not in FID

    def forward(self, x):
        x = 2 * inception_resize(x) - 1  # (B, 3, 299, 299) in [-1, 1]
        x = self.Conv2d_2b_3x3(self.Conv2d_2a_3x3(self.Conv2d_1a_3x3(x)))  # (B, 64, 147, 147)
        x = F.max_pool2d(x, 3, stride=2)
        x = self.Conv2d_4a_3x3(self.Conv2d_3b_1x1(x))  # (B, 192, 71, 71)
        x = F.max_pool2d(x, 3, stride=2)
        x = self.Mixed_5d(self.Mixed_5c(self.Mixed_5b(x)))  # (B, 288, 35, 35)
        x = self.Mixed_6e(self.Mixed_6d(self.Mixed_6c(self.Mixed_6b(self.Mixed_6a(x)))))  # (B, 768, 17, 17)
        x = self.Mixed_7c(self.Mixed_7b(self.Mixed_7a(x)))  # (B, 2048, 8, 8)
        return x.mean(dim=(2, 3))  # (B, 2048)


def inception_resize(x):
    """To 299x299 by pytorch-fid's bilinear resize, which does not smooth first; the identity at 299x299."""
    return F.interpolate(x, size=(299, 299), mode="bilinear", align_corners=False)


def load_inception(source=None):
    """InceptionV3 in eval mode; its `.label` says whose features it computes.

    source  None: the published file, from torch's hub cache or else downloaded. A path: that file. "random":
            random weights, whose distances say nothing about quality and compare with no other number.
    UsageError, in one sentence, if there are no weights.
    """
    net = InceptionV3()
    if source == "random":
        generator = torch.Generator().manual_seed(0)
        for module in net.modules():
            if isinstance(module, nn.Conv2d):  # He's scale, or the features would fade away
                nn.init.kaiming_normal_(module.weight, nonlinearity="relu", generator=generator)
        net.label = "random features"
    else:
        path = Path(source or Path(torch.hub.get_dir()) / "checkpoints" / INCEPTION_FILE)
        try:
            if source is None and not path.exists():
                path.parent.mkdir(parents=True, exist_ok=True)
                torch.hub.download_url_to_file(INCEPTION_URL, str(path), hash_prefix="6726825d")
            net.load_state_dict(torch.load(path, map_location="cpu", weights_only=True), strict=True)
            published = hashlib.sha256(path.read_bytes()).hexdigest().startswith("6726825d")
        except Exception as error:
            why = (str(error).strip().splitlines() or [type(error).__name__])[0]
            raise UsageError(f"FID needs the Inception weights {INCEPTION_URL}: put the file at {path}, or name it "
                             f"with --inception FILE (loading it failed with: {why})") from None
        net.label = "published weights" if published else f"{path.name}, not the published weights"
    return net.requires_grad_(False).eval()


class FeatureStatistics:
    """Mean and covariance of feature vectors, in float64, in one pass: no feature is kept.

    Chan et al.'s update, which merges batches of any size exactly and, unlike a sum of squares, does not
    cancel where the mean is large.
    """

    def __init__(self, dim=2048):
        self.n, self.mean, self.scatter = 0, np.zeros(dim), np.zeros((dim, dim))

    def update(self, features):
        """(B, dim)"""
        x = features.cpu().double().numpy()
        mean = x.mean(axis=0)
        centred, delta = x - mean, mean - self.mean
        total = self.n + len(x)
        self.scatter += centred.T @ centred + np.outer(delta, delta * (self.n * len(x) / total))
        self.mean += delta * (len(x) / total)
        self.n = total

    @property
    def covariance(self):
        """(dim, dim), divided by n - 1 as in numpy.cov."""
        return self.scatter / max(1, self.n - 1)


def frechet_distance(mean1, cov1, mean2, cov2):
    """|m1 - m2|^2 + tr(S1 + S2 - 2 (S1 S2)^(1/2)) of two Gaussians; (D,), (D, D) each, float64 -> float.

    With S1 = L L' the matrices S1 S2 and L' S2 L share their eigenvalues other than 0. The latter is symmetric,
    so its eigenvalues are real, not negative, and quick to find; the trace is the sum of their roots.
    """
    # Pivoted Cholesky stops at the rank: below 2048 images S1 is singular and L narrow. Without the
    # zero eigenvalues, whose rounding errors the root would magnify, nothing has to be added to S1.
    factor, pivot, rank, _ = scipy.linalg.lapack.dpstrf(cov1, lower=1)
    L, order = np.tril(factor)[:, :rank], pivot - 1
    eigenvalues = np.linalg.eigvalsh(L.T @ cov2[np.ix_(order, order)] @ L)
    root = np.sqrt(eigenvalues.clip(0)).sum()
    return float(((mean1 - mean2) ** 2).sum() + np.trace(cov1) + np.trace(cov2) - 2 * root)


def fid(a, b):
    """FID between two FeatureStatistics; UsageError if they hold features that are not finite."""
    if not all(np.isfinite(s.mean).all() and np.isfinite(s.scatter).all() for s in (a, b)):
        raise UsageError("some features are not finite, so there is no FID: look at the images and the weights")
    if a.n and b.n and b.n < a.n:  # the factor of the smaller set is the narrower one
        a, b = b, a
    return max(0.0, frechet_distance(a.mean, a.covariance, b.mean, b.covariance))


# ------------------------------------------------------------------------------------------------------
# 3  MMD (Table 6)
# ------------------------------------------------------------------------------------------------------


def mmd2(x, y, bandwidths):
    """Squared maximum mean discrepancy for kernels exp(-|a-b|^2 / (2 sigma^2)): (n, D), (m, D) -> a float a sigma.

    The unbiased estimator (Gretton et al. 2012, Eq. 3), which leaves out a point's kernel with itself: its
    mean is 0 for equal distributions, and single values may be negative.
    """
    x, y = x.double(), y.double()

    def squared_distances(a, b):
        return (a.square().sum(1)[:, None] + b.square().sum(1) - 2 * a @ b.T).clamp_min(0)  # (n, m)

    def mean_of_pairs(k):
        return (k.sum() - k.trace()) / (len(k) * (len(k) - 1))

    xx, yy, xy = squared_distances(x, x), squared_distances(y, y), squared_distances(x, y)
    values = []
    for sigma in bandwidths:
        kxx, kyy, kxy = (torch.exp(-d / (2 * sigma**2)) for d in (xx, yy, xy))
        values.append((mean_of_pairs(kxx) + mean_of_pairs(kyy) - 2 * kxy.mean()).item())
    return values


# ------------------------------------------------------------------------------------------------------
# 4  Cost (Table 3)
# ------------------------------------------------------------------------------------------------------

ENCODERS = {"SD-VAE": SDVAEEncoder, **{
    f"LiteVAE-{size}": lambda preset=preset: LiteVAEEncoder(4, preset["extractor"], preset["aggregator"])
    for size, preset in PRESETS.items()}}


def count_macs(build, resolution):
    """Multiply-accumulates of one image: convolutions, linear layers and attention; nothing is computed."""
    with torch.device("meta"), FlopCounterMode(display=False) as counter, torch.no_grad():
        build()(torch.empty(1, 3, resolution, resolution))
    return counter.get_total_flops() // 2


def peak_memory(encoder, image):
    """Bytes at the worst moment of encode: weights, image and all intermediate tensors. None where unknown."""
    held = sum(p.numel() * p.element_size() for p in encoder.parameters()) + image.numel() * image.element_size()
    if image.device.type == "cuda":
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        encoder(image)
        torch.cuda.synchronize()
        return held + torch.cuda.max_memory_allocated() - before
    if image.device.type != "cpu":
        return None
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # else the profiler writes of its own doings
    with torch.autograd.profiler.profile(profile_memory=True) as profile:
        encoder(image)
    now = most = 0
    for event in profile.kineto_results.events():
        if event.name() == "[memory]":
            now += event.nbytes()  # negative when memory is given back
            most = max(most, now)
    return held + most


def throughput(encoders, image, rounds, progress=None):
    """Images a second of each encoder: {name: `rounds` values}, measured in turn in every round.

    A value comes from as many passes as last half a second, after one that does not count, in which the encoder
    finds its memory and caches again as in a loop.
    """
    synchronize = torch.cuda.synchronize if image.device.type == "cuda" else lambda: None
    values = {name: [] for name in encoders}
    for turn in range(rounds):
        for i, (name, encoder) in enumerate(encoders.items()):
            encoder(image)
            synchronize()
            start, passes = time.perf_counter(), 0
            while passes == 0 or time.perf_counter() - start < 0.5:
                encoder(image)
                synchronize()
                passes += 1
            values[name].append(passes * len(image) / (time.perf_counter() - start))
            if progress:
                progress.show(turn * len(encoders) + i + 1, name)
    return values


# ------------------------------------------------------------------------------------------------------
# 5  Images and weights: what is read, and how
# ------------------------------------------------------------------------------------------------------


class Images:
    """The images to measure on, as a DataLoader's data set: position -> (3, H, W) uint8, or the path if unreadable.

    Files, a folder searched recursively, or without either the built-in images no run trains on; the first
    `limit` of them. At `resolution`: centre squares, reduced or enlarged. At None: as they are, at
    Inception's 299x299 in float, as FID wants them.
    """

    def __init__(self, source, resolution, limit=None):
        self.resolution = resolution
        if source is None:
            self.built_in, self.name = BuiltInImages(resolution, seed=2**32 - 1), "built-in images"
            self.files = [str(i) for i in range(limit or 64)]
        else:
            self.built_in = None
            self.files = find_images(source) if isinstance(source, (str, Path)) else source
            self.name = f"images of {source}" if isinstance(source, (str, Path)) else "images"
            self.files = self.files[:limit]

    def __len__(self):
        return len(self.files)

    def __getitem__(self, position):
        if self.built_in:
            return self.built_in[position]
        path = self.files[position]
        try:
            if self.resolution:
                pixels = load_image(path, self.resolution)
            else:
                pixels = np.asarray(open_rgb(path))
            pixels = torch.from_numpy(pixels.copy()).permute(2, 0, 1)  # (3, H, W)
        except Exception:  # PIL raises a dozen kinds for a dozen kinds of damage
            return path
        return pixels if self.resolution else inception_resize(pixels[None] / 255)[0]

    def batches(self, batch_size, machine, title, shown=True):
        """(B, 3, H, W) on the CPU, the last one smaller; names what cannot be read. UsageError if nothing can."""
        loader = DataLoader(self, batch_size, num_workers=machine.workers(None), collate_fn=list,
                            worker_init_fn=ignore_signals)
        progress, seen, bad = Progress(0, len(self)), 0, 0
        for items in loader:
            seen += len(items)
            readable = [item for item in items if torch.is_tensor(item)]
            for path in (item for item in items if not torch.is_tensor(item)):
                bad += 1
                progress.say(f"skipped, cannot be read: {path}")
            if readable:
                yield torch.stack(readable)
            if shown:
                progress.show(seen, title)
        if bad == len(self):
            raise UsageError(f"none of the {bad} {self.name} can be read, {self.files[0]} for one")


def load_vae(path, machine, raw=False):
    """The autoencoder of a checkpoint, and the resolution it was trained at (None if the file does not say)."""
    checkpoint = load_or_say(load_checkpoint, path, "--vae")
    vae = rebuilt(lambda: LiteVAE.from_state(checkpoint, ema=not raw), f"--vae: {path}").eval()
    vae.weights = "averaged" if "ema" in checkpoint and not raw else "raw"
    vae.requires_grad_(False).to(machine.device, memory_format=machine.memory_format)
    return vae, trained_at(checkpoint)


def load_lpips(net, machine):
    if net == "none":
        return None
    try:
        return LPIPS(net).to(machine.device, memory_format=machine.memory_format)
    except (ImportError, OSError) as error:
        raise UsageError(f"{error}; or go without it: --lpips-net none")


def load_features(args, machine):
    if args.no_fid:
        return None
    try:
        return load_inception(args.inception).to(machine.device, memory_format=machine.memory_format)
    except UsageError as error:
        raise UsageError(f"{error}; or go without it: --no-fid")


def exact_machine(device, precision="fp32"):
    """The device, with float32 computed as float32 (no TF32), in the memory format that is fastest."""
    machine = Machine(device, precision)
    torch.set_float32_matmul_precision("highest")
    torch.backends.cudnn.allow_tf32 = False
    if machine.device.type != "mps":
        machine.memory_format = torch.channels_last  # on a CPU it spares each convolution two reorderings
    return machine


# ------------------------------------------------------------------------------------------------------
# 6  Commands
# ------------------------------------------------------------------------------------------------------
# Each returns its numbers as a dict, which --json writes. What was left out is absent from it.


@torch.no_grad()
def measure(vae, images, machine, batch_size, lpips=None, inception=None, sample=False, title=""):
    """All of Table 1's metrics over `images`: a dict with n, and the first eight (image, reconstruction) pairs.

    With `sample` a latent is drawn, from noise that depends on the image's position alone, else it is the
    posterior's mean. If Ctrl-C comes, the dict holds what was seen so far and "interrupted".
    """
    values, pairs = {"psnr": [], "ssim": [], "lpips": []}, []
    real, fake = FeatureStatistics(), FeatureStatistics()
    generator, interrupted = torch.Generator().manual_seed(0), False
    try:
        for batch in images.batches(batch_size, machine, title):
            x = machine.images(batch)  # (B, 3, R, R) in [-1, 1]
            y = vae.decode(encode(vae, x, sample, generator)).sample
            if not y.isfinite().all():
                raise UsageError("the reconstructions are not finite: this checkpoint cannot be measured")
            if inception:
                # As 8-bit files hold them, so that `fid` on saved reconstructions gives the same number.
                features = [inception((to_pixels(a) * 255).round() / 255) for a in (x, y)]  # (B, 2048) each
            # Only whole batches enter the sums.
            new = {"psnr": psnr(y, x), "ssim": ssim(y, x), **({"lpips": lpips(y, x)} if lpips else {})}
            for name, per_image in new.items():
                values[name] += per_image.tolist()
            if inception:
                real.update(features[0])
                fake.update(features[1])
            pairs += list(zip(x[:8 - len(pairs)].cpu(), y.cpu()))
    except KeyboardInterrupt:
        interrupted = True
        if not values["psnr"]:
            raise
    numbers = {"n": len(values["psnr"]), **{name: float(np.mean(v)) for name, v in values.items() if v}}
    if inception:
        if real.n > 1:
            numbers["rfid"] = fid(real, fake)
        numbers["inception"] = inception.label
    if interrupted:
        numbers["interrupted"] = True
    return numbers, pairs


def latent_noise(vae, x, generator):
    """Standard normal (B, nz, h, w), drawn image by image, so that it does not depend on the batch size."""
    B, _, H, W = x.shape
    return torch.stack([torch.randn(vae.config.latent_dim, H // 8, W // 8, generator=generator) for _ in range(B)])


def encode(vae, x, sample, generator):
    """Images' latents, the posterior's mean or a draw: (B, nz, h, w)."""
    fits_resolution(vae.config, x.shape[-1], "--vae")
    posterior = vae.encode(x).latent_dist
    return posterior.sample(noise=latent_noise(vae, x, generator)) if sample else posterior.mode()


METRICS = {"rfid": "rFID", "lpips": "LPIPS", "psnr": "PSNR", "ssim": "SSIM"}  # in the order of Table 1


def metric_names(numbers, net):
    """{key: column title} of the metrics in `numbers`; the title tells whose features they are."""
    names = {key: name for key, name in METRICS.items() if key in numbers}
    if "lpips" in names:
        names["lpips"] = f"LPIPS ({net})"
    if "rfid" in names and numbers["inception"] != "published weights":
        names["rfid"] = f"rFID ({numbers['inception']})"
    return names


def print_table(rows):
    """Rows of strings, the first the titles, as a table with right-aligned columns but the first."""
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    for row in rows:
        print("  ".join(cell.ljust(width) if i == 0 else cell.rjust(width)
                        for i, (cell, width) in enumerate(zip(row, widths))))


def warn_about_fid(n, label):
    if n < 2:
        print("FID needs at least 2 images: left out.")
    elif n < 2048:
        print(f"Warning: FID from {n} images, fewer than its 2048 features, is far too large and only to be compared "
              f"with FIDs from the same {n} images.")
    if label != "published weights":
        print(f"Warning: this FID is of {label}: it says nothing about quality and compares with no published number.")


def describe(path, vae, args):
    return (f"{path}: {vae.name}, nz {vae.config.latent_dim}, {vae.weights} weights, "
            f"{'a drawn latent' if args.sample else 'posterior mean'}")


def beside(path, name):
    """Where a picture goes without --out: beside the checkpoint."""
    return Path(path).parent / name


def tag(source):
    return "builtin" if source is None else Path(source).resolve().name


def recon(args):
    machine = exact_machine(args.device)
    vae, trained = load_vae(args.vae, machine, args.raw_weights)
    resolution = args.resolution or trained or 256
    check_resolution(resolution, args)
    inception, lpips = load_features(args, machine), load_lpips(args.lpips_net, machine)
    images = Images(args.data, resolution, args.limit)
    print(describe(args.vae, vae, args))
    numbers, pairs = measure(vae, images, machine, args.batch_size, lpips, inception, args.sample, "recon")
    interrupted = f", interrupted after {numbers['n']} of {len(images)}" if "interrupted" in numbers else ""
    print(f"{numbers['n']} {images.name} at {resolution}x{resolution}{interrupted}")
    names = metric_names(numbers, args.lpips_net)
    print_table([["N", *names.values()], [str(numbers["n"]), *(f"{numbers[key]:.4g}" for key in names)]])
    if inception:
        warn_about_fid(numbers["n"], inception.label)
    out = Path(args.out or beside(args.vae, f"recon-{tag(args.data)}-{resolution}.png"))
    # The difference is shown around grey, twice as strong as it is.
    save_grid(out, [[v for x, y in pairs[i:i + 2] for v in (x, y, 2 * (y.clamp(-1, 1) - x))]
                    for i in range(0, len(pairs), 2)])
    print(f"Inputs, reconstructions and twice their difference: {out}")
    if "lpips" in numbers:
        numbers["lpips_net"] = args.lpips_net
    return {**numbers, "resolution": resolution, "vae": str(args.vae), "data": args.data or "built-in"}


def statistics_of(source, args, machine, inception):
    """FeatureStatistics of a folder, or of an .npz that --save-stats (or pytorch-fid) wrote."""
    result = FeatureStatistics()
    if str(source).endswith(".npz"):
        try:
            with np.load(source) as file:
                result.mean, covariance = file["mu"].astype(np.float64), file["sigma"].astype(np.float64)
                result.n = int(file["n"]) if "n" in file else 0  # pytorch-fid does not tell
                label = str(file["inception"]) if "inception" in file else inception.label
        except Exception as error:
            raise UsageError(f"{source} cannot be read as saved statistics, an .npz with `mu` and `sigma` ({error})")
        if result.mean.shape != (2048,) or covariance.shape != (2048, 2048):
            raise UsageError(f"{source} holds statistics of {result.mean.size} features, FID's are 2048")
        if label != inception.label:
            raise UsageError(f"{source} was made with {label}, this run uses {inception.label}: they cannot be "
                             "compared, so choose the same --inception")
        result.scatter = covariance * max(1, result.n - 1)
        print(f"{source}: statistics of {result.n or 'an unknown number of'} images")
        return result
    images = Images(source, None, args.limit)
    with torch.no_grad():
        for batch in images.batches(args.batch_size, machine, f"fid {source}"):
            result.update(inception(batch.to(machine.device, memory_format=machine.memory_format)))
    if result.n < 2:
        raise UsageError(f"{source} holds a single readable image: FID needs at least 2")
    print(f"{source}: {result.n} images")
    return result


def fid_command(args):
    if args.b is None and not args.save_stats:
        raise UsageError("fid needs two folders (or .npz files) to compare, or one and --save-stats FILE.npz")
    for source in filter(None, (args.a, args.b)):  # before anything long begins
        if str(source).endswith(".npz"):
            if not Path(source).is_file():
                raise UsageError(f"there is no file {source}")
        else:
            find_images(source)
    machine = exact_machine(args.device)
    inception = load_inception(args.inception).to(machine.device, memory_format=machine.memory_format)
    a = statistics_of(args.a, args, machine, inception)
    numbers = {"inception": inception.label, "n": a.n}
    if args.save_stats:
        path = Path(args.save_stats)
        partial = path.with_name(path.name + ".partial")
        with open(partial, "wb") as file:
            np.savez(file, mu=a.mean, sigma=a.covariance, n=a.n, inception=inception.label)
        os.replace(partial, path)
        print(f"Statistics of {args.a}: {path}")
    if args.b is not None:
        b = statistics_of(args.b, args, machine, inception)
        numbers |= {"fid": fid(a, b), "n": min(a.n, b.n), "n_a": a.n, "n_b": b.n, "a": str(args.a), "b": str(args.b)}
        label = "" if inception.label == "published weights" else f" ({inception.label})"
        print(f"FID{label} {numbers['fid']:.4f}, N = {a.n or 'unknown'} and {b.n or 'unknown'}")
        warn_about_fid(min(n for n in (a.n or 2048, b.n or 2048)), inception.label)
    return numbers


def scale(args):
    machine = exact_machine(args.device)
    for resolution in args.resolutions:
        check_resolution(resolution, args)
    vaes = {path: load_vae(path, machine, args.raw_weights)[0] for path in args.vae}
    for path, vae in vaes.items():
        for resolution in args.resolutions:
            fits_resolution(vae.config, resolution, path)
    inception, lpips = load_features(args, machine), load_lpips(args.lpips_net, machine)
    out = Path(args.out or beside(args.vae[0], f"scale-{tag(args.data)}"))
    out.parent.mkdir(parents=True, exist_ok=True)
    records, titles = [], ["vae", "resolution", "n", *METRICS, "lpips_net", "inception"]
    table, partial = out.with_suffix(".csv"), out.with_suffix(".csv.partial")
    with open(partial, "w", newline="") as file:
        writer = csv.DictWriter(file, titles, extrasaction="ignore")
        writer.writeheader()
        try:
            for resolution in args.resolutions:
                images = Images(args.data, resolution, args.limit)
                for path, vae in vaes.items():
                    numbers, _ = measure(vae, images, machine, args.batch_size, lpips, inception, args.sample,
                                         f"{path} at {resolution}")
                    if "interrupted" in numbers:  # half a row would mislead
                        raise KeyboardInterrupt
                    if lpips:
                        numbers["lpips_net"] = args.lpips_net
                    records.append({"vae": str(path), "resolution": resolution, **numbers})
                    writer.writerow({k: f"{v:.6g}" if isinstance(v, float) else v for k, v in records[-1].items()})
                    file.flush()
        except KeyboardInterrupt:
            print(f"\nThe rows that are complete: {partial}")
            raise
    os.replace(partial, table)
    names = metric_names(records[0], args.lpips_net)
    for path, vae in vaes.items():
        print(describe(path, vae, args))
    print(f"{records[0]['n']} {images.name}")
    print_table([["", "resolution", "N", *names.values()],
                 *([r["vae"], str(r["resolution"]), str(r["n"]),
                    *(f"{r[key]:.4g}" if key in r else "-" for key in names)] for r in records)])
    if inception:
        warn_about_fid(min(r["n"] for r in records), inception.label)
    plot(out.with_suffix(".png"), records, names)
    print(f"Table and plot: {table}, {out.with_suffix('.png')}")
    return {"results": records, "n": records[0]["n"], "data": args.data or "built-in"}


COLOURS = ["#0b5fa5", "#d1495b", "#2e8b57", "#e08e0b", "#7a4fa3", "#555555"]


def plot(path, records, names):
    """One panel a metric: its value over the resolution, a line a checkpoint, as in Figs. 5 and 8."""
    font, small = ImageFont.load_default(20), ImageFont.load_default(16)
    width, height, left, top, bottom = 420, 340, 80, 50, 50
    vaes = list(dict.fromkeys(r["vae"] for r in records))
    sizes = sorted({r["resolution"] for r in records})
    canvas = Image.new("RGB", (max(2 * width, width * len(names)), height + 10 + 30 * len(vaes)), "white")
    draw = ImageDraw.Draw(canvas)
    for panel, (key, title) in enumerate(names.items()):
        values = [r[key] for r in records]
        low, high = min(values), max(values)
        margin = 0.08 * (high - low) or abs(high) * 0.1 or 1.0
        low, high = low - margin, high + margin
        x0, x1, y0, y1 = width * panel + left, width * (panel + 1) - 20, height - bottom, top
        across = lambda size: x0 + (x1 - x0) * (sizes.index(size) + 0.5) / len(sizes)  # noqa: E731
        up = lambda value: y0 + (y1 - y0) * (value - low) / (high - low)  # noqa: E731
        draw.text(((x0 + x1) / 2, top / 2), title, "black", font, anchor="mm")
        for tick in np.linspace(low + margin, high - margin, 4):
            draw.line([(x0, up(tick)), (x1, up(tick))], "#dddddd")
            draw.text((x0 - 8, up(tick)), f"{tick:.3g}", "black", small, anchor="rm")
        for size in sizes:
            draw.text((across(size), y0 + 16), str(size), "black", small, anchor="mm")
        draw.text(((x0 + x1) / 2, y0 + 38), "resolution", "black", small, anchor="mm")
        draw.line([(x0, y1), (x0, y0), (x1, y0)], "black", 2)
        for vae, colour in zip(vaes, COLOURS * len(vaes)):
            points = [(across(r["resolution"]), up(r[key])) for r in records if r["vae"] == vae]
            draw.line(points, colour, 3)
            for x, y in points:
                draw.ellipse([x - 5, y - 5, x + 5, y + 5], colour)
    for i, (vae, colour) in enumerate(zip(vaes, COLOURS * len(vaes))):
        y = height + 30 * i + 20
        draw.line([(left, y), (left + 40, y)], colour, 4)
        draw.text((left + 50, y), vae, "black", small, anchor="lm")
    canvas.save(path)


@torch.no_grad()
def mmd(args):
    machine = exact_machine(args.device)
    vae, _ = load_vae(args.vae, machine, args.raw_weights)
    check_resolution(args.resolution, args)
    images = Images(args.data, args.resolution, args.limit)
    factor = 1.0 if args.unscaled else vae.config.scaling_factor
    noise, generator = (torch.Generator().manual_seed(args.seed + i) for i in range(2))
    latents = []
    for batch in images.batches(args.batch_size, machine, "encode"):
        latents.append(encode(vae, machine.images(batch), args.sample, noise).cpu().flatten(1) * factor)
    latents = torch.cat(latents)  # (N, nz h w)
    half, dim = len(latents) // 2, latents.shape[1]
    if half < 2:
        raise UsageError(f"mmd needs at least 4 images, {args.data} has {len(latents)} that can be read")
    values = []
    for _ in range(args.repeats):
        chosen = latents[torch.randperm(len(latents), generator=generator)[:half]]
        values.append(mmd2(chosen, torch.randn(half, dim, generator=generator), args.bandwidths))
    mean, std = np.mean(values, axis=0), np.std(values, axis=0, ddof=1)
    print(describe(args.vae, vae, args))
    print(f"{len(latents)} {images.name} at {args.resolution}x{args.resolution}; "
          f"latents of {dim} numbers, times {factor}")
    print(f"Squared MMD (unbiased) against N(0, 1), in thousandths: mean and standard deviation over {args.repeats} "
          f"repeats, each with\n{half} of the latents drawn anew and as many Gaussian vectors")
    print_table([["sigma", "MMD^2 x 1000"],
                 *([f"{sigma:g}", f"{1e3 * m:.3f} ± {1e3 * s:.3f}"]
                   for sigma, m, s in zip(args.bandwidths, mean, std))])
    mmd2s = {f"{sigma:g}": {"mean": float(m), "std": float(s)} for sigma, m, s in zip(args.bandwidths, mean, std)}
    return {"mmd2": mmd2s, "n": len(latents), "n_each": half, "repeats": args.repeats, "dim": dim,
            "scaling_factor": factor, "resolution": args.resolution, "vae": str(args.vae), "data": args.data or "built-in"}


@torch.no_grad()
def cost(args):
    machine = exact_machine(args.device, args.precision)
    check_resolution(args.resolution, args)
    dtype = torch.bfloat16 if machine.bf16 else torch.float32
    batch_size = args.batch_size or (32 if machine.device.type == "cuda" else 2)
    encoders = {name: build().eval().to(machine.device, dtype, memory_format=machine.memory_format)
                for name, build in ENCODERS.items()}
    image = torch.rand(batch_size, 3, args.resolution, args.resolution).mul(2).sub(1)
    image = image.to(machine.device, dtype, memory_format=machine.memory_format)
    used = torch.cuda.get_device_name(machine.device) if machine.device.type == "cuda" else \
        f"{machine.device.type}, {torch.get_num_threads()} threads"
    precision = "bf16" if machine.bf16 else "fp32"
    print(f"{used}; PyTorch {torch.__version__}; {precision}{', compiled' if args.compile else ''}; "
          f"batch {batch_size} at {args.resolution}x{args.resolution}; medians of {args.rounds} interleaved rounds",
          flush=True)
    if args.compile:
        for encoder in encoders.values():
            encoder.compile()
    results = {}
    for name, encoder in encoders.items():
        encoder(image)  # finds the fastest algorithms; compiles
        results[name] = {"params": sum(p.numel() for p in encoder.parameters()),
                         "macs": count_macs(ENCODERS[name], args.resolution)}
        peak = peak_memory(encoder, image)
        if peak is not None:
            results[name]["peak_memory"] = peak
    speeds = throughput(encoders, image, args.rounds, Progress(0, args.rounds * len(encoders)))
    for name, r in results.items():
        r["images_per_second"] = statistics.median(speeds[name])
        r["quartiles"] = list(np.percentile(speeds[name], [25, 75]))
        # Ratios within a round: what slows the machine for a while slows both.
        r["speedup"] = statistics.median(v / base for v, base in zip(speeds[name], speeds["SD-VAE"]))
        if "peak_memory" in r:
            r["memory_ratio"] = results["SD-VAE"]["peak_memory"] / r["peak_memory"]
    print_table([["encoder", "params (M)", "MACs (G)", "peak memory (MB)", "less by", "images/s", "faster by"]] + [
        [name, f"{r['params'] / 1e6:.2f}", f"{r['macs'] / 1e9:.1f}",
         f"{r['peak_memory'] / 1e6:.0f}" if "peak_memory" in r else "-",
         f"{r['memory_ratio']:.2f}x" if "memory_ratio" in r else "-",
         f"{r['images_per_second']:.2f}", f"{r['speedup']:.2f}x"] for name, r in results.items()])
    return {"encoders": results, "device": used, "batch_size": batch_size, "resolution": args.resolution,
            "precision": precision, "compile": args.compile, "rounds": args.rounds}


def pictures(args, machine):
    """The images named on the command line, or a few built-in ones: (B, 3, R, R) in [-1, 1]."""
    for path in args.images:
        if not os.path.isfile(path):
            raise UsageError(f"there is no file {path}")
    images = Images(args.images or None, args.resolution, None if args.images else args.default_images)
    return machine.images(torch.cat(list(images.batches(8, machine, "", shown=False))))


@torch.no_grad()
def latents(args):
    machine = exact_machine(args.device)
    vae, trained = load_vae(args.vae, machine, args.raw_weights)
    args.resolution = args.resolution or trained or 256
    check_resolution(args.resolution, args)
    x = pictures(args, machine)
    z = encode(vae, x, args.sample, torch.Generator().manual_seed(0))  # (B, nz, h, w)
    y = vae.decode(z).sample
    print(describe(args.vae, vae, args))
    print(f"{len(x)} images at {args.resolution}x{args.resolution}: latents of {'x'.join(map(str, z.shape[1:]))}")
    flat = z.transpose(0, 1).flatten(1)  # (nz, B h w)
    mean, std, extent = flat.mean(1), flat.std(1), flat.abs().amax(1)
    print_table([["channel", "mean", "std", "largest"],
                 *([str(i), *(f"{v:.3f}" for v in row)] for i, row in enumerate(zip(mean, std, extent)))])
    # Each channel from its 2nd to its 98th percentile; a latent of fewer than three channels is shown in grey.
    low, high = (torch.quantile(flat[:3].float()[:, :10**6], q, dim=1).view(-1, 1, 1) for q in (0.02, 0.98))
    rgb = 2 * (z[:, :3].float() - low) / (high - low).clamp_min(1e-8) - 1  # (B, 3, h, w)
    rgb = rgb if z.shape[1] >= 3 else rgb[:, :1].expand(-1, 3, -1, -1)
    rgb = F.interpolate(rgb, scale_factor=8, mode="nearest")
    out = Path(args.out or beside(args.vae, "latents.png"))
    save_grid(out, [list(row) for row in zip(x, rgb, y)])
    print(f"Inputs, latents (channels 0, 1, 2 as red, green, blue), reconstructions: {out}")
    return {"n": len(x), "mean": mean.tolist(), "std": std.tolist(), "largest": extent.tolist(),
            "resolution": args.resolution, "vae": str(args.vae)}


@torch.no_grad()
def features(args):
    machine = exact_machine(args.device)
    vae, trained = load_vae(args.vae, machine, args.raw_weights)
    args.resolution = args.resolution or trained or 256
    check_resolution(args.resolution, args)
    x = pictures(args, machine)
    maps = {}
    hook = vae.decoder.up[0].block[-1].register_forward_hook(lambda module, inputs, out: maps.update(last=out))
    vae.decode(encode(vae, x, args.sample, torch.Generator().manual_seed(0)))
    hook.remove()
    f = maps["last"].float().abs()  # (B, C, H', W'): the final block's maps, before norm_out
    # Fig. 3 shows single maps, and spots in them, far stronger than the rest. Two numbers for that:
    rms = f.square().mean(dim=(0, 2, 3)).sqrt()  # (C,)
    imbalance = (rms.max() / rms.median().clamp_min(1e-12)).item()
    spots = (f.amax(dim=(2, 3)) / f.square().mean(dim=(2, 3)).sqrt().clamp_min(1e-12)).mean().item()
    print(describe(args.vae, vae, args))
    kind = "SMC" if vae.config.use_smc else "GroupNorm"
    print(f"{f.shape[1]} maps of {f.shape[2]}x{f.shape[3]} over {len(x)} images, {kind} decoder")
    print(f"strongest map over the median map (RMS): {imbalance:.2f}; largest value of a map over its RMS: {spots:.2f}")
    order = rms.argsort(descending=True)[:args.maps]
    # One scale for all maps of a row, so that it shows when some outshine the others.
    rows = [[image, *(2 * f[i, c].expand(3, -1, -1) / f[i, order].amax().clamp_min(1e-12) - 1 for c in order)]
            for i, image in enumerate(F.interpolate(x, f.shape[2:], mode="area"))]
    out = Path(args.out or beside(args.vae, "features.png"))
    save_grid(out, rows)
    print(f"Inputs and the {len(order)} strongest maps (absolute values, one scale a row): {out}")
    return {"n": len(x), "maps": f.shape[1], "imbalance": imbalance, "spots": spots, "rms": rms.tolist(),
            "resolution": args.resolution, "vae": str(args.vae), "use_smc": vae.config.use_smc}


# ------------------------------------------------------------------------------------------------------
# 7  Arguments
# ------------------------------------------------------------------------------------------------------


def check_resolution(resolution, args):
    smallest = 32 if getattr(args, "lpips_net", "none") != "none" else 16
    if resolution < smallest or resolution % 8:
        raise UsageError(f"resolutions must be multiples of 8 and at least {smallest} here, got {resolution}")


HELP = {  # what it computes, what it needs, how long it takes (on two CPU cores)
    "recon":
        "Reconstruct images and compare: PSNR, SSIM, LPIPS, rFID (Table 1), and a picture of inputs, reconstructions "
        "and twice their difference. Needs the weights of LPIPS and of Inception, unless left out. With the quick "
        "start's model an image of 256x256 takes 0.2 s, LPIPS adds 0.5 s (vgg; alex 0.1 s), rFID 0.1 s.",
    "fid":
        "FID between two sets of images, each a folder or an .npz of saved statistics (of --save-stats, or "
        "pytorch-fid's). Needs the Inception weights. An image takes 0.06 s, the distance 1 s.",
    "scale":
        "The metrics of recon at several resolutions, for one or several checkpoints (Figs. 5 and 8): a table, a .csv "
        "and a plot. Images smaller than a resolution are enlarged to it: give photographs of 512 pixels or more. "
        "Needs what recon needs. With the quick start's model the five resolutions of an image take 1.2 s, LPIPS and "
        "rFID left out.",
    "mmd":
        "Squared MMD between latents and standard Gaussian vectors for several RBF bandwidths (Table 6): the unbiased "
        "estimate, in thousandths, and its spread over repeats. The latents are those a diffusion model would see: "
        "times the scaling factor. At 256x256 they have the 32 x 32 x nz numbers the bandwidths were chosen for. Needs "
        "only a checkpoint. 0.05 s an image with LiteVAE-S, 0.2 s with B.",
    "cost":
        "Parameters, multiply-accumulates, peak memory and throughput of the four encoders and of Stable Diffusion's "
        "(Table 3), with nz 4 and random weights, in turn within one run, and the ratios. Needs nothing. Three "
        "minutes.",
    "latents":
        "Latents as pictures (Figs. 2 and 4): images, the first three latent channels as RGB, reconstructions; and "
        "each channel's mean and standard deviation. Needs only a checkpoint. Seconds.",
    "features":
        "The decoder's last feature maps (Fig. 3), and by how much the strongest outshines the others: what GroupNorm "
        "does and SMC mends. Needs only a checkpoint. Seconds.",
}


def build_parser():
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    def command(name, run, vae=None, data=False, resolution=None, batch_size=None, metrics=False, out=None):
        """A command with the options that several have; `resolution` and `batch_size` tell their defaults."""
        p = commands.add_parser(name, help=HELP[name].split(" (")[0], description=HELP[name])
        p.set_defaults(run=run)
        number = lambda text: int(text) if text.isdigit() else None  # noqa: E731
        if vae:
            p.add_argument("--vae", metavar="CKPT", required=True, nargs="+" if vae == "several" else None,
                           help="checkpoint of train.py, or a released Stable Diffusion autoencoder"
                                + (", or several" if vae == "several" else ""))
            p.add_argument("--raw-weights", action="store_true", help="the raw weights instead of the averaged ones")
            p.add_argument("--sample", action="store_true",
                           help="draw the latent instead of taking the posterior's mean")
        if data:
            p.add_argument("--data", metavar="DIR",
                           help="folder of images, searched recursively (default: built-in images)")
            p.add_argument("--limit", type=int, metavar="N",
                           help="only the first N images (default: all of --data, or 64 built-in ones)")
        if resolution:
            p.add_argument("--resolution", type=int, metavar="R", default=number(resolution),
                           help="images are cropped to their centre square and resized to R x R pixels, a multiple "
                                f"of 8 (default: {resolution})")
        if metrics:
            p.add_argument("--lpips-net", choices=["vgg", "alex", "squeeze", "none"], default="vgg",
                           help="LPIPS's network (default: vgg, which the SD-VAE's published values fit), or none")
            p.add_argument("--no-fid", action="store_true", help="without rFID")
        if metrics or name == "fid":
            p.add_argument("--inception", metavar="FILE",
                           help=f"Inception weights (default: {INCEPTION_FILE} in torch's hub cache, else downloaded), "
                                "or the word random: random features, for trying things out")
        if batch_size:
            p.add_argument("--batch-size", type=int, metavar="B", default=number(batch_size),
                           help=f"images at a time: speed and memory, not results (default: {batch_size})")
        if out:
            p.add_argument("--out", metavar="FILE", help=f"the picture (default: {out} beside the checkpoint)")
        p.add_argument("--device", help="cuda, cuda:1, mps, cpu (default: the best there is)")
        p.add_argument("--json", metavar="FILE", help="write the numbers to FILE too (default: nowhere)")
        return p

    command("recon", recon, vae="one", data=True, resolution="that of training", batch_size="8", metrics=True,
            out="recon-DATA-R.png")
    p = command("fid", fid_command, batch_size="16")
    p.add_argument("a", metavar="A", help="folder of images, searched recursively, or .npz of statistics")
    p.add_argument("b", metavar="B", nargs="?", help="what to compare it with; not needed with --save-stats")
    p.add_argument("--save-stats", metavar="FILE.npz", help="save A's statistics (default: nowhere)")
    p.add_argument("--limit", type=int, metavar="N", help="only the first N images of a folder (default: all)")
    p = command("scale", scale, vae="several", data=True, batch_size="8", metrics=True, out="scale-DATA.png and .csv")
    p.add_argument("--resolutions", type=int, nargs="+", metavar="R", default=[32, 64, 128, 256, 512],
                   help="(default: 32 64 128 256 512)")
    p = command("mmd", mmd, vae="one", data=True, resolution="256", batch_size="8")
    p.add_argument("--bandwidths", type=float, nargs="+", metavar="SIGMA", default=[25, 50, 100, 250, 500],
                   help="(default: 25 50 100 250 500)")
    p.add_argument("--repeats", type=int, default=10, help="(default: 10)")
    p.add_argument("--seed", type=int, default=0, help="of the Gaussian vectors and the choice of latents (default: 0)")
    p.add_argument("--unscaled", action="store_true", help="latents as the encoder gives them")
    p = command("cost", cost, resolution="256", batch_size="32 on a GPU, else 2")
    p.add_argument("--precision", choices=["fp32", "bf16"], default="fp32",
                   help="of weights and activations (default: fp32)")
    p.add_argument("--compile", action="store_true", help="torch.compile each encoder first, which takes minutes")
    p.add_argument("--rounds", type=int, default=9, help="measurements of each encoder (default: 9)")
    for name, run, text in (("latents", latents, "image files (default: 8 built-in images)"),
                            ("features", features, "image files (default: 2 built-in images)")):
        p = command(name, run, vae="one", resolution="that of training", out=f"{name}.png")
        p.add_argument("images", nargs="*", metavar="IMAGE", help=text)
        p.set_defaults(default_images=8 if name == "latents" else 2)
    p.add_argument("--maps", type=int, default=7, help="how many maps to show (default: 7)")
    return parser


def main(argv=None):
    try:
        args = build_parser().parse_args(argv)
        for key, smallest in (("limit", 1), ("batch_size", 1), ("repeats", 2), ("rounds", 1), ("maps", 1)):
            value = getattr(args, key, None)
            if value is not None and value < smallest:
                raise UsageError(f"--{key.replace('_', '-')} must be at least {smallest}, got {value}")
        if any(sigma <= 0 for sigma in getattr(args, "bandwidths", [])):
            raise UsageError("--bandwidths must be above 0")
        for path in filter(None, (getattr(args, key, None) for key in ("json", "out", "save_stats"))):
            if not Path(path).resolve().parent.is_dir():  # found out before the work, not after it
                raise UsageError(f"there is no folder {Path(path).resolve().parent} to write {Path(path).name} into")
        numbers = args.run(args)
        if args.json:
            partial = Path(f"{args.json}.partial")
            partial.write_text(json.dumps({"command": args.command, **numbers}, indent=2) + "\n")
            os.replace(partial, args.json)
            print(f"Numbers: {args.json}")
        return 130 if numbers.get("interrupted") else 0
    except UsageError as error:
        print(f"eval.py: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("\neval.py: interrupted", file=sys.stderr)
        return 130


if __name__ == "__main__":
    sys.exit(main())
