"""Measure LiteVAE: the numbers of the paper's tables and figures, each with its definition in code.

    python eval.py recon --vae CKPT [--data DIR]         PSNR, SSIM, LPIPS, rFID and a picture       Table 1
    python eval.py recon --resolution 32 64 128 ...      the same at several resolutions             Figs. 5 and 8
    python eval.py fid A B                               FID between folders or saved statistics     Table 7
    python eval.py mmd --vae CKPT                        latents against a standard Gaussian         Table 6
    python eval.py cost                                  encoders against Stable Diffusion's         Table 3
    python eval.py latents --vae CKPT [IMAGE ...]        latents as pictures                         Figs. 2 and 4
    python eval.py features --vae CKPT [IMAGE ...]       decoder feature maps                        Fig. 3

Each has its own --help. Without --vae they use the LiteVAE-S that comes with the repository, without --data or IMAGE
the built-in images of train.py. From top to bottom:

    1  Reconstruction          ssim (PSNR: train.py, LPIPS: litevae.py)
    2  FID                     InceptionV3, FeatureStatistics, frechet_distance
    3  MMD                     mmd2
    4  Cost                    count_macs, peak_memory, throughput
    5  Commands                recon, fid, mmd, cost, latents, features
    6  Images and weights      Images, load_vae, load_metrics, encode
    7  Arguments and main
"""

import argparse
import hashlib
import json
import sys
import time
from collections import OrderedDict
from pathlib import Path

import numpy as np
import scipy.linalg
import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.utils.data import DataLoader
from torch.utils.flop_counter import FlopCounterMode
from tqdm import tqdm

import train
from litevae import (LPIPS, PRESETS, HaarTransform, LiteVAE, SDVAEEncoder, build_encoder, gaussian_blur,
                     load_checkpoint, one_line)

# --- 1  Reconstruction (Table 1) ----------------------------------------------------------------------
# PSNR, SSIM and LPIPS are computed for each image, then averaged over images. All three see outputs clamped to the
# range of images, not rounded. Unspecified: the SSIM. Wang et al. measure grey images; here the three colours' mean.


def ssim(x_hat, x):
    """Structural similarity of each image (Wang et al. 2004): two (B, 3, H, W) in [-1, 1] -> (B,).

    11x11 Gaussian window of sigma 1.5, at the positions where it fits into the image; averaged over
    positions and over the three colours. H and W at least 11.
    """
    dtype = torch.float32 if x.device.type == "mps" else torch.float64  # variances are small differences
    a = train.to_pixels(x_hat).to(dtype)  # (B, 3, H, W) in [0, 1]
    b = train.to_pixels(x).to(dtype)
    window = lambda t: gaussian_blur(t, 11, 1.5)[..., 5:-5, 5:-5]  # noqa: E731  the local mean
    mean_a, mean_b = window(a), window(b)  # (B, 3, H-10, W-10)
    var_a, var_b = window(a * a) - mean_a**2, window(b * b) - mean_b**2
    covariance = window(a * b) - mean_a * mean_b
    c1, c2 = 0.01**2, 0.03**2
    similarity = ((2 * mean_a * mean_b + c1) * (2 * covariance + c2)
                  / ((mean_a**2 + mean_b**2 + c1) * (var_a + var_b + c2)))  # (B, 3, H-10, W-10)
    return similarity.mean(dim=(1, 2, 3)).float()


# --- 2  FID (Heusel et al. 2017) ----------------------------------------------------------------------
# FID compares the mean and covariance of 2048 features of an Inception network over two sets of images. Two
# programs give the same FID only if they use the same weights and the same resize. Here the weights are those of the
# original TensorFlow code, as pytorch-fid ported them (names are those of its file, which loads strictly), and the
# resize to 299x299 is pytorch-fid's; the paper's, torch-fidelity's, is TensorFlow's.

INCEPTION_FILE = "pt_inception-2015-12-05-6726825d.pth"
INCEPTION_URL = f"https://github.com/mseitzer/pytorch-fid/releases/download/fid_weights/{INCEPTION_FILE}"

# The average leaves the padding out of the count, as in TensorFlow; torchvision's Inception counts it.
average_pool = nn.AvgPool2d(3, stride=1, padding=1, count_include_pad=False)
maximum_pool = nn.MaxPool2d(3, stride=1, padding=1)
halving_pool = nn.MaxPool2d(3, stride=2)

# A branch is {name: layer}, one after another. A layer is a pooling; a convolution, (in, out, kernel[, stride,
# padding]), by default of stride 1 and with padding "same"; or a block, which is a list of branches side by side.


def block_a(C, pooled):  # (B, C, 35, 35) -> (B, 224 + pooled, 35, 35)
    return [{"branch1x1": (C, 64, 1)},
            {"branch5x5_1": (C, 48, 1), "branch5x5_2": (48, 64, 5)},
            {"branch3x3dbl_1": (C, 64, 1), "branch3x3dbl_2": (64, 96, 3), "branch3x3dbl_3": (96, 96, 3)},
            {"pool": average_pool, "branch_pool": (C, pooled, 1)}]


def block_c(w):  # (B, 768, 17, 17) -> (B, 768, 17, 17)
    return [{"branch1x1": (768, 192, 1)},
            {"branch7x7_1": (768, w, 1), "branch7x7_2": (w, w, (1, 7)), "branch7x7_3": (w, 192, (7, 1))},
            {"branch7x7dbl_1": (768, w, 1), "branch7x7dbl_2": (w, w, (7, 1)), "branch7x7dbl_3": (w, w, (1, 7)),
             "branch7x7dbl_4": (w, w, (7, 1)), "branch7x7dbl_5": (w, 192, (1, 7))},
            {"pool": average_pool, "branch_pool": (768, 192, 1)}]


