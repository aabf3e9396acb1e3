"""Train LiteVAE: on built-in images in minutes, or on a folder of your own.

    python train.py                                             the quick start: LiteVAE-S, built-in images
    python train.py --data DIR --out runs/mine                  the paper's first stage: LiteVAE-B at 128x128
    python train.py --data DIR --init runs/mine/checkpoint.pt --resolution 256 --out runs/mine-256
                                                                its second stage (Sec. 4.3, Table 5)
    python train.py --data DIR --model sd-vae --out runs/sd     what the paper compares with: see the groups below
    python train.py --out runs/mine --resume                    go on where a run stopped, to the bit
    torchrun --nproc_per_node=2 train.py --data DIR             the same run shared by two processes

A run writes into --out:  checkpoint.pt  (everything: weights, averaged weights, optimisers, step),
log.csv  (every logged value) and  reconstructions-STEP.png  (held-out images beside their reconstructions).

From top to bottom:

    1  Images            BuiltInImages (dead leaves), ImageFolder, TwoStages, load_image
    2  Looking           to_pixels, save_grid, psnr
    3  Around the step   what every training script needs: Machine, fit, ...
    4  Options           what every training script can be asked for: Options, complete, open_images, ...
    5  The step          AutoencoderTask: Eq. 1 and the discriminator
    6  The two recipes   QUICK_START, PAPER, the options by table, what they build, and main
"""

import argparse
import copy
import csv
import math
import os
import signal
import sys
import time
from pathlib import Path

import numpy as np
import scipy.ndimage
import torch
import torch.distributed as dist
from PIL import Image, ImageOps
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader

from litevae import (DWT_LATENTS, LOSS_WEIGHTS, LPIPS, MODELS, PRESETS, ESRGANPerceptual, LiteVAE, LiteVAEVariant,
                     PatchDiscriminator, StyleGANDiscriminator, UNetDiscriminator, adaptive_weight, autoencoder_loss,
                     discriminator_loss, hinge_d_loss, hinge_g_loss, ldl_loss, load_checkpoint, logistic_d_loss,
                     logistic_g_loss, save_checkpoint)


class UsageError(Exception):
    """Something the user can mend: main prints it as one sentence, without a traceback."""


# ------------------------------------------------------------------------------------------------------
# 1  Images
# ------------------------------------------------------------------------------------------------------
# A data set answers to positions 0, 1, 2, ... of an endless stream. What stands at a position depends on
# the seed and the position alone, so a resumed run sees what it would have seen, and processes that share
# a batch agree on it without a word. Items are (3, H, W) uint8, a quarter of the bytes of float32.


def dead_leaves(size, rng, clutter=1.0):
    """A synthetic photograph: (size, size, 3) uint8, drawn from `rng` alone.

    Opaque leaves with a power law of sizes fall on one another. That alone gives the edges, the occlusions
    and the scale invariance of natural images (Lee, Mumford & Huang 2001). Each leaf has shading and
    textures of its own, so that calm areas lie beside busy ones and the amplitude spectrum stays near 1/f
    (Field 1987). Exposure, contrast, white balance, saturation, clutter and focus are drawn once an image:
    it is in these that photographs differ most from one another. `clutter` scales the number of small leaves,
    textures and the unevenness of outlines: at 0 two to seven large, smooth boxes and ellipses are left.
    """
    # The leaves: a few large ones first (ground, sky, walls), then radii r with p(r) ~ r^-3, small ones late.
    r_min, r_max = np.exp(rng.uniform(np.log(1.2), np.log(14))), 0.8 * size
    large = rng.integers(2, 8)
    small = int(clutter * min(rng.uniform(0.2, 2.2) * (size / r_min) ** 2 / 4, 1.5 * size))  # capped: time is linear
    n = large + small
    radius = (r_min**-2 + rng.random(small) * (r_max**-2 - r_min**-2)) ** -0.5  # inverse of the cumulative
    radius = np.concatenate([size * rng.uniform(0.3, 1.3, large),
                             radius[np.argsort(-radius * rng.lognormal(0, 0.7, small))]])
    centre = rng.uniform(-0.15, 1.15, (n, 2)) * size  # y, x
    built = rng.random()  # from nature, 0: ellipses with uneven outlines, to architecture, 1: upright boxes
    box = rng.random(n) < 0.15 + 0.6 * built
    uneven = np.where(box | (rng.random(n) < 0.3), 0, clutter * rng.uniform(0, 0.6, n))
    upright = rng.normal(0, 0.05) + np.pi / 2 * rng.integers(0, 2, n)
    angle = np.where(rng.random(n) < built, upright, rng.uniform(0, np.pi, n))
    aspect = np.exp(-np.abs(rng.normal(0, 0.7, n)))
    thin = rng.random(n) < 0.15  # twigs, wires, edges of doors
    radius[thin], aspect[thin] = 3 * radius[thin], rng.uniform(0.03, 0.12, thin.sum())

    # Paint their numbers at twice the resolution, later leaves over earlier ones.
    owner = np.zeros((2 * size, 2 * size), dtype=int)
    axis = (np.arange(2 * size) + 0.5) / 2
    bumps = _noise(size, 2.0, rng).repeat(2, 0).repeat(2, 1)
    for k in range(1, n):
        reach = 1.42 * radius[k]
        (y0, x0), (y1, x1) = (np.clip(2 * (centre[k] + side * reach), 0, 2 * size).astype(int) for side in (-1, 1))
        y, x = (axis[y0:y1, None] - centre[k, 0]) / radius[k], (axis[x0:x1] - centre[k, 1]) / radius[k]
        u = x * np.cos(angle[k]) + y * np.sin(angle[k])
        v = (y * np.cos(angle[k]) - x * np.sin(angle[k])) / aspect[k]
        distance = np.maximum(np.abs(u), np.abs(v)) if box[k] else u * u + v * v  # below 1 inside the leaf
        if uneven[k]:
            distance = distance + uneven[k] * bumps[y0:y1, x0:x1]
        np.copyto(owner[y0:y1, x0:x1], k, where=distance < 1)

    # What each leaf looks like, (n, 10): luminance and two chroma axes (red-blue, green-magenta); shading
    # along y, along x, and its offset; strengths of clouds, speckle, fibres and a grating.
    look = np.zeros((n, 10), dtype=np.float32)
    saturation = rng.lognormal(0.2, 0.65) * (rng.random() > 0.04)  # some photographs are grey
    white_balance = rng.normal([0.45, 0.04, 0.0], [0.06, 0.045, 0.018])
    spread = [0.26 * rng.lognormal(0, 0.33), 0.06 * saturation, 0.02 * saturation]  # luminance dominates
    look[:, :3] = white_balance + rng.normal(size=(n, 3)) * spread
    look[:, 3:5] = rng.normal(0, 0.2, (n, 2)) / np.maximum(radius, 8)[:, None]
    look[:, 5] = -(look[:, 3:5] * centre).sum(axis=1)  # no shading at the centre
    strength = rng.lognormal(-0.3, 0.9) * rng.lognormal(0, 1.2, (n, 4)) * [0.08, 0.1, 0.1, 0.12]
    look[:, 6:] = clutter * np.minimum(strength, 0.35) * (rng.random((n, 4)) < [1, 0.6, 0.3, 0.15])
    wave = rng.uniform(0.2, 2.5, (n, 1)) * np.stack([np.cos(angle), np.sin(angle)], axis=1)  # radians a pixel

    # Look every pixel up. The mean of its four samples antialiases the edges.
    pixel = sum(look[owner[i::2, j::2]] for i in (0, 1) for j in (0, 1)) / 4  # (size, size, 10)
    luminance, red_blue, green, shade_y, shade_x, offset, clouds, speckle, fibres, grating = np.moveaxis(pixel, -1, 0)
    y, x = np.mgrid[:size, :size]
    shade = np.clip(shade_y * y + shade_x * x + offset, -0.5, 0.5)
    shade += clouds * _noise(size, rng.uniform(1.0, 1.6), rng)
    shade += speckle * _noise(size, rng.uniform(0.2, 0.8), rng)
    shade += fibres * _noise(size, rng.uniform(0.5, 1.0), rng, stretch=6, angle=rng.uniform(0, np.pi))
    phase = wave[owner[::2, ::2]]  # (size, size, 2)
    shade += grating * np.sin(phase[..., 0] * y + phase[..., 1] * x)
    luminance = np.clip(luminance, 0.03, 1) * np.exp(np.clip(shade, -2, 1))  # light multiplies,
    red_blue, green = (c * (1.7 * luminance + 0.17) for c in (red_blue, green))  # and colour fades in the dark
    image = np.stack([luminance + red_blue - green, luminance + green, luminance - red_blue - green], axis=-1)
    focus = rng.uniform(0.25, 0.6) if rng.random() < 0.85 else rng.uniform(0.6, 2.5)  # some are out of focus
    image = scipy.ndimage.gaussian_filter(image, (focus, focus, 0))
    return (np.clip(image, 0, 1) * 255 + 0.5).astype(np.uint8)