def block_e(C, pool):  # (B, C, 8, 8) -> (B, 2048, 8, 8); a convolution that two branches name is one convolution
    return [{"branch1x1": (C, 320, 1)},
            {"branch3x3_1": (C, 384, 1), "branch3x3_2a": (384, 384, (1, 3))},
            {"branch3x3_1": (C, 384, 1), "branch3x3_2b": (384, 384, (3, 1))},
            {"branch3x3dbl_1": (C, 448, 1), "branch3x3dbl_2": (448, 384, 3), "branch3x3dbl_3a": (384, 384, (1, 3))},
            {"branch3x3dbl_1": (C, 448, 1), "branch3x3dbl_2": (448, 384, 3), "branch3x3dbl_3b": (384, 384, (3, 1))},
            {"pool": pool, "branch_pool": (C, 192, 1)}]


INCEPTION = {
    "Conv2d_1a_3x3": (3, 32, 3, 2, 0), "Conv2d_2a_3x3": (32, 32, 3, 1, 0), "Conv2d_2b_3x3": (32, 64, 3),
    "pool1": halving_pool,  # (B, 64, 73, 73)
    "Conv2d_3b_1x1": (64, 80, 1), "Conv2d_4a_3x3": (80, 192, 3, 1, 0),
    "pool2": halving_pool,  # (B, 192, 35, 35)
    "Mixed_5b": block_a(192, 32), "Mixed_5c": block_a(256, 64), "Mixed_5d": block_a(288, 64),  # (B, 288, 35, 35)
    "Mixed_6a": [{"branch3x3": (288, 384, 3, 2, 0)},
                 {"branch3x3dbl_1": (288, 64, 1), "branch3x3dbl_2": (64, 96, 3), "branch3x3dbl_3": (96, 96, 3, 2, 0)},
                 {"pool": halving_pool}],  # (B, 768, 17, 17)
    "Mixed_6b": block_c(128), "Mixed_6c": block_c(160), "Mixed_6d": block_c(160), "Mixed_6e": block_c(192),
    "Mixed_7a": [{"branch3x3_1": (768, 192, 1), "branch3x3_2": (192, 320, 3, 2, 0)},
                 {"branch7x7x3_1": (768, 192, 1), "branch7x7x3_2": (192, 192, (1, 7)),
                  "branch7x7x3_3": (192, 192, (7, 1)), "branch7x7x3_4": (192, 192, 3, 2, 0)},
                 {"pool": halving_pool}],  # (B, 1280, 8, 8)
    "Mixed_7b": block_e(1280, average_pool),
    # The one block that pools by maximum: a slip in TensorFlow's network, which its weights were trained with.
    "Mixed_7c": block_e(2048, maximum_pool)}


class InceptionBlock(nn.Module):
    """Branches side by side, joined along the channels: (B, C, H, W) -> (B, C', H', W')."""

    def __init__(self, branches):
        super().__init__()
        self.branches = branches
        for branch in branches:
            for name, layer in branch.items():
                if isinstance(layer, tuple):
                    layer = convolution(*layer)
                elif isinstance(layer, list):
                    layer = InceptionBlock(layer)
                self.add_module(name, layer)

    def forward(self, x):
        outputs, known = [], {}  # what layers returned, by name: two branches may share a convolution
        for branch in self.branches:
            y = x
            for name in branch:
                y = known[name] = known[name] if name in known else self.get_submodule(name)(y)
            outputs.append(y)
        return torch.cat(outputs, dim=1)


def convolution(channels, out, kernel, stride=1, padding="same"):
    return nn.Sequential(OrderedDict(conv=nn.Conv2d(channels, out, kernel, stride, padding, bias=False),
                                     bn=nn.BatchNorm2d(out, eps=0.001), relu=nn.ReLU()))


class InceptionV3(InceptionBlock):
    """The Inception network of FID: (B, 3, H, W) in [0, 1], any size -> (B, 2048) features."""

    def __init__(self):
        super().__init__([INCEPTION])  # a block of one branch
        self.fc = nn.Linear(2048, 1008)  # in the file, not used by FID

    def forward(self, x):
        x = 2 * inception_resize(x) - 1  # (B, 3, 299, 299) in [-1, 1]
        for name in INCEPTION:
            x = self.get_submodule(name)(x)
        return x.mean(dim=(2, 3))  # (B, 2048, 8, 8) -> (B, 2048)


def inception_resize(x):
    """To 299x299 by pytorch-fid's bilinear resize, which does not smooth first; the identity at 299x299."""
    return F.interpolate(x, size=(299, 299), mode="bilinear", align_corners=False)


def load_inception(source=None):
    """InceptionV3 in eval mode; its `.label` says which weights it has.

    source  None: the published file, from torch's hub cache, else downloaded. A path: that file. "random":
            random weights, for trying things out: their distances say nothing about quality.
    UsageError if there are no weights.
    """
    with torch.random.fork_rng(devices=[]):  # the noise of what is measured does not depend on it
        net = InceptionV3()
    if source == "random":
        generator = torch.Generator().manual_seed(0)
        for module in net.modules():
            if isinstance(module, nn.Conv2d):  # He's initialisation, or the features would vanish
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
            raise train.UsageError(f"FID needs the Inception weights {INCEPTION_URL}: put the file at {path}, name it "
                                   "with --inception FILE, or leave out rFID in recon: --no-fid (loading "
                                   f"failed with: {one_line(error)})") from None
        net.label = "published weights" if published else f"{path.name}, not the published weights"
    return net.requires_grad_(False).eval()


class FeatureStatistics:
    """Mean and covariance of feature vectors in float64, in one pass: features are not kept.

    Chan et al.'s update, which merges batches of any size exactly and, unlike a sum of squares, stays accurate
    where the mean is large.
    """

    def __init__(self):
        self.n, self.centre, self.scatter = 0, 0.0, 0.0  # then tensors on the features' device: (D,), (D, D)

    def update(self, features):
        """(B, D)"""
        x = (features.cpu() if features.device.type == "mps" else features).double()  # MPS has no float64
        mean = x.mean(dim=0)
        centred, delta = x - mean, mean - self.centre
        total = self.n + len(x)
        self.scatter = self.scatter + centred.T @ centred + torch.outer(delta, delta) * (self.n * len(x) / total)
        self.centre = self.centre + delta * (len(x) / total)
        self.n = total

    @property
    def mean(self):
        return self.centre.cpu().numpy()

    @property
    def covariance(self):
        """(D, D), divided by n - 1 as in numpy.cov. UsageError for a single image."""
        if self.n == 1:
            raise train.UsageError("FID needs at least 2 images that can be read, and there is 1")
        return (self.scatter / (self.n - 1)).cpu().numpy()


def frechet_distance(mean1, cov1, mean2, cov2):
    """|m1 - m2|^2 + tr(S1 + S2 - 2 (S1 S2)^(1/2)) of two Gaussians; (D,), (D, D) each, float64 -> float.

    With S1 = L L' the matrices S1 S2 and L' S2 L have the same eigenvalues other than 0. The latter is symmetric,
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
    """FID between two sets' statistics; UsageError for features that are not finite, or a single image."""
    if not all(np.isfinite(s.mean).all() and np.isfinite(s.covariance).all() for s in (a, b)):
        raise train.UsageError("some features are not finite, so there is no FID: check the images and the weights")
    if a.n and b.n and b.n < a.n:  # the factor of the smaller set is the narrower one
        a, b = b, a
    return max(0.0, frechet_distance(a.mean, a.covariance, b.mean, b.covariance))


# --- 3  MMD (Table 6) ---------------------------------------------------------------------------------


def mmd2(x, y, bandwidths):
    """Squared maximum mean discrepancy: (n, D), (m, D) -> a list of floats, one for each bandwidth sigma.

    Kernel exp(-|a-b|^2 / (2 sigma^2)). The unbiased estimator (Gretton et al. 2012, Eq. 3) leaves out a point's
    kernel with itself: its mean is 0 for equal distributions, and single values may be negative.
    """
    x, y = x.double(), y.double()
    distances = [torch.cdist(a, b).square() for a, b in ((x, x), (y, y), (x, y))]
    mean_of_pairs = lambda k: (k.sum() - k.trace()) / (len(k) * (len(k) - 1))  # noqa: E731
    values = []
    for sigma in bandwidths:
        xx, yy, xy = [torch.exp(-d / (2 * sigma**2)) for d in distances]
        values.append((mean_of_pairs(xx) + mean_of_pairs(yy) - 2 * xy.mean()).item())
    return values


# --- 4  Cost (Table 3) --------------------------------------------------------------------------------

ENCODERS = {"SD-VAE": SDVAEEncoder,
            **{f"LiteVAE-{size}": lambda size=size: build_encoder(size, latent_dim=4) for size in PRESETS}}


def count_macs(build, resolution):
    """Multiply-accumulates of one image: convolutions, linear layers and attention; nothing is computed."""
    with torch.device("meta"), FlopCounterMode(display=False) as counter, torch.no_grad():
        build()(torch.empty(1, 3, resolution, resolution))
    return counter.get_total_flops() // 2


def peak_memory(encoder, image):
    """Bytes of a GPU at the worst moment of encoding: weights, image and all intermediate tensors. Elsewhere None."""
    if image.device.type != "cuda":
        return None
    held = sum(p.numel() * p.element_size() for p in encoder.parameters()) + image.numel() * image.element_size()
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    encoder(image)
    torch.cuda.synchronize()
    return held + torch.cuda.max_memory_allocated() - before


def throughput(encoders, image, rounds):
    """Images a second of each encoder: {name: `rounds` values}, measured in turn in every round.

    A value is measured over half a second, after one pass that does not count.
    """
    synchronize = getattr(torch, image.device.type).synchronize
    values = {name: [] for name in encoders}
    for _ in tqdm(range(rounds), "rounds", disable=None, leave=False):
        for name, encoder in encoders.items():
            encoder(image)
            synchronize()
            start, passes = time.perf_counter(), 0
            while passes == 0 or time.perf_counter() - start < 0.5:
                encoder(image)
                synchronize()
                passes += 1
            values[name].append(passes * len(image) / (time.perf_counter() - start))
    return values


# --- 5  Commands --------------------------------------------------------------------------------------
# Each returns its numbers as a dict, to which --json adds the options. The docstrings of commands are the text of
# --help; the times in them were measured on two CPU cores.


def measure(vae, images, args, machine, metrics, inception):
    """Table 1's metrics over `images`: a dict of numbers, and the first eight pairs (image, reconstruction)."""
    values = {name: [] for name in metrics}
    real, fake = FeatureStatistics(), FeatureStatistics()
    pairs, generator = [], torch.Generator().manual_seed(0)
    for batch in images.batches(args.batch_size, machine):
        x = machine.images(batch)  # (B, 3, R, R) in [-1, 1]
        y = vae.decode(encode(vae, x, args.sample, generator)).sample
        if not y.isfinite().all():
            raise train.UsageError("the reconstructions are not finite: this checkpoint cannot be measured")
        for name, metric in metrics.items():
            values[name] += metric(y, x).tolist()
        if inception:
            for distribution, image in ((real, x), (fake, y)):
                # Rounded as 8-bit files are, so that `fid` on saved reconstructions gives the same number.
                distribution.update(inception((train.to_pixels(image) * 255).round() / 255))
        pairs += zip(x[:8 - len(pairs)].cpu(), y.cpu())
    numbers = {"n": len(values["psnr"]), **{name: float(np.mean(v)) for name, v in values.items()},
               "psnrs": values["psnr"]}
    if inception:
        numbers |= {"rfid": fid(real, fake), "inception": inception.label}
    return numbers, pairs