def _noise(size, slope, rng, stretch=1.0, angle=0.0):
    """(size, size) noise of unit variance with amplitude spectrum 1/f^slope; `stretch` draws it out into fibres."""
    fy, fx = np.fft.fftfreq(size)[:, None], np.fft.rfftfreq(size)
    along, across = fx * np.cos(angle) + fy * np.sin(angle), fy * np.cos(angle) - fx * np.sin(angle)
    f = np.sqrt((stretch * along) ** 2 + across**2 + 0.25 / size**2)  # the last term keeps it above 0
    field = np.fft.irfft2(np.fft.rfft2(rng.standard_normal((size, size))) / f**slope, s=(size, size))
    return ((field - field.mean()) / field.std()).astype(np.float32)


class BuiltInImages:
    """An endless stream of dead-leaves images: position -> (3, resolution, resolution) uint8."""

    def __init__(self, resolution, seed, clutter=1.0):
        self.resolution, self.seed, self.clutter = resolution, seed, clutter

    def __getitem__(self, position):
        image = dead_leaves(self.resolution, np.random.default_rng((self.seed, position)), self.clutter)  # (H, W, 3)
        return torch.from_numpy(image).permute(2, 0, 1).contiguous()


IMAGE_SUFFIXES = {".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".ppm", ".pgm",
                  ".pnm", ".jp2", ".avif", ".tga"}


def find_images(folder):
    """Every image below `folder`, sorted, suffixes in any case. UsageError if there is none."""
    if not os.path.isdir(folder):
        raise UsageError(f"there is no folder {folder}")
    files = [os.path.join(root, name) for root, _, names in os.walk(folder, followlinks=True) for name in names
             if os.path.splitext(name)[1].lower() in IMAGE_SUFFIXES]
    if not files:
        raise UsageError(f"{folder} holds no images ({', '.join(sorted(IMAGE_SUFFIXES))})")
    return sorted(files)


def open_rgb(path, short=None):
    """The file as a PIL image in RGB, at its own size; with `short`, JPEGs may come smaller, down to that side.

    Grey, palette, alpha (on white), 16-bit and EXIF-rotated files come out as RGB the right way up. Raises
    what PIL raises for a file it cannot read.
    """
    with Image.open(path) as image:
        if short:
            image.draft("RGB", (short, short))  # JPEG: decode at 1/2, 1/4 or 1/8 if that is still enough
        image = ImageOps.exif_transpose(image)
        if image.mode.startswith("I"):  # 16-bit grey, which PIL would clip
            image = Image.fromarray((np.asarray(image).astype(np.float32) / 257).clip(0, 255).astype(np.uint8))
        if image.has_transparency_data:
            image = image.convert("RGBA")
            image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
        return image.convert("RGB")