def recon(args):
    """Reconstruct images and measure PSNR, SSIM, LPIPS and rFID (Table 1).

    Takes one or several checkpoints, at one or several resolutions (Figs. 5 and 8); with one of each it writes a
    picture of inputs, reconstructions and twice their difference. Images smaller than a resolution are enlarged to it.
    Needs the weights of LPIPS and of Inception, unless left out. With the quick start's model an image of 256x256 takes
    0.2 s, LPIPS adds 0.5 s (vgg; alex 0.1 s), rFID 0.1 s.
    """
    if args.out and len(args.vae) * len(args.resolution or [0]) > 1:
        raise train.UsageError("--out names the picture of one checkpoint at one resolution, and here are more: leave "
                               "it out")
    machine = exact_machine(args.device)
    vaes = [load_vae(path, args, machine) for path in args.vae]
    resolutions = args.resolution or [vaes[0][1]]  # that of training
    metrics, inception, titles = load_metrics(args, machine, resolutions)
    results = []
    for resolution in resolutions:
        images = Images(args.data, resolution, args.limit, args.resize)
        for path, (vae, _) in zip(args.vae, vaes):
            numbers, pairs = measure(vae, images, args, machine, metrics, inception)
            results.append({"vae": path, "resolution": resolution, **numbers})
    print(f"{numbers['n']} {images.name} at {', '.join(f'{r}x{r}' for r in resolutions)}")
    print_table([["", "resolution", *titles.values()],
                 *([r["vae"], str(r["resolution"]), *(f"{r[key]:.4g}" for key in titles)] for r in results)])
    if inception:
        warn_about_fid(numbers["n"])
    if len(results) > 1:
        return {"results": results}
    data = Path(args.data).resolve().name if args.data else "builtin"
    out = picture(args, path, f"recon-{data}-{resolution}.png")
    # The difference is shown around grey, twice as strong as it is.
    tiles = [[x, y, 2 * (y.clamp(-1, 1) - x)] for x, y in pairs]
    train.save_grid(out, [sum(tiles[i:i + 2], []) for i in range(0, len(tiles), 2)])
    print(f"Inputs, reconstructions and twice their difference: {out}")
    return results[0]


def fid_command(args):
    """FID between two sets of images (Table 7), each a folder or an .npz of saved statistics.

    The .npz comes from --save-stats or from pytorch-fid. With --resolution the images of folders become centre
    squares of that size, as in training, so that samples and photographs have one shape. Needs the Inception
    weights. An image takes 0.06 s, the distance 1 s.
    """
    if args.b is None and not args.save_stats:
        raise train.UsageError("fid needs two folders (or .npz files), or one and --save-stats FILE.npz")
    machine = exact_machine(args.device)
    inception = load_inception(args.inception).to(machine.device, memory_format=machine.memory_format)
    sources = [source for source in (args.a, args.b) if source]
    # Open both first: the images of one may take hours.
    sets = [load_statistics(source, inception.label) if source.endswith(".npz") else
            Images(source, args.resolution, args.limit, args.resize) for source in sources]
    if not args.resolution and any(isinstance(images, Images) for images in sets):
        print("Each image is squashed to 299x299 from its own shape, so this FID compares shapes too: --resolution R "
              "makes all of them centre squares.")
    for i, images in enumerate(sets):
        if isinstance(images, Images):
            sets[i] = FeatureStatistics()
            for batch in images.batches(args.batch_size, machine):
                batch = batch / 255 if args.resolution else batch  # [0, 1]
                sets[i].update(inception(batch.to(machine.device, memory_format=machine.memory_format)))
        print(f"{sources[i]}: {sets[i].n or 'an unknown number of'} images")
    a, b = sets[0], sets[-1]
    numbers = {"n": min(a.n, b.n) or None, "inception": inception.label}
    if args.save_stats:
        with open(args.save_stats, "wb") as file:  # np.savez would add .npz to a name without it
            np.savez(file, mu=a.mean, sigma=a.covariance, n=a.n, inception=inception.label)
        print(f"Statistics of {args.a}: {args.save_stats}")
    if args.b is not None:
        numbers |= {"fid": fid(a, b), "n_a": a.n, "n_b": b.n}
        print(f"FID ({inception.label}) {numbers['fid']:.4f}, N = {a.n or 'unknown'} and {b.n or 'unknown'}")
        warn_about_fid(min(a.n or 2048, b.n or 2048))
    return numbers


MMD_REPEATS = 10


def mmd(args):
    """Squared MMD between latents and standard Gaussian vectors for several bandwidths (Table 6).

    Prints the unbiased estimate times 1000 and its std over repeats. Latents are multiplied by the config's
    scaling_factor, as diffusion sees them. Needs only a checkpoint. 0.05 s an image with LiteVAE-S, 0.2 s with B.
    """
    # Unspecified: MMD or its square, unit, kernel, estimator, how many latents, scaled or not, and the resolution (here
    # 256x256). The repeats draw halves of one set of latents, which overlap: their std is no standard error.
    machine = exact_machine(args.device)
    vae, _ = load_vae(args.vae, args, machine)
    images = Images(args.data, args.resolution or 256, args.limit or (4096 if args.data else None))
    factor = vae.config.scaling_factor
    noise, generator = torch.Generator().manual_seed(0), torch.Generator().manual_seed(1)
    latents = torch.cat([encode(vae, machine.images(batch), args.sample, noise).cpu().flatten(1) * factor
                         for batch in images.batches(args.batch_size, machine)])  # (N, nz h w)
    half, dim = len(latents) // 2, latents.shape[1]
    if half < 2:
        raise train.UsageError(f"mmd needs at least 4 images that can be read, and there are {len(latents)}")
    values = []
    for _ in range(MMD_REPEATS):
        chosen = latents[torch.randperm(len(latents), generator=generator)[:half]]
        values.append(mmd2(chosen, torch.randn(half, dim, generator=generator), args.bandwidths))
    mmd2s = {f"{sigma:g}": {"mean": float(np.mean(v)), "std": float(np.std(v, ddof=1))}
             for sigma, v in zip(args.bandwidths, zip(*values))}
    print(f"{len(latents)} {images.name} at {images.resolution}x{images.resolution}; latents of {dim} numbers, times "
          f"{factor}\nSquared MMD (unbiased) against N(0, 1), in thousandths: mean and std over {MMD_REPEATS} repeats,"
          f"\neach with a random choice of {half} latents and as many new Gaussian vectors")
    print_table([["sigma", "MMD^2 x 1000"],
                 *([sigma, f"{1e3 * v['mean']:.3f} ± {1e3 * v['std']:.3f}"] for sigma, v in mmd2s.items())])
    return {"mmd2": mmd2s, "n": len(latents), "n_each": half, "dim": dim, "scaling_factor": factor,
            "resolution": images.resolution}


def cost(args):
    """Parameters, multiply-accumulates, a GPU's peak memory and throughput of the encoders (Table 3).

    The sizes of LiteVAE and Stable Diffusion's, with nz 4 and random weights, measured in turn within one run,
    and the ratios. Needs nothing. Seven minutes.
    """
    machine = exact_machine(args.device, args.precision)
    cuda, resolution = machine.device.type == "cuda", args.resolution or 256
    dtype = torch.bfloat16 if machine.bf16 else torch.float32
    image = torch.rand(args.batch_size or (32 if cuda else 2), 3, resolution, resolution).mul(2).sub(1)
    image = image.to(machine.device, dtype, memory_format=machine.memory_format)
    threads = f"{machine.device}, {torch.get_num_threads()} threads"
    where = torch.cuda.get_device_name(machine.device) if cuda else threads
    print(f"{where}; PyTorch {torch.__version__}; {args.precision}; batch "
          f"{len(image)} at {resolution}x{resolution}; medians of {args.rounds} interleaved rounds", flush=True)
    encoders, results = {}, {}
    for name, build in ENCODERS.items():
        encoder = encoders[name] = build().eval().to(machine.device, dtype, memory_format=machine.memory_format)
        encoder(image)  # finds the fastest algorithms
        results[name] = {"params": sum(p.numel() for p in encoder.parameters()), "macs": count_macs(build, resolution),
                         "peak_memory": peak_memory(encoder, image)}
    speeds = throughput(encoders, image, args.rounds)
    rows = []
    for name, r in results.items():
        r["images_per_second"] = float(np.median(speeds[name]))
        r["quartiles"] = list(np.percentile(speeds[name], [25, 75]))
        # Ratios within a round: what slows the machine for a while slows both.
        r["speedup"] = float(np.median(np.divide(speeds[name], speeds["SD-VAE"])))
        r["memory_ratio"] = r["peak_memory"] and results["SD-VAE"]["peak_memory"] / r["peak_memory"]
        memory = [f"{r['peak_memory'] / 1e6:.0f}", f"{r['memory_ratio']:.2f}x"] if r["peak_memory"] else ["-", "-"]
        rows.append([name, f"{r['params'] / 1e6:.2f}", f"{r['macs'] / 1e9:.1f}", *memory,
                     f"{r['images_per_second']:.2f}", f"{r['speedup']:.2f}x"])
    print_table([["encoder", "params (M)", "MACs (G)", "peak memory (MB)", "less by", "images/s", "faster by"], *rows])
    return {"encoders": results, "device": where, "batch_size": len(image), "resolution": resolution}


def latents(args):
    """What LiteVAE does to an image (Figs. 1, 2 and 4), and the mean, std and largest value of each latent channel.

    The picture shows, from left to right, the image, its three wavelet levels, the first three latent channels as
    RGB, and the reconstruction. Needs only a checkpoint. Seconds.
    """
    vae, x, z = encode_pictures(args, built_in=8)
    y = vae.decode(z).sample
    if not y.isfinite().all():
        raise train.UsageError("the reconstructions are not finite: this checkpoint cannot be shown")
    print(f"{len(x)} images at {x.shape[2]}x{x.shape[3]}: latents of {'x'.join(map(str, z.shape[1:]))}")
    flat = z.transpose(0, 1).flatten(1)  # (nz, B h w)
    mean, std, largest = flat.mean(1), flat.std(1), flat.abs().amax(1)
    print_table([["channel", "mean", "std", "largest"],
                 *([str(i), *(f"{v:.3f}" for v in row)] for i, row in enumerate(zip(mean, std, largest)))])
    # Each channel from its 2nd to its 98th percentile; fewer than three channels: the first one in grey.
    channels = 3 if z.shape[1] >= 3 else 1
    some = flat[:channels, :10**6].float()  # quantile takes 2^24 values at most
    low, high = [torch.quantile(some, q, dim=1).view(-1, 1, 1) for q in (0.02, 0.98)]
    rgb = 2 * (z[:, :channels].float() - low) / (high - low).clamp_min(1e-8) - 1
    rgb = F.interpolate(rgb.expand(-1, 3, -1, -1), scale_factor=8, mode="nearest")  # (B, 3, R, R)
    out = picture(args, args.vae, "latents.png")
    train.save_grid(out, [list(row) for row in zip(x, wavelet_picture(x), rgb, y)])
    print(f"Images, wavelets, latents (channels 0, 1, 2 as red, green, blue), reconstructions: {out}")
    return {"n": len(x), "mean": mean.tolist(), "std": std.tolist(), "largest": largest.tolist(),
            "resolution": x.shape[2]}