def load_image(path, resolution, rng=None):
    """The file as (resolution, resolution, 3) uint8 RGB: a random crop and flip with `rng`, else the centre.

    Reduced (or, where it is smaller, enlarged) first. Raises what PIL raises for a file it cannot read.
    """
    # Unspecified: augmentation. As in ADM's code: the crop takes 80 to 100 % of the shorter side.
    short = int(resolution if rng is None else rng.integers(resolution, int(resolution / 0.8) + 1))
    image = open_rgb(path, short)
    width, height = image.size
    scale = short / min(width, height)
    width, height = max(resolution, round(width * scale)), max(resolution, round(height * scale))
    image = image.resize((width, height), Image.Resampling.BICUBIC)
    spare_x, spare_y = width - resolution, height - resolution
    x, y = (spare_x // 2, spare_y // 2) if rng is None else (rng.integers(spare_x + 1), rng.integers(spare_y + 1))
    pixels = np.asarray(image.crop((x, y, x + resolution, y + resolution)))
    return pixels[:, ::-1] if rng is not None and rng.random() < 0.5 else pixels


class Shuffled:
    """The positions of an endless stream as indices of `n` things, in a new order each epoch."""

    def __init__(self, n, seed):
        self.n, self.seed, self.epoch = n, seed, None

    def __getitem__(self, position):
        epoch, index = divmod(position, self.n)
        if epoch != self.epoch:
            self.epoch, self.order = epoch, np.random.default_rng((self.seed, epoch)).permutation(self.n)
        return int(self.order[index])


class ImageFolder:
    """Image files as a stream: shuffled anew each epoch, cropped and flipped at random if `augment`.

    position -> (3, resolution, resolution) uint8; with `labels`, a number for each file, -> (that, label).
    A file that cannot be read is replaced by the next one that can; `unreadable()` names each such file once.
    UsageError if none can be read.
    """

    def __init__(self, files, resolution, seed=0, augment=True, labels=None):
        self.files, self.resolution, self.seed, self.augment, self.labels = files, resolution, seed, augment, labels
        self.broken = torch.zeros(len(files), dtype=torch.uint8).share_memory_()  # workers mark, the main process reads
        self.reported = set()
        self.order = Shuffled(len(files), seed)
        self[0]  # at least one file must be readable

    def __len__(self):
        return len(self.files)

    def __getitem__(self, position):
        index = self.order[position] if self.augment else position
        for attempt in range(len(self.files)):
            candidate = (index + attempt) % len(self.files)
            if self.broken[candidate]:
                continue
            # A generator for each attempt: the crop must not depend on whether a broken file was known.
            rng = np.random.default_rng((self.seed, 1, position)) if self.augment else None
            try:
                pixels = load_image(self.files[candidate], self.resolution, rng)
            except Exception:  # PIL raises a dozen kinds for a dozen kinds of damage
                self.broken[candidate] = 1
                continue
            image = torch.from_numpy(pixels.copy()).permute(2, 0, 1).contiguous()
            return image if self.labels is None else (image, self.labels[candidate])
        raise UsageError(f"none of the {len(self.files)} images can be read, {self.files[0]} for one")

    def unreadable(self):
        """The files found unreadable since the last call."""
        new = [i for i in self.broken.nonzero().flatten().tolist() if i not in self.reported]
        self.reported.update(new)
        return [self.files[i] for i in new]


class TwoStages:
    """The stream `first` up to a position, from there on `second`: the same images at another resolution."""

    def __init__(self, first, second, position):
        self.first, self.second, self.position = first, second, position
        if isinstance(first, ImageFolder):  # what one finds unreadable the other skips
            second.broken = first.broken
            self.reported, self.unreadable = first.reported, first.unreadable

    def __getitem__(self, position):
        return (self.first if position < self.position else self.second)[position]


# ------------------------------------------------------------------------------------------------------
# 2  Looking
# ------------------------------------------------------------------------------------------------------


def to_pixels(x):
    """[-1, 1] -> [0, 1], clamped: the one place where images are clamped before they are judged."""
    return ((x.float() + 1) / 2).clamp(0, 1)


def psnr(x_hat, x):
    """Peak signal-to-noise ratio in dB for each image, over [0, 1]: two (B, 3, H, W) in [-1, 1] -> (B,)."""
    mse = (to_pixels(x_hat) - to_pixels(x)).square().mean(dim=(1, 2, 3))
    return -10 * torch.log10(mse.clamp_min(1e-12))


def save_grid(path, rows, gap=2):
    """Write a PNG of `rows`, each a list of (3, H, W) images in [-1, 1], with white gaps; small images enlarged."""
    zoom = max(1, 128 // rows[0][0].shape[-1])
    tile = lambda x: to_pixels(x.cpu()).repeat_interleave(zoom, 1).repeat_interleave(zoom, 2)  # noqa: E731
    pad = lambda x: torch.nn.functional.pad(tile(x), (0, gap, 0, gap), value=1.0)  # noqa: E731
    width = max(len(row) for row in rows)
    rows = [list(row) + [torch.ones_like(row[0])] * (width - len(row)) for row in rows]  # a short last row
    grid = torch.cat([torch.cat([pad(x) for x in row], dim=2) for row in rows], dim=1)[:, :-gap, :-gap]
    Image.fromarray((grid * 255).round().byte().permute(1, 2, 0).numpy()).save(path)


# ------------------------------------------------------------------------------------------------------
# 3  Around the step: nothing here knows what is trained
# ------------------------------------------------------------------------------------------------------


class Machine:
    """Where and how this process computes: device, precision, and its share among `world` processes."""

    def __init__(self, device=None, precision="auto"):
        self.rank, self.world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
        if device is None:
            device = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
        if self.world > 1 and device == "cuda":
            device = f"cuda:{os.environ['LOCAL_RANK']}"  # one GPU for each process
        try:
            self.device = torch.device(device)
            torch.zeros(1, device=self.device)
        except (RuntimeError, AssertionError):
            raise UsageError(f"the device {device} cannot be used here: choose another with --device, or leave it out")
        cuda = self.device.type == "cuda"
        if self.world > 1:
            if cuda:
                torch.cuda.set_device(self.device)
            dist.init_process_group("nccl" if cuda else "gloo")
        # bf16 has float32's range, so it needs no loss scaling; older GPUs only emulate it, slowly.
        fast = cuda and torch.cuda.get_device_capability(self.device) >= (8, 0)
        self.bf16 = fast if precision == "auto" else precision == "bf16"
        if cuda:
            torch.set_float32_matmul_precision("high")  # TF32 for what stays in float32
            torch.backends.cudnn.benchmark = True
        self.memory_format = torch.channels_last if cuda else torch.contiguous_format

    def autocast(self):
        return torch.autocast(self.device.type, dtype=torch.bfloat16, enabled=self.bf16)

    def images(self, batch):
        """(B, 3, H, W) uint8 from the loader -> float in [-1, 1] on the device."""
        batch = batch.to(self.device, non_blocking=True, memory_format=self.memory_format)
        return batch.float() / 127.5 - 1

    def workers(self, asked):
        """How many processes load images: what was asked for, if anything was."""
        # On a CPU the networks need every core, and a third busy process on two of them stalls both.
        return asked if asked is not None else 0 if self.device.type == "cpu" else min(8, os.cpu_count() or 1)

    def randn(self, shape):
        """Standard normal noise for this process's rows of the global batch: the same for any `world`.

        From torch's CPU generator, which `fit` seeds alike in every process before each step.
        """
        rows = shape[0]
        noise = torch.randn((rows * self.world, *shape[1:]))
        return noise[self.rank * rows:(self.rank + 1) * rows].to(self.device, non_blocking=True)

    def parallel(self, module):
        """`module`, with gradients averaged over the processes if there are several."""
        if self.world == 1:
            return module
        return DistributedDataParallel(module, device_ids=[self.device.index] if self.device.type == "cuda" else None,
                                       broadcast_buffers=False)

    def average(self, tensor):
        """`tensor`, averaged over the processes."""
        if self.world == 1:
            return tensor
        tensor = tensor.to(self.device)
        dist.all_reduce(tensor)
        return tensor / self.world

    def mean(self, values):
        """A dict of scalars, averaged over the processes, as floats."""
        tensor = torch.stack([torch.as_tensor(v, dtype=torch.float32, device=self.device) for v in values.values()])
        return dict(zip(values, self.average(tensor).tolist()))

    def any(self, flag):
        """Whether `flag` is true in any process."""
        if self.world == 1:
            return flag
        tensor = torch.tensor(float(flag), device=self.device)
        dist.all_reduce(tensor)
        return tensor.item() > 0

    def wait(self):
        """Return once every process has come here."""
        self.any(False)

    def now(self):
        """Seconds on a clock, once the device has done all it was given."""
        if self.device.type != "cpu":
            getattr(torch, self.device.type).synchronize()
        return time.perf_counter()


def batches(dataset, batch_size, start, machine, workers):
    """This process's share of batches `start`, `start + 1`, ... of the stream, without end."""
    share = batch_size // machine.world

    def positions():
        first = start * batch_size + machine.rank * share
        while True:
            yield list(range(first, first + share))
            first += batch_size

    return iter(DataLoader(dataset, batch_sampler=positions(), num_workers=workers, worker_init_fn=ignore_signals,
                           pin_memory=machine.device.type == "cuda", prefetch_factor=4 if workers else None))


def ignore_signals(worker):
    # Ctrl-C reaches every process of the terminal; the main one decides when to stop.
    signal.signal(signal.SIGINT, signal.SIG_IGN)


class StopSignal:
    """Within it Ctrl-C and SIGTERM only set `.number`: a run finishes its step and saves; a second one kills."""

    def __enter__(self):
        self.number = None
        self.before = {number: signal.signal(number, self._note) for number in (signal.SIGINT, signal.SIGTERM)}
        return self

    def _note(self, number, frame):
        self.number = number
        signal.signal(number, signal.SIG_DFL)

    def __exit__(self, *error):
        for number, handler in self.before.items():
            signal.signal(number, handler)


class CSVLog:
    """log.csv: one row a logged step. A resumed run drops the rows its checkpoint has not seen."""

    def __init__(self, path, fields, start):
        self.path, self.fields = Path(path), ["step", *fields]
        rows = []
        if start and self.path.exists():
            with open(self.path, newline="") as file:
                rows = [row for row in csv.DictReader(file) if row.get("step") and int(row["step"]) <= start]
        partial = self.path.with_suffix(".csv.partial")
        with open(partial, "w", newline="") as file:
            writer = csv.DictWriter(file, self.fields, extrasaction="ignore")
            writer.writeheader()
            writer.writerows(rows)
        os.replace(partial, self.path)

    def write(self, step, values):
        with open(self.path, "a", newline="") as file:
            csv.DictWriter(file, self.fields).writerow({"step": step, **{k: f"{v:.6g}" for k, v in values.items()}})


class Progress:
    """A progress bar on a terminal, a line now and then elsewhere."""

    def __init__(self, start, steps):
        self.start, self.steps, self.began, self.printed = start, steps, time.monotonic(), -math.inf
        self.tty = sys.stdout.isatty()

    def show(self, step, text):
        now = time.monotonic()
        if not self.tty and now - self.printed < 10 and step < self.steps:
            return
        self.printed = now
        left = (now - self.began) / max(1, step - self.start) * (self.steps - step)
        done = 20 * step // self.steps
        bar = f"[{'#' * done}{'.' * (20 - done)}]"
        line = f"{step:>7}/{self.steps} {bar} {text} | {int(left) // 60}:{int(left) % 60:02} left"
        print(f"\r{line}\x1b[K" if self.tty else line, end="" if self.tty else "\n", flush=True)

    def say(self, text):
        print(f"\r{text}\x1b[K" if self.tty else text, flush=True)


class EMA:
    """Exponential moving average of a model's weights, in a copy of the model: `.model`."""

    def __init__(self, model, decay):
        self.model, self.decay, self.updates = copy.deepcopy(model).eval().requires_grad_(False), decay, 0

    @torch.no_grad()
    def update(self, model):
        decay = min(self.decay, (1 + self.updates) / (10 + self.updates))  # young averages forget faster
        torch._foreach_lerp_(list(self.model.parameters()), list(model.parameters()), 1 - decay)
        self.updates += 1


def optimizer_step(loss, parameters, optimizer, clip):
    """Backward, clip, step; the step is left out if the gradient's norm is not finite. Returns that norm, ()."""
    optimizer.zero_grad(set_to_none=True)
    loss.backward()
    norm = torch.nn.utils.clip_grad_norm_(parameters, clip)
    if torch.isfinite(norm):  # the same in every process: gradients were averaged over them
        optimizer.step()
    return norm


def learning_rate(step, lr, warmup, decay_after):
    """Linear warm-up, constant, then lr / sqrt(step / decay_after), which needs no last step to aim at."""
    decay = (decay_after / max(step, decay_after)) ** 0.5 if decay_after else 1.0
    return lr * decay * min(1.0, (step + 1) / max(1, warmup))


MAX_BAD_STEPS = 20  # not finite, in a row


def fit(task, args, machine, dataset, start):
    """The training loop. `task` brings what is trained:

    task.step(batch, step, log)  one update on what `dataset` gives; returns scalars (all of them if `log`) and
                                 "finite", whether it counted
    task.report(step)            pictures and held-out numbers (main process only); returns scalars
    task.save(step)              writes the checkpoint (main process only)
    task.fields, task.shown      the scalars' names, which are log.csv's columns; those on the progress bar
    task.skipped                 how many steps did not count

    Returns the exit status: 0, or 128 + the signal's number after Ctrl-C or SIGTERM. UsageError after
    MAX_BAD_STEPS steps in a row that were not finite.
    """
    main = machine.rank == 0
    log = CSVLog(Path(args.out) / "log.csv", task.fields + ["images_per_second", "skipped"], start) if main else None
    progress = Progress(start, args.steps) if main else None
    stream = batches(dataset, args.batch_size, start, machine, machine.workers(args.workers))
    bad, since, images = 0, time.monotonic(), 0
    with StopSignal() as stop:
        for step in range(start, args.steps):
            done = step + 1
            due = done % args.save_every == 0 or done == args.steps
            logged = done % args.log_every == 0 or due
            torch.manual_seed(args.seed * 1_000_003 + step)  # so that all noise resumes exactly
            values = task.step(next(stream), step, logged)
            images += args.batch_size

            finite = values.pop("finite")
            bad = 0 if finite else bad + 1
            task.skipped += not finite
            if bad == MAX_BAD_STEPS:
                good = (Path(args.out) / "checkpoint.pt").exists()
                raise UsageError(f"the gradient was not finite in {bad} steps in a row up to step {done}: "
                                 + (f"--resume from the good checkpoint in {args.out}" if good else "start again")
                                 + " with a lower --lr or --precision fp32")
            if logged:
                values = machine.mean(values)
            stopped = machine.any(stop.number is not None)
            if main and logged:
                values |= {"images_per_second": images / (time.monotonic() - since), "skipped": task.skipped}
                progress.show(done, " | ".join(f"{name} {values[name]:.4g}" for name in task.shown)
                              + f" | {values['images_per_second']:.1f} img/s")
                for path in getattr(dataset, "unreadable", list)():
                    progress.say(f"skipped, cannot be read: {path} ({len(dataset.reported)} files so far)")
            if main and due:
                report = task.report(done)
                progress.say(f"step {done}: " + ", ".join(f"{name} {value:.4g}" for name, value in report.items()))
                values |= report
            # A streak of bad steps may be the first sign of weights gone wrong: keep the checkpoint before it.
            if main and (stopped or done == args.steps or due and not bad):
                task.save(done)
            if main and logged:
                log.write(done, values)
            if logged:
                since, images = time.monotonic(), 0
            if stopped:
                if main:
                    progress.say(f"saved and stopped after step {done} of {args.steps}: "
                                 f"go on with --resume --out {args.out}")
                return 128 + (stop.number or signal.SIGTERM)
    return 0


# ------------------------------------------------------------------------------------------------------
# 4  Options: what every training script can be asked for
# ------------------------------------------------------------------------------------------------------


class Parser(argparse.ArgumentParser):
    def error(self, message):
        raise UsageError(f"{message} (--help lists every option)")


class Options:
    """Options whose defaults are a recipe's: `quick` without --data, `data` with it, or the same for both.

    The parser leaves what was not given at None; `recipe` tells what it then is.
    """

    def __init__(self, parser, quick, data):
        self.parser, self.quick, self.data, self.both = parser, quick, data, {}

    def group(self, title):
        self.current = self.parser.add_argument_group(title)

    def add(self, name, text, default=None, **how):
        key = name.lstrip("-").replace("-", "_")
        if key in self.quick:
            quick, data = self.quick[key], self.data[key]
            text += f" (default: {quick}" + (f", with --data {data})" if quick != data else ")")
        elif default is not None:
            text += f" (default: {default})"
            self.both[key] = default
        self.current.add_argument(name, help=text.replace("%", "%%"), default=None, **how)

    def recipe(self, data):
        return {**(self.data if data else self.quick), **self.both}


def add_run_options(options, out, steps, resolution=""):
    """What is trained on and for how long; `out` names the default folders, `steps` says what a step is."""
    options.group("run")
    options.add("--data", "folder of images to train on, searched recursively; without it: built-in images",
                metavar="DIR")
    options.add("--val", "folder of held-out images; without it, 1 file in 20 of --data is held out, "
                f"{HELD_OUT} at most", metavar="DIR")
    options.add("--out", f"folder for checkpoint, log and pictures (default: {out})", metavar="DIR")
    options.add("--resume", "go on from --out's checkpoint, with the options it was started with", action="store_true")
    options.add("--steps", steps, type=int)
    options.add("--batch-size", "images a step, over all processes", type=int)
    options.add("--resolution", "side of the square crops in pixels, a multiple of 8" + resolution, type=int)
    options.add("--seed", "seed of weights, images and noise", type=int, default=0)
    options.add("--save-every", "steps between checkpoints, pictures and held-out measurements", type=int)
    options.add("--log-every", "steps between rows of log.csv", type=int)
    options.add("--workers", "processes that load images (default: as many as cores, 8 at most; on a CPU 0, which "
                "is the main process)", type=int)
    options.add("--device", "cuda, cuda:1, mps, cpu (default: the best there is)")
    options.add("--precision", "bf16 runs the networks in bfloat16; auto does where the GPU is built for it",
                choices=["auto", "fp32", "bf16"], default="auto")


def add_optimiser_options(options):
    options.group("optimisation")
    options.add("--lr", "Adam's learning rate", type=float)
    options.add("--beta1", "Adam's first beta", type=float)
    options.add("--beta2", "Adam's second beta", type=float)
    options.add("--lr-warmup", "steps of linear warm-up", type=int)
    options.add("--lr-decay-after", "steps after which the rate falls as 1/sqrt(step); 0: never", type=int)
    options.add("--clip", "largest gradient norm", type=float, default=1.0)
    options.add("--ema", "decay of the averaged weights, reached from (1+n)/(10+n)", type=float)


# What a resumed run may be given anew; all else is what it was.
CHANGEABLE = {"steps", "save_every", "log_every", "workers", "device", "precision", "compile", "data", "val", "lr",
              "clip", "resume", "out"}


def complete(args, options, out, load):
    """What was given, what is to fill it up, and with --resume the checkpoint, which `load` reads.

    The filling is the recipe, or with --resume what the run was started with. `args.out` defaults to `out`.
    """
    given = {key: value for key, value in vars(args).items() if value is not None}
    args.out = given["out"] = str(Path(given.get("out", out)))
    if not args.resume:
        if (Path(args.out) / "checkpoint.pt").exists():
            raise UsageError(f"{args.out} already holds a run: go on with --resume, or choose another --out")
        return given, options.recipe(args.data), None
    checkpoint = load_or_say(load, Path(args.out) / "checkpoint.pt", "--resume")
    if "training" not in checkpoint:
        raise UsageError(f"{args.out}/checkpoint.pt holds a model but no training state: start from it with --init")
    kept = {**options.recipe(args.data), **checkpoint["args"]}  # the file may be older than an option
    for key, value in given.items():
        if key not in CHANGEABLE and value != kept.get(key):
            raise UsageError(f"the run in {args.out} was started with {flag(key)} {kept.get(key)}, not {value}: "
                             "a resumed run keeps it, so leave the option out")
    return given, kept, checkpoint


def load_or_say(load, path, option):
    """load(path), whose errors become a UsageError that names the option."""
    try:
        return load(path)
    except (ValueError, OSError) as error:
        raise UsageError(f"{option}: {error}")


def rebuilt(build, option):
    """build(), made from a checkpoint; a UsageError that names `option` if its weights and its config disagree."""
    try:
        return build()
    except (KeyError, TypeError, ValueError, RuntimeError) as error:
        raise UsageError(f"{option}: the checkpoint's weights are not those of the model it describes "
                         f"({(str(error) or repr(error)).splitlines()[0]})")


def trained_at(checkpoint):
    """The resolution a checkpoint's autoencoder was trained at, last if at several; None if the file does not say."""
    args = checkpoint.get("args", {})
    tuned = args.get("tune_resolution") and checkpoint["step"] > args["tune_start"]
    return args.get("tune_resolution" if tuned else "resolution")


def fits_resolution(config, resolution, option):
    """UsageError if a model of this config takes images of another resolution alone, as a ViT makes it."""
    if config.get("resolution") not in (None, resolution):
        raise UsageError(f"{option}: its ViT aggregator takes images of {config['resolution']}x{config['resolution']} "
                         f"alone (Table 20), not of {resolution}x{resolution}")


def flag(key):
    return ("-" if len(key) == 1 else "--") + key.replace("_", "-")


def at_least(smallest, args, key):
    value = getattr(args, key)
    if value is not None and value < smallest:
        raise UsageError(f"{flag(key)} must " + (f"be at least {smallest}" if smallest else "not be negative")
                         + f", got {value}")


def check_run(args, checkpoint):
    """Refuse what no run can work with, in one sentence each."""
    world = int(os.environ.get("WORLD_SIZE", 1))
    for key in ("steps", "batch_size", "save_every", "log_every"):
        at_least(1, args, key)
    for key in ("lr_warmup", "lr_decay_after", "seed", "workers"):
        at_least(0, args, key)
    if args.resolution < 8 or args.resolution % 8:
        raise UsageError(f"--resolution must be a multiple of 8, got {args.resolution}")
    if args.seed >= 2**32 - 1:
        raise UsageError(f"--seed must be below {2**32 - 1}, got {args.seed}")
    if args.batch_size % world:
        raise UsageError(f"--batch-size {args.batch_size} cannot be shared by {world} processes: make it a multiple")
    if not args.lr > 0 or not args.clip > 0:
        raise UsageError(f"--lr and --clip must be above 0, got {args.lr} and {args.clip}")
    for key in ("ema", "beta1", "beta2"):
        if not 0 <= getattr(args, key) < 1:
            raise UsageError(f"--{key} must be at least 0 and below 1, got {getattr(args, key)}")
    if args.resume and checkpoint["step"] >= args.steps:
        raise UsageError(f"the run in {args.out} has done its {checkpoint['step']} steps: raise --steps to go on")


HELD_OUT = 64  # images, unless --val names a folder


def open_images(args, label=None, clutter=1.0):
    """The images to train on, those held out, and a word about them; `clutter` is of built-in ones.

    With `label`, a function of a file and of the folder it was found below, items are (image, label). UsageError
    if there is nothing to read.
    """
    def images(files, root, **how):
        return ImageFolder(files, args.resolution, labels=label and [label(file, root) for file in files], **how)

    held_out = images(find_images(args.val), args.val, augment=False) if args.val else None
    if args.data:
        files = find_images(args.data)
        if not held_out:
            held_out = images(files[::20][:HELD_OUT], args.data, augment=False)
            unseen = set(held_out.files)
            files = [file for file in files if file not in unseen] or held_out.files
        about = f"{len(files)} images of {args.data}, {len(held_out)} held out"
        return images(files, args.data, seed=args.seed), held_out, about
    if not held_out:
        unseen = BuiltInImages(args.resolution, 2**32 - 1, clutter)  # a seed no run trains on
        held_out = [unseen[i] for i in range(HELD_OUT)]
    return BuiltInImages(args.resolution, args.seed, clutter), held_out, f"built-in images, {len(held_out)} held out"


def announce(name, model, about, args, machine, start):
    """The run in one line; and the folder it writes into."""
    if machine.rank == 0:
        Path(args.out).mkdir(parents=True, exist_ok=True)
        print(f"{name}, {sum(p.numel() for p in model.parameters()) / 1e6:.2f} M parameters, {about}, at "
              f"{args.resolution}x{args.resolution}; {machine.device}, {'bf16' if machine.bf16 else 'fp32'}; "
              f"steps {start} to {args.steps}; all goes to {args.out}", flush=True)


def run_script(name, work):
    """work(), whose exit status is returned; a UsageError becomes one sentence and status 1, Ctrl-C status 130."""
    try:
        return work()
    except UsageError as error:
        if int(os.environ.get("RANK", 0)) == 0:
            print(f"{name}: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:  # before or after the loop, which has its own way to stop
        print(f"{name}: stopped", file=sys.stderr)
        return 130
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()


# ------------------------------------------------------------------------------------------------------
# 5  The step (Eq. 1, Sec. 4.3)
# ------------------------------------------------------------------------------------------------------


class AutoencoderTask:
    """An autoencoder, its discriminator, and one update of each."""

    shown = ["loss", "l1"]
    fields = ["loss", *LOSS_WEIGHTS, "ldl", "recon", "kl_nats", "latent_std", "latent_max", "posterior_std",
              "grad_norm", "lr", "d_loss", "logits_real", "logits_fake", "adv_weight", "grad_ratio", "psnr"]

    def __init__(self, args, machine, vae, held_out, perceptual=None, discriminator=None):
        self.args, self.machine, self.held_out = args, machine, held_out
        self.vae = vae.to(machine.device, memory_format=machine.memory_format).train()
        self.ema = EMA(self.vae, args.ema)
        self.perceptual = perceptual.to(machine.device) if perceptual is not None else None
        self.weights = {name: getattr(args, f"weight_{name}") for name in LOSS_WEIGHTS}
        self.g_loss, self.d_loss = ADVERSARIAL[args.adv_loss]
        self.skipped = 0
        betas = (args.beta1, args.beta2)
        self.optimizer = torch.optim.Adam(self.vae.parameters(), args.lr, betas, fused=True)
        self.discriminator = None
        if discriminator is not None:
            self.discriminator = discriminator.to(machine.device, memory_format=machine.memory_format).train()
            self.d_optimizer = torch.optim.Adam(self.discriminator.parameters(), args.lr, betas, fused=True)
            self.d_parallel = machine.parallel(self.discriminator)
        if args.compile:
            # The gradient ratio walks the graph before backward does: compiled code must keep its buffers.
            torch._functorch.config.donated_buffer = False
            self.vae.encoder.compile()
            self.vae.decoder.compile()
        self.vae_parallel = machine.parallel(self.vae)

    def step(self, batch, step, log):
        args, image = self.args, self.machine.images(batch)  # (B, 3, H, W)
        for optimizer in [self.optimizer] + ([self.d_optimizer] if self.discriminator else []):
            for group in optimizer.param_groups:
                group["lr"] = learning_rate(step, args.lr, args.lr_warmup, args.lr_decay_after)

        # The autoencoder's turn. Weights stay in float32, the networks run in bf16 where that is fast.
        B, _, H, W = image.shape
        noise = self.machine.randn((B, self.vae.config.latent_dim, H // 8, W // 8))  # (B, nz, h, w)
        with self.machine.autocast():
            output = self.vae_parallel(image, noise=noise)
        fake_logits, weights = None, self.weights
        if self.discriminator and step >= args.disc_start:
            # A weight that ramps up over the warm-up: a discriminator that has just started is no shock.
            ramp = min(1.0, (step + 1 - args.disc_start) / max(1, args.disc_warmup))
            weights = {**self.weights, "adv": self.weights["adv"] * ramp}
            self.discriminator.requires_grad_(False)
            with self.machine.autocast():
                fake_logits = self.discriminator(output.sample)
            self.discriminator.requires_grad_(True)
        if args.adaptive_weight:
            weights = {**weights, "adv": 0.0}  # added below, once there are gradients to weigh it by
        loss, terms = autoencoder_loss(output, image, weights, self.perceptual, fake_logits, self.g_loss)
        if args.weight_ldl:
            with torch.no_grad(), self.machine.autocast():
                averaged = self.ema.model(image, noise=noise).sample
            terms["ldl"] = ldl_loss(output.sample, image, averaged)
            loss, terms["recon"] = (total + args.weight_ldl * terms["ldl"] for total in (loss, terms["recon"]))
        if args.adaptive_weight and fake_logits is not None:
            weight = adaptive_weight(terms["recon"], terms["adv"], self.last_layer, average=self.machine.average)
            weights["adv"] = ramp * weight
            loss = loss + weights["adv"] * terms["adv"]
        values = {"loss": loss, **terms, "lr": self.optimizer.param_groups[0]["lr"]}
        if log and fake_logits is not None:
            values |= {"adv_weight": weights["adv"], "grad_ratio": self.grad_ratio(terms)}
        values["grad_norm"] = optimizer_step(loss, self.vae.parameters(), self.optimizer, args.clip)
        finite = torch.isfinite(values["grad_norm"])
        if finite:
            self.ema.update(self.vae)

        # The discriminator's turn, on the same reconstructions; it starts before its loss counts above.
        if self.discriminator and step >= args.disc_start - args.disc_warmup:
            with self.machine.autocast():
                logits = self.d_parallel(torch.cat([image, output.sample.detach()]))  # UNet: (2B, 1), (2B, 1, H, W)
            real, fake = zip(*(both.chunk(2) for both in logits))
            values["d_loss"] = discriminator_loss(real, fake, self.d_loss)
            d_norm = optimizer_step(values["d_loss"], self.discriminator.parameters(), self.d_optimizer, args.clip)
            finite = finite & torch.isfinite(d_norm)
            values |= {name: sum(logits.mean() for logits in kinds) / len(kinds)
                       for name, kinds in (("logits_real", real), ("logits_fake", fake))}

        if log:
            d = output.latent_dist
            values |= {"kl_nats": output.kl_reg, "latent_std": d.mean.std(), "latent_max": d.mean.abs().max(),
                       "posterior_std": d.std.mean()}
        return {**{k: v.detach() if torch.is_tensor(v) else v for k, v in values.items()}, "finite": bool(finite)}

    @property
    def last_layer(self):
        return self.vae.decoder.conv_out.weight

    def grad_ratio(self, terms):
        """||grad L_adv|| / ||grad L_recon|| at the decoder's last layer, both unweighted (Fig. 7)."""
        # Paper: Fig. 7 can only be about the unweighted L_adv, for with the adaptive weight of Eq. 2 the
        # weighted ratio would be 1/2 by construction.
        gradients = (torch.autograd.grad(terms[name], self.last_layer, retain_graph=True)[0]
                     for name in ("adv", "recon"))
        adv, recon = (self.machine.average(gradient).norm() for gradient in gradients)
        return adv / recon.clamp_min(1e-12)

    @torch.no_grad()
    def report(self, step):
        """PSNR of the averaged weights on the held-out images, and a picture of the first eight."""
        values, pairs, latents = [], [], []
        for first in range(0, len(self.held_out), self.args.batch_size):
            indices = range(first, min(first + self.args.batch_size, len(self.held_out)))
            image = self.machine.images(torch.stack([self.held_out[i] for i in indices]))
            output = self.ema.model(image, sample=False)
            values.append(psnr(output.sample, image))
            latents.append(output.latent.flatten())
            pairs += zip(image[:8 - len(pairs)], output.sample)
        # The factor that brings latents to unit variance travels with the model, as in diffusers.
        for vae in (self.vae, self.ema.model):
            vae.config.scaling_factor = round(1 / torch.cat(latents).std().item(), 5)
        save_grid(Path(self.args.out) / f"reconstructions-{step:06}.png",
                  [[x for pair in pairs[i:i + 4] for x in pair] for i in range(0, len(pairs), 4)])
        return {"psnr": torch.cat(values).mean().item()}

    def save(self, step):
        training = {"optimizer": self.optimizer.state_dict()["state"], "ema_updates": self.ema.updates,
                    "skipped": self.skipped}
        if self.discriminator:
            training |= {"discriminator": dict(self.discriminator.state_dict()),
                         "d_optimizer": self.d_optimizer.state_dict()["state"]}
        save_checkpoint(Path(self.args.out) / "checkpoint.pt", self.vae, self.ema.model, step=step, training=training,
                        args={k: v for k, v in vars(self.args).items() if v is not None})

    def resume(self, checkpoint):
        """Take up everything `save` wrote."""
        training = checkpoint["training"]
        self.vae.load_state_dict(checkpoint["model"])
        self.ema.model.load_state_dict(checkpoint["ema"])
        self.ema.updates, self.skipped = training["ema_updates"], training["skipped"]
        load_optimizer(self.optimizer, training["optimizer"])
        if self.discriminator:
            self.discriminator.load_state_dict(training["discriminator"])
            load_optimizer(self.d_optimizer, training["d_optimizer"])


def load_optimizer(optimizer, state):
    # The moments come from the file, learning rate and the like from the arguments.
    optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})


# ------------------------------------------------------------------------------------------------------
# 6  The two recipes
# ------------------------------------------------------------------------------------------------------

# What `python train.py` runs: tuned for the PSNR that four minutes on two CPU cores can reach. Predicting
# wavelets spares the decoder its costliest stage; gentle detail losses leave more to L1. No norm holds an
# SMC decoder's input in place, and at this high a rate latents can run away: a longer warm-up and a KL
# weight 1,000 times LDM's prevent it.
QUICK_START = dict(
    model="litevae", size="S", latent_dim=12, decoder_channels=16, output_type="wavelet", use_smc=True,
    use_1x1_conv=False,
    resolution=64, batch_size=8, steps=1400,
    lr=3e-3, beta1=0.9, beta2=0.95, lr_warmup=100, lr_decay_after=100, ema=0.99,
    perceptual="none", weight_wavelet=0.2, weight_gaussian=0.0, weight_kl=1e-3,
    discriminator="none", disc_start=0, disc_warmup=0, save_every=350, log_every=20)

# What `--data` runs. Paper: App. F for model, batch, steps, optimiser; Sec. 4.3 for the losses.
# Unspecified: everything else. Learning rate constant. "Batch size 16 on two GPUs" read as 16 in all. The
# discriminator's loss counts once reconstructions are past their blurry start; EMA as in LDM and DiT.
PAPER = dict(
    model="litevae", size="B", latent_dim=4, decoder_channels=128, output_type="image", use_smc=False,
    use_1x1_conv=False,
    resolution=128, batch_size=16, steps=200_000,
    lr=1e-4, beta1=0.5, beta2=0.9, lr_warmup=0, lr_decay_after=0, ema=0.9999,
    perceptual="lpips", weight_wavelet=LOSS_WEIGHTS["wavelet"], weight_gaussian=LOSS_WEIGHTS["gaussian"],
    weight_kl=LOSS_WEIGHTS["kl"], discriminator="unet", disc_start=10_000, disc_warmup=1_000,
    save_every=2_000, log_every=50)

# What the options of a model are called: those of all models, LiteVAE's own, and the parts that can be exchanged,
# with what they are in LiteVAE itself.
DECODER = ("latent_dim", "decoder_channels", "output_type", "use_smc")
LITEVAE = ("size", "use_1x1_conv")
PARTS = {"extractor": "unet", "shared_extractor": False, "aggregator": "unet", "last_two_levels": False}

PERCEPTUAL = {"lpips": LPIPS, "esrgan": ESRGANPerceptual}
ADVERSARIAL = {"hinge": (hinge_g_loss, hinge_d_loss), "logistic": (logistic_g_loss, logistic_d_loss)}


def build_parser():
    """The Options, which hold the parser."""
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options = Options(parser, QUICK_START, PAPER)
    add_run_options(options, "runs/quickstart, with --data runs/litevae", "updates of the autoencoder")
    options.add("--init", "start from this checkpoint's averaged weights, e.g. --resolution 256 for the second stage, "
                "or from a released Stable Diffusion autoencoder", metavar="CKPT")
    options.add("--compile", "torch.compile the encoder and decoder: a slow start, then faster steps",
                action="store_true")

    options.group("model")
    options.add("--latent-dim", "channels of the latent, nz; --model dwt has 12, dwt-2 has 48", type=int)
    options.add("--decoder-channels", "width of the decoder; 128 is Stable Diffusion's", type=int)
    options.add("--output-type", "what the decoder predicts", choices=["image", "wavelet"])

    options.group("Tables 1, 2, 11, 12, 13 and 22: the autoencoder")
    options.add("--model", "LiteVAE; Stable Diffusion's; that with a small encoder; a wavelet transform and a decoder",
                choices=["litevae", "sd-vae", "vae-small", "dwt", "dwt-2"])
    options.add("--size", "LiteVAE's encoder, Tables 23 and 24", choices=list(PRESETS))

    options.group("Table 4 and Figure 8: normalisation in the decoder")
    options.add("--use-smc", "SMC instead of GroupNorm in the decoder, Sec. 4.2",
                action=argparse.BooleanOptionalAction)

    options.group("Tables 5 and 22: training resolution (--resolution, or that and then another)")
    options.add("--tune-resolution", "resolution of the last steps and of the held-out images (default: --resolution "
                "all the way)", metavar="R", type=int)
    options.add("--tune-start", "step from which --tune-resolution holds (no default)", metavar="STEP", type=int)

    options.group("Table 17: 1x1 convolutions around the latent")
    options.add("--use-1x1-conv", "1x1 convolutions after the encoder and before the decoder",
                action=argparse.BooleanOptionalAction)

    options.group("Tables 18 to 21: the parts of LiteVAE's encoder")
    options.add("--extractor", "Table 18: what reads a wavelet level", default="unet", choices=["unet", "nafnet"])
    options.add("--shared-extractor", "Table 19: one extractor for all levels", default=False, action="store_true")
    options.add("--aggregator", "Table 20: what joins the levels; vit takes one resolution alone", default="unet",
                choices=["unet", "vit"])
    options.add("--last-two-levels", "Table 21: without the level of the highest resolution", default=False,
                action="store_true")

    add_optimiser_options(options)

    options.group("Eq. 1: weights of the losses")
    for name in ("l1", "kl"):
        options.add(f"--weight-{name}", f"weight of the {name} term", type=float, default=LOSS_WEIGHTS[name])

    options.group("Table 9: high-frequency losses (0: without)")
    for name in ("wavelet", "gaussian"):
        options.add(f"--weight-{name}", f"weight of the {name} term", type=float, default=LOSS_WEIGHTS[name])

    options.group("Table 14: perceptual loss")
    options.add("--perceptual", "LPIPS, or ESRGAN's VGG features before their activation",
                choices=[*PERCEPTUAL, "none"])
    options.add("--weight-perceptual", "weight of the perceptual loss", type=float, default=LOSS_WEIGHTS["perceptual"])

    options.group("Table 15: locally discriminative learning")
    options.add("--weight-ldl", "weight of the LDL term, 1 in its paper; 0: without", type=float, default=0.0)

    options.group("Table 10: discriminator")
    options.add("--discriminator", "adversarial loss; stylegan is StyleGAN2's",
                choices=["unet", "stylegan", "patchgan", "none"])
    options.add("--disc-channels", "width of the discriminator", type=int, default=64)
    options.add("--disc-start", "step from which its loss counts", type=int)
    options.add("--disc-warmup", "steps it trains before that, and over which its weight then ramps up", type=int)

    options.group("Table 16: adversarial loss")
    options.add("--adv-loss", "of both players; logistic is the non-saturating one", default="hinge",
                choices=list(ADVERSARIAL))

    options.group("Table 8 and Figure 7: weight of the adversarial loss")
    options.add("--weight-adv", "a constant weight of the adversarial loss", type=float, default=LOSS_WEIGHTS["adv"])
    options.add("--adaptive-weight", "instead the adaptive weight of Eq. 2", default=False, action="store_true")
    return options


def parse_args(argv=None):
    """The command line, completed from the recipe (or, with --resume, from the checkpoint) and checked."""
    options = build_parser()
    args = options.parser.parse_args(argv)
    out = "runs/litevae" if args.data else "runs/quickstart"
    given, recipe, checkpoint = complete(args, options, out, load_checkpoint)
    if args.init and not args.resume:
        checkpoint = load_or_say(load_checkpoint, args.init, "--init")
        held = {"model": "litevae", **PARTS, **checkpoint["config"]}
        held["model"] = held["model"].removesuffix("-variant")
        for key in recipe.keys() & held.keys() & {"model", *DECODER, *LITEVAE, *PARTS}:
            if given.get(key, held[key]) != held[key]:
                raise UsageError(f"{args.init} holds an autoencoder with {flag(key)} {held[key]}, not {given[key]}: "
                                 "leave the option out, or train without --init")
            recipe[key] = held[key]
    for key, value in {**recipe, **given}.items():
        setattr(args, key, value)
    if args.model in DWT_LATENTS:
        args.latent_dim, args.weight_kl = given.get("latent_dim", DWT_LATENTS[args.model]), 0.0
    check_run(args, checkpoint)
    _check(args, given)
    if args.init and not args.resume:
        fits_resolution(checkpoint["config"], args.resolution, "--init")
    return args, checkpoint


def _check(args, given):
    """Refuse what no autoencoder can be trained with, and what would do nothing."""
    for key in ("latent_dim", "decoder_channels", "disc_channels"):
        at_least(1, args, key)
    for key in ("disc_start", "disc_warmup", "weight_ldl"):
        at_least(0, args, key)
    disc = args.discriminator
    for idle, keys, why in (
            (args.model != "litevae", [*LITEVAE, *PARTS], f"is for --model litevae, and this is {args.model}"),
            (args.model in DWT_LATENTS, ["weight_kl"], f"weighs a KL, and --model {args.model} has none"),
            (args.perceptual == "none", ["weight_perceptual"], "needs --perceptual lpips or esrgan"),
            (disc == "none", ["adv_loss", "weight_adv", "adaptive_weight", "disc_channels", "disc_start",
                              "disc_warmup"], "needs a --discriminator"),
            (args.adaptive_weight, ["weight_adv"], "is the constant that --adaptive-weight replaces")):
        for key in keys:
            if idle and key in given:
                raise UsageError(f"{flag(key)} {why}: leave it out")
    if args.model in DWT_LATENTS and args.latent_dim != DWT_LATENTS[args.model]:
        raise UsageError(f"--model {args.model} has a latent of {DWT_LATENTS[args.model]} channels, not "
                         f"{args.latent_dim}: leave --latent-dim out")
    if (args.tune_resolution is None) != (args.tune_start is None):
        raise UsageError("--tune-resolution and --tune-start belong together: give both, or neither")
    if args.tune_resolution is not None:
        if args.tune_resolution < 8 or args.tune_resolution % 8:
            raise UsageError(f"--tune-resolution must be a multiple of 8, got {args.tune_resolution}")
        if not 0 < args.tune_start < args.steps:
            raise UsageError(f"--tune-start must be after the first of the {args.steps} steps and before the last, "
                             f"got {args.tune_start}")
        for bound, what in ((args.aggregator == "vit", "--aggregator vit"),
                            (disc == "stylegan", "--discriminator stylegan")):
            if bound:
                raise UsageError(f"{what} takes one resolution alone: leave --tune-resolution out")
    if disc == "stylegan" and args.resolution & (args.resolution - 1):
        raise UsageError(f"--discriminator stylegan takes a --resolution that is a power of two, got {args.resolution}")
    share = args.batch_size // int(os.environ.get("WORLD_SIZE", 1))
    if disc == "stylegan" and share % 4:
        raise UsageError(f"--discriminator stylegan compares images in groups of 4, and a process has {share}: "
                         "make --batch-size a multiple of 4 for each")
    smallest = 24 if disc == "patchgan" else 16 if disc != "none" or args.perceptual != "none" else 8
    for key in ("resolution", "tune_resolution"):
        if (getattr(args, key) or smallest) < smallest:
            raise UsageError(f"the discriminator and the perceptual loss need a {flag(key)} of at least {smallest}, "
                             f"got {getattr(args, key)}")
    if disc != "none" and args.disc_start >= args.steps:
        raise UsageError(f"the discriminator's loss would start at step {args.disc_start}, beyond the last of "
                         f"{args.steps}: lower --disc-start, raise --steps, or go without it: --discriminator none")


def build_autoencoder(args):
    how = {key: getattr(args, key) for key in DECODER}
    if args.model != "litevae":
        return MODELS[args.model](model=args.model, **how)
    how |= {key: getattr(args, key) for key in LITEVAE}
    parts = {key: getattr(args, key) for key in PARTS}
    if parts == PARTS:
        return LiteVAE(**how)
    return LiteVAEVariant(**parts, resolution=args.resolution if args.aggregator == "vit" else None, **how)


def build_discriminator(args):
    if args.discriminator == "stylegan":
        return StyleGANDiscriminator(args.resolution, args.disc_channels)
    return {"unet": UNetDiscriminator, "patchgan": PatchDiscriminator}[args.discriminator](args.disc_channels)


def prepare(args, machine, checkpoint):
    """The task, its data set and the step to start from."""
    torch.manual_seed(args.seed)
    dataset, held_out, about = open_images(args)
    if args.tune_resolution:
        later, held_out, _ = open_images(argparse.Namespace(**{**vars(args), "resolution": args.tune_resolution}))
        dataset = TwoStages(dataset, later, args.tune_start * args.batch_size)
        about += f", at {args.tune_resolution}x{args.tune_resolution} from step {args.tune_start} on"
    if checkpoint:
        vae = rebuilt(lambda: LiteVAE.from_state(checkpoint), "--resume" if args.resume else "--init")
    else:
        vae = build_autoencoder(args)
    discriminator = build_discriminator(args) if args.discriminator != "none" else None
    try:
        perceptual = PERCEPTUAL[args.perceptual]() if args.perceptual != "none" and args.weight_perceptual else None
    except (ImportError, OSError) as error:
        raise UsageError(f"{error}; or go without it: --perceptual none")
    if args.init and not args.resume and discriminator is not None:
        earlier = checkpoint.get("training", {}).get("discriminator", {})
        shapes = [{name: tensor.shape for name, tensor in d.items()} for d in (earlier, discriminator.state_dict())]
        if shapes[0] == shapes[1]:
            discriminator.load_state_dict(earlier)  # the second stage goes on with the first one's
    task = AutoencoderTask(args, machine, vae, held_out, perceptual, discriminator)
    start = 0
    if args.resume:
        task.resume(checkpoint)
        start = checkpoint["step"]
    side = args.resolution // 8
    announce(vae.name, vae, f"latent {side}x{side}x{args.latent_dim}; {about}", args, machine, start)
    return task, dataset, start


def main(argv=None):
    def work():
        args, checkpoint = parse_args(argv)
        machine = Machine(args.device, args.precision)
        task, dataset, start = prepare(args, machine, checkpoint)
        return fit(task, args, machine, dataset, start)
    return run_script("train.py", work)


if __name__ == "__main__":
    sys.exit(main())