def wavelet_picture(image):
    """The three wavelet levels, each in the upper left quarter of the one before: (B, 3, H, W) -> (B, 3, H, W).

    Each level shows L V above H D, on the scale of the pixels; H, V and D, which are small, four times as strong.
    """
    levels = HaarTransform().cascade(image)
    picture = levels[-1][:, :3] / 8  # (B, 3, h, w), L of level 3
    for level, bands in reversed(list(enumerate(levels, 1))):
        _, h, v, d = (bands / 2**level).chunk(4, dim=1)  # (B, 3, H / 2^level, W / 2^level) each
        picture = torch.cat([torch.cat([picture, 4 * v], dim=3), torch.cat([4 * h, 4 * d], dim=3)], dim=2)
    return picture


def features(args):
    """The decoder's last feature maps (Fig. 3), and how much stronger than the others the strongest is.

    GroupNorm causes that imbalance, SMC avoids it. Needs only a checkpoint. Seconds.
    """
    vae, x, z = encode_pictures(args, built_in=2)
    maps = {}
    hook = vae.decoder.up[0].block[-1].register_forward_hook(lambda module, inputs, out: maps.update(last=out))
    vae.decode(z)
    hook.remove()
    f = maps["last"].float().abs()  # (B, C, H', W'): the last block's maps, before norm_out
    # Fig. 3 shows single maps, and spots in them, far stronger than the rest. Two numbers for that:
    rms = f.square().mean(dim=(0, 2, 3)).sqrt()  # (C,)
    imbalance = (rms.max() / rms.median().clamp_min(1e-12)).item()
    spots = (f.amax(dim=(2, 3)) / f.square().mean(dim=(2, 3)).sqrt().clamp_min(1e-12)).mean().item()
    print(f"{f.shape[1]} maps of {f.shape[2]}x{f.shape[3]} over {len(x)} images, "
          f"{'SMC' if vae.config.use_smc else 'GroupNorm'} decoder")
    print(f"strongest map over the median map (RMS): {imbalance:.2f}; largest value of a map over its RMS: {spots:.2f}")
    order = rms.argsort(descending=True)[:7]
    # One scale for all maps of a row, which shows how much stronger some are than others.
    rows = [[image, *(2 * f[i, c].expand(3, -1, -1) / f[i, order].amax().clamp_min(1e-12) - 1 for c in order)]
            for i, image in enumerate(F.interpolate(x, f.shape[2:], mode="area"))]
    out = picture(args, args.vae, "features.png")
    train.save_grid(out, rows)
    print(f"Inputs and the {len(order)} strongest maps (absolute values, one scale a row): {out}")
    return {"n": len(x), "maps": f.shape[1], "imbalance": imbalance, "spots": spots, "rms": rms.tolist(),
            "resolution": x.shape[2], "use_smc": vae.config.use_smc}


# --- 6  Images and weights ----------------------------------------------------------------------------


class Images:
    """The images to measure on, a data set: position -> (3, H, W), or the name and fault of a file that is none.

    `source` is a folder, searched recursively, a list of files, or None: built-in images that no run trains on.
    The first `limit` of them, by default all, or 64 built-in ones. At `resolution`: uint8, the centre square,
    resized by `resize`, "bicubic" as in training, or "bilinear" as in LDM's evaluation. At None: the whole image as
    float in [0, 1], resized to Inception's 299x299.
    """

    def __init__(self, source, resolution, limit=None, resize="bicubic"):
        self.resolution, self.resize = resolution, resize
        if source is None:
            self.files, self.name = range(limit or 64), "built-in images"
        elif isinstance(source, (str, Path)):
            self.files, self.name = train.find_images(source)[:limit], f"images of {source}"
        else:
            self.files, self.name = source, "images"

    def __len__(self):
        return len(self.files)

    def __getitem__(self, position):
        path = self.files[position]
        if isinstance(path, int):
            return train.DeadLeaves(self.resolution, seed=2**32 - 1)[path][0]
        try:
            if self.resolution and self.resize == "bicubic":
                return train.as_tensor(train.load_image(path, self.resolution))
            image = train.as_tensor(np.asarray(train.open_rgb(path)))  # (3, H, W)
        except OSError as error:
            return f"{path} ({one_line(error)})"
        return resize_bilinear(image, self.resolution) if self.resolution else inception_resize(image[None] / 255)[0]

    def batches(self, batch_size, machine):
        """(B, 3, H, W) on the CPU; prints the files that cannot be read. UsageError if none can."""
        if batch_size is None:
            # A CPU's cache holds the feature maps of about 256x256 pixels: encoders are faster on no more.
            pixels, most = (2**16, 32) if machine.device.type == "cpu" else (2**22, 64)
            batch_size = min(most, max(1, pixels // self.resolution**2))
        loader = DataLoader(self, batch_size, num_workers=machine.workers(None), collate_fn=list,
                            worker_init_fn=train.ignore_signals)
        unreadable = 0
        for items in tqdm(loader, self.name, unit="batch", disable=None, leave=False):
            bad = [path for path in items if not torch.is_tensor(path)]
            unreadable += len(bad)
            for path in bad:
                tqdm.write(f"skipped, cannot be read: {path}")
            if len(bad) < len(items):
                yield torch.stack([image for image in items if torch.is_tensor(image)])
        if unreadable == len(self):
            raise train.UsageError(f"none of the {len(self)} {self.name} can be read, {self.files[0]} for one")


def resize_bilinear(image, resolution):
    """The centre square as LDM's evaluation makes it: (3, H, W) uint8 -> (3, R, R) uint8.

    The shorter side is resized bilinearly without antialiasing (albumentations' SmallestMaxSize), which aliases: at a
    third of Kodak's resolution that costs 2 dB of PSNR against the bicubic filter.
    """
    scale = resolution / min(image.shape[1:])
    height, width = [max(resolution, round(side * scale)) for side in image.shape[1:]]
    image = F.interpolate(image[None].float(), size=(height, width), mode="bilinear", align_corners=False)[0]
    y, x = (height - resolution) // 2, (width - resolution) // 2
    return image[:, y:y + resolution, x:x + resolution].round().byte()


def exact_machine(device, precision="fp32"):
    """The device, which computes float32 as float32 (no TF32), in the memory format that is fastest."""
    machine = train.Machine(device, precision)
    torch.set_float32_matmul_precision("highest")
    torch.backends.cudnn.allow_tf32 = False
    # On a CPU channels_last spares each convolution two reorderings.
    machine.memory_format = torch.contiguous_format if machine.device.type == "mps" else torch.channels_last
    return machine


def picture(args, vae, name):
    """The file of a command's picture: --out, or `name` beside the checkpoint, or for the shipped one in runs."""
    path = Path(args.out or (Path("runs") if vae == str(train.TRAINED) else Path(vae).parent) / name)
    path.parent.mkdir(parents=True, exist_ok=True)
    return path


def load_vae(path, args, machine):
    """The autoencoder of a checkpoint, which is named in print, and the resolution it was trained at (or 256)."""
    checkpoint = load_checkpoint(path)
    vae = LiteVAE.from_checkpoint(checkpoint).requires_grad_(False)
    vae.to(machine.device, memory_format=machine.memory_format)
    print(f"{path}: {vae.name}, nz {vae.config.latent_dim}, {'EMA' if 'ema' in checkpoint else 'raw'} weights, "
          f"{'sampled latents' if args.sample else 'posterior mean'}")
    return vae, checkpoint.get("args", {}).get("resolution", 256)


def encode(vae, x, sample, generator):
    """Images to latents, the posterior's mean or a sample: (B, 3, H, W) in [-1, 1] -> (B, nz, h, w).

    UsageError if this model does not take images of this size, as one with a ViT aggregator does not.
    """
    try:
        posterior = vae.encode(x).latent_dist
    except ValueError as error:
        raise train.UsageError(str(error)) from None
    if not sample:
        return posterior.mode()
    # One image after another, so that the noise does not depend on the batch size.
    shape = (vae.config.latent_dim, x.shape[2] // 8, x.shape[3] // 8)
    return posterior.sample(noise=torch.stack([torch.randn(shape, generator=generator) for _ in x]))


def encode_pictures(args, built_in):
    """The autoencoder, the images named (else `built_in` built-in ones) in [-1, 1] and their latents."""
    machine = exact_machine(args.device)
    vae, trained_at = load_vae(args.vae, args, machine)
    images = Images(args.images or None, args.resolution or trained_at, None if args.images else built_in)
    x = machine.images(torch.cat(list(images.batches(None, machine))))  # (B, 3, R, R)
    return vae, x, encode(vae, x, args.sample, torch.Generator().manual_seed(0))


def load_metrics(args, machine, resolutions):
    """{metric: function of reconstruction and image}, Inception or None, and {metric: title} in Table 1's order."""
    smallest = 16 if args.lpips_net == "none" else 32
    if min(resolutions) < smallest:
        raise train.UsageError(f"{'SSIM' if smallest == 16 else 'LPIPS'} needs resolutions of at least {smallest}, got "
                               f"{min(resolutions)}")
    metrics, inception, titles = {"psnr": train.psnr, "ssim": ssim}, None, {}
    if not args.no_fid:
        inception = load_inception(args.inception).to(machine.device, memory_format=machine.memory_format)
        titles["rfid"] = f"rFID ({inception.label})"
    if args.lpips_net != "none":
        try:
            lpips = LPIPS(args.lpips_net).to(machine.device, memory_format=machine.memory_format)
        except (ImportError, OSError) as error:
            raise train.UsageError(f"{error}; or leave LPIPS out: --lpips-net none") from None
        metrics["lpips"] = lambda y, x: lpips(y.clamp(-1, 1), x)
        titles["lpips"] = f"LPIPS ({args.lpips_net})"
    return metrics, inception, titles | {"psnr": "PSNR", "ssim": "SSIM"}


def warn_about_fid(n):
    if n < 2048:
        print(f"Warning: FID from {n} images, fewer than its 2048 features, is far too large: compare it only with "
              "FIDs of as many images.")


def load_statistics(path, label):
    """n, mean, covariance of an .npz of --save-stats or pytorch-fid. UsageError if it is none, or of other weights."""
    try:
        with np.load(path) as file:
            mean, covariance = [file[name].astype(np.float64, casting="safe") for name in ("mu", "sigma")]
            n = int(file["n"]) if "n" in file else 0  # pytorch-fid does not save it
            held = str(file["inception"]) if "inception" in file else "published weights"  # pytorch-fid has no others
    except Exception as error:
        raise train.UsageError(f"{path} cannot be read as saved statistics, an .npz with `mu` and `sigma` ({error})")
    if mean.shape != (2048,) or covariance.shape != (2048, 2048) or held != label:
        raise train.UsageError(f"{path} holds {mean.size} features of {held}, and this run has 2048 of {label}: "
                               "they cannot be compared")
    return argparse.Namespace(n=n, mean=mean, covariance=covariance)


def print_table(rows):
    """Rows of strings, the first the titles, as a table with right-aligned columns but the first."""
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    for first, *rest in rows:
        print("  ".join([first.ljust(widths[0]), *(cell.rjust(width) for cell, width in zip(rest, widths[1:]))]))


# --- 7  Arguments and main ----------------------------------------------------------------------------


def output_file(text):
    """An argparse type: a file in a folder that exists, which is found out before the work, not after it."""
    if Path(text).is_dir() or not Path(text).resolve().parent.is_dir():
        raise argparse.ArgumentTypeError(f"must be a file in a folder that exists, got {text}")
    return text


png_file = train.checked(output_file, lambda text: text.endswith(".png"), "a name that ends in .png")


def build_parser():
    parser = train.Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands, parsers = parser.add_subparsers(dest="command", required=True, metavar="COMMAND"), {}
    for run in (recon, fid_command, mmd, cost, latents, features):
        name, about = run.__name__.removesuffix("_command"), run.__doc__.split("\n")[0]
        parsers[name] = commands.add_parser(name, help=about, description=run.__doc__)
        parsers[name].set_defaults(run=run)

    def add(names, option, **how):
        """An option of the commands `names`."""
        for name in names.split():
            parsers[name].add_argument(option, **how)

    shipped = str(train.TRAINED)
    count, side = {"metavar": "N", "type": train.positive_int}, {"metavar": "R", "type": train.multiple_of_8}
    file, switch = {"metavar": "FILE", "type": output_file}, {"action": "store_true"}

    checkpoint = "checkpoint, or released Stable Diffusion VAE (default: the LiteVAE-S that comes with this repository)"
    squares = "images become their centre square, resized to R x R pixels, a multiple of 8 (default: the resolution " \
              "of training; of mmd and cost: 256)"
    add("recon", "--vae", metavar="CKPT", nargs="+", default=[shipped], help=f"one or several: {checkpoint}")
    add("recon", "--resolution", nargs="+", **side, help=f"one or several: {squares}")
    add("mmd latents features", "--vae", metavar="CKPT", default=shipped, help=checkpoint)
    add("mmd cost latents features", "--resolution", **side, help=squares)
    add("recon mmd latents features", "--sample", **switch, help="sample the latent (default: posterior mean)")
    add("recon mmd", "--data", metavar="DIR", help="folder of images, searched recursively (default: built-in images)")
    add("recon fid mmd", "--limit", **count, help="only the first N images (default: all, of mmd 4096; or 64 built-in "
        "ones)")
    add("recon mmd", "--batch-size", **count, help="images at a time (default: 64, fewer above 256x256 pixels; on a "
        "CPU as many as make 256x256 pixels)")
    add("recon fid", "--resize", choices=["bicubic", "bilinear"], default="bicubic", help="bicubic with antialiasing, "
        "as in training; bilinear without, as in LDM's evaluation and so the paper's (default: bicubic)")
    add("recon", "--lpips-net", choices=["vgg", "alex", "squeeze", "none"], default="vgg", help="LPIPS's network, or "
        "none (default: vgg, which the SD-VAE's published values fit)")
    add("recon", "--no-fid", **switch, help="leave rFID out (default: measure it)")
    add("recon fid", "--inception", metavar="FILE", help="Inception weights, or the word random: random "
        f"features, for trying things out (default: {INCEPTION_FILE} in torch's hub cache, else downloaded)")
    add("recon latents features", "--out", metavar="FILE.png", type=png_file, help="the picture (default: beside "
        "the checkpoint, named after command and data)")
    add(" ".join(parsers), "--device", help="cuda, cuda:1, mps, cpu (default: the best there is)")
    add(" ".join(parsers), "--json", **file, help="write the numbers to FILE too (default: no)")

    add("fid", "a", metavar="A", help="folder of images, searched recursively, or .npz of statistics")
    add("fid", "b", metavar="B", nargs="?", help="what to compare it with; not needed with --save-stats")
    add("fid", "--save-stats", metavar="FILE.npz", type=output_file, help="save A's statistics (default: no)")
    add("fid", "--batch-size", **count, default=64, help="images at a time (default: 64)")
    add("fid", "--resolution", **side, help="centre squares of R x R pixels, as in training (default: whole images, "
        "each squashed to 299x299)")
    add("mmd", "--bandwidths", metavar="SIGMA", type=train.positive, nargs="+", default=[25, 50, 100, 250, 500],
        help="of the kernels (default: 25 50 100 250 500)")
    add("cost", "--batch-size", **count, help="images at a time (default: 32 on a GPU, else 2)")
    add("cost", "--precision", choices=["fp32", "bf16"], default="fp32", help="number format (default: fp32)")
    add("cost", "--rounds", **count, default=9, help="measurements of each encoder (default: 9)")
    add("latents", "images", metavar="IMAGE", nargs="*", help="image files (default: 8 built-in images)")
    add("features", "images", metavar="IMAGE", nargs="*", help="image files (default: 2 built-in images)")
    return parser


@torch.no_grad()
def main(argv=None):
    args = build_parser().parse_args(argv)
    numbers = {**vars(args), **args.run(args)}
    if args.json:
        del numbers["run"]
        Path(args.json).write_text(json.dumps(numbers, indent=2) + "\n")
        print(f"Numbers: {args.json}")
    return 0


if __name__ == "__main__":
    sys.exit(train.run_script(main))
